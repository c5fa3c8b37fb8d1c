"""How much of a model an importance matrix says something about.

What it says nothing about is quantized with equal weights, as by llama-quantize: a matrix without
an entry, and an expert that no token reached. Types of few bits are refused without an entry.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

import numpy as np

from reap2gguf.errors import ArtifactError
from reap2gguf.gguf_files.activation_statistics import ExpertHits, expert_hits
from reap2gguf.gguf_files.imatrix_fit import layer_of
from reap2gguf.models.description import GgufTensor, is_of_experts

if TYPE_CHECKING:
    from reap2gguf.gguf_files.imatrix import Imatrix
    from reap2gguf.gguf_files.imatrix_fit import Shapes

# llama.cpp multiplies neither by what an imatrix sees, and a trunk's own are outside the blocks
_NOT_IN_LAYERS = (".nextn.embed_tokens.weight", ".nextn.shared_head_head.weight")
FEW = 100  # tokens; the sums of an expert with fewer are noisy
LEAST = 0.8  # of the weights; with less, most files would be better off without the matrix


@dataclass(frozen=True)
class ImatrixCoverage:
    """What part of a model's blocks has importance; one MTP block without any does not count."""

    n_tensors: int  # matrices of the blocks that are quantized
    n_missing: int  # of these without an entry, or with one that no token reached
    n_experts: int  # experts of all layers, counted once for each of their tensors with an entry
    n_unseen: int  # of these never hit
    share: float  # of the weights of all these matrices
    missing: tuple[str, ...] = ()  # the first few
    lacks_mtp: bool = False  # llama-imatrix does not run that block
    n_few: int = 0  # of the experts that saw fewer than FEW tokens, the unseen ones included
    # tokens of every tensor's experts; none of a .dat file, which does not say them
    experts: tuple[ExpertHits, ...] = ()

    @property
    def line(self) -> str:
        """The coverage in one line."""
        parts = [f"covers {self.share:.1%} of the weights in {self.n_tensors:,} matrices"]
        if self.n_missing:
            parts.append(f"{self.n_missing:,} have no entry, such as {self.missing[0]}")
        if self.n_unseen:
            parts.append(
                f"{self.n_unseen:,} of {self.n_experts:,} experts (one per tensor) were never hit "
                "and are quantized with equal weights"
            )
        if self.experts:
            hits = np.concatenate([one.hits for one in self.experts])
            few = f", {self.n_few:,} saw fewer than {FEW} tokens" if self.n_few else ""
            parts.append(
                f"fewest {int(hits.min()):,} and median {int(np.median(hits)):,} tokens per expert"
                f"{few}"
            )
        if self.lacks_mtp:
            parts.append("the multi-token-prediction block has none")
        return "; ".join(parts)


def coverage(imatrix: Imatrix, shapes: Shapes, mtp_block: int | None = None) -> ImatrixCoverage:
    """The coverage of a model's matrices by a fitted matrix."""
    matrices = {name: shape for name, shape in shapes.items() if _is_weighted(name, shape)}
    own = {name for name in matrices if layer_of(name) == mtp_block}
    lacks_mtp = bool(own) and not own & imatrix.entries.keys()
    if lacks_mtp:
        matrices = {name: shape for name, shape in matrices.items() if name not in own}
    total = covered = n_experts = n_unseen = 0
    missing, hits = [], []
    for name, shape in matrices.items():
        entry, size = imatrix.entries.get(name), prod(shape)
        total += size
        if entry is None or not entry.counts.any():
            missing.append(name)
            continue
        n_hit = int((entry.counts > 0).sum())
        covered += size * n_hit // len(entry.counts)
        if is_of_experts(name):
            n_experts += len(entry.counts)
            n_unseen += len(entry.counts) - n_hit
            if imatrix.chunk_size:
                hits.append(expert_hits(entry, FEW))
    share = covered / total if total else 0.0
    count = len(matrices), len(missing), n_experts, n_unseen
    n_few = sum(one.n_below for one in hits)
    first = tuple(sorted(missing)[:3])
    return ImatrixCoverage(*count, share, first, lacks_mtp, n_few, tuple(hits))


def layer_hits(imatrix: Imatrix) -> dict[int, tuple[int, ...]]:
    """The tokens that each expert of each layer saw; empty if the format does not say them.

    All tensors of an expert see the same tokens, so one stands for them.
    """
    if not imatrix.chunk_size:
        return {}
    found = {layer_of(one.name): tuple(one.counts.tolist()) for one in imatrix.expert_entries()}
    return {layer: found[layer] for layer in sorted(one for one in found if one is not None)}


def hits_line(hits: Mapping[int, Sequence[int]]) -> str:
    """Tokens per expert, by layer, in one line for all."""
    counts = np.concatenate([np.asarray(one, np.int64) for one in hits.values()])
    n_few, n_unseen = int((counts < FEW).sum()), int((counts == 0).sum())
    line = (
        f"fewest tokens {int(counts.min()):,}, median {int(np.median(counts)):,} tokens per expert"
    )
    if n_few:
        line += f"; {n_few:,} of {len(counts):,} experts ({n_few / len(counts):.1%}) saw fewer than"
        line += f" {FEW}"
    if n_unseen:
        line += f", and {n_unseen:,} none, which are quantized with equal weights"
    return line


def _is_weighted(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is a matrix of a block that is quantized."""
    return (
        name.startswith("blk.")
        and not name.endswith(_NOT_IN_LAYERS)
        and len(shape) > 1
        and not GgufTensor(name, shape, ()).never_quantized
    )


def shapes_of(tensors: Iterable[GgufTensor]) -> dict[str, tuple[int, ...]]:
    """The shapes of a model's tensors by name."""
    return {tensor.name: tensor.shape for tensor in tensors}


def check_coverage(found: ImatrixCoverage, where: str) -> None:
    """Raises ArtifactError if a matrix says too little to be of use."""
    if found.share < LEAST:
        raise ArtifactError(
            f"{where}: {found.line}; expected at least {LEAST:.0%}; compute it on more text, add "
            "several with `reap2gguf imatrix merge`, or leave it out"
        )
