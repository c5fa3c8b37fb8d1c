"""What a GGUF file of a model holds: its experts, its types, and what was pruned of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING

from reap2gguf.gguf_files.split import read_whole_header
from reap2gguf.models.from_gguf import model_from_gguf

if TYPE_CHECKING:
    from pathlib import Path

    from reap2gguf.gguf_files.reader import GgufHeader
    from reap2gguf.models.contract import MoeModel


@dataclass(frozen=True)
class TypeShare:
    """The tensors of one type."""

    type: str
    n_tensors: int
    n_bytes: int


@dataclass(frozen=True)
class GgufInspection:
    """A GGUF file of a model, or all its parts, by its header alone."""

    file: str
    name: str | None  # general.name
    architecture: str
    n_parts: int
    n_bytes: int
    n_parameters: int
    n_moe_layers: int
    n_experts: int  # per layer
    experts_per_token: int
    types: tuple[TypeShare, ...]  # the largest first
    source: str | None = None  # of a file that this program pruned
    method: str | None = None
    source_experts: int | None = None  # per layer, before pruning
    kept: Mapping[int, Sequence[int]] = field(default_factory=dict)  # ids in the source, by layer

    @property
    def bits_per_weight(self) -> float:
        """Bits of all tensors, by their weights."""
        return 8 * sum(one.n_bytes for one in self.types) / self.n_parameters


def inspect_gguf(
    path: Path, architectures: Mapping[str, Sequence[type[MoeModel]]]
) -> GgufInspection:
    """What the header of a file says; `architectures` are the known ones.

    Raises ArtifactError, UnsupportedModelError or CheckpointError as opening it would.
    """
    header = read_whole_header(path)
    facts = model_from_gguf(header, architectures).model.facts
    keys = header.metadata
    kept = keys.get("reap2gguf.kept_experts")
    count = keys.get("reap2gguf.source_expert_count")
    each, layers = facts.n_experts, facts.moe_layers
    by_layer: dict[int, Sequence[int]] = {}
    if isinstance(kept, list) and len(kept) == each * len(layers):
        by_layer = {layer: kept[at * each : (at + 1) * each] for at, layer in enumerate(layers)}
    return GgufInspection(
        file=path.name,
        name=_text(header, "general.name"),
        architecture=facts.gguf_arch,
        n_parts=len(header.headers),
        n_bytes=header.n_bytes,
        n_parameters=sum(prod(info.shape) for info in header.tensors.values()),
        n_moe_layers=len(layers),
        n_experts=each,
        experts_per_token=facts.experts_per_token,
        types=_types(header),
        source=_text(header, "reap2gguf.source"),
        method=_text(header, "reap2gguf.method"),
        source_experts=count if type(count) is int else None,
        kept=by_layer,
    )


def _text(header: GgufHeader, key: str) -> str | None:
    value = header.metadata.get(key)
    return value if isinstance(value, str) else None


def _types(header: GgufHeader) -> tuple[TypeShare, ...]:
    sizes: dict[str, list[int]] = {}
    for info in header.tensors.values():
        sizes.setdefault(info.tensor_type.name, []).append(info.n_bytes)
    found = [TypeShare(name, len(each), sum(each)) for name, each in sizes.items()]
    return tuple(sorted(found, key=lambda one: -one.n_bytes))
