"""What was done to a model's experts, in words: cards, pictures, reports and tables say the same.

In manifests the model that files are quantized from is always called "pruned": that is a key.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from reap2gguf.bundle.records import PruningRecord


@dataclass(frozen=True)
class Wording:
    """Words for what was done to the experts of a model."""

    model: str  # what its result is: "the MODEL model"
    act: str  # what costs something, a noun in the singular

    @property
    def title(self) -> str:
        """The act at the beginning of a sentence."""
        return self.act.capitalize()

    def name(self, variant: str) -> str:
        """What a variant of an evaluation is called, where it is no file."""
        return self.model if variant == "pruned" else variant


PRUNED = Wording("pruned", "pruning")
_REPAIRED = Wording("repaired", "pruning with repair")
_MERGED = Wording("merged", "merging")


def wording(pruning: PruningRecord) -> Wording:
    """The words for a bundle."""
    if pruning.merge is not None:
        return _MERGED
    return PRUNED if pruning.repair is None else _REPAIRED
