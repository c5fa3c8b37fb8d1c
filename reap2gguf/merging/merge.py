"""What a layer's merge came to, as its file has it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from reap2gguf.pruning.layer_facts import Facts


@dataclass(frozen=True)
class Group:
    """Experts that become one, and the share of each in the average."""

    members: tuple[int, ...]  # source ids: the centroid, whose place it takes, then ascending
    shares: tuple[float, ...]

    @property
    def centroid(self) -> int:
        return self.members[0]

    @property
    def is_merged(self) -> bool:
        """Whether it is more than its centroid, which then stays as it is."""
        return len(self.members) > 1


@dataclass(frozen=True)
class LayerMerge(Facts):
    """What a layer's merge came to."""

    groups: tuple[Group, ...]  # by their centroids, ascending
    n_tokens: int  # that it was decided by

    @property
    def kept(self) -> tuple[int, ...]:
        """The experts that stay."""
        return tuple(group.centroid for group in self.groups)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        groups = tuple(
            Group(tuple(map(int, one["members"])), tuple(map(float, one["shares"])))
            for one in values["groups"]
        )
        return cls(groups, int(values["n_tokens"]))
