"""Brings an importance matrix into the names and shapes of a model, and cuts it to kept experts.

Other programs may name the experts' gate and up projections together, `ffn_gate_up_exps`, or apart:
both multiply the same input, so their sums are the same. A `.dat` file has all experts of a tensor
in one row. Memory: the matrix once more.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from reap2gguf.errors import ArtifactError
from reap2gguf.messages import one_line, shown
from reap2gguf.models.description import is_of_experts, sums_shape

if TYPE_CHECKING:
    from reap2gguf.gguf_files.imatrix import Imatrix, ImatrixEntry

Shapes = Mapping[str, tuple[int, ...]]  # of a model's GGUF tensors, slowest dimension first
Kept = Mapping[int, Sequence[int]]  # layer -> numbers of the experts that stay

_FUSED = "ffn_gate_up_exps"
_APART = ("ffn_gate_exps", "ffn_up_exps")
_BLOCK = re.compile(r"^blk\.(\d+)\.")
_HEADS = ("output.weight", "token_embd.weight")  # llama-imatrix --process-output
_SAME = 1e-3  # how far two sums of the same squares may be apart
_OTHER_MODEL = "it is of another model, such as the one before pruning"


@dataclass(frozen=True)
class FittedImatrix:
    """A matrix with the names and shapes of a model, and the entries that the model has no use for.

    Those are of a multi-token-prediction block after the last block, or of the output matrix.
    """

    imatrix: Imatrix
    left_out: tuple[str, ...] = ()


def fit(imatrix: Imatrix, shapes: Shapes, where: str) -> FittedImatrix:
    """The matrix with one row of sums per expert of each tensor.

    Raises ArtifactError for a tensor that the model does not have, or with another number of
    values.
    """
    entries: dict[str, ImatrixEntry] = {}
    left_out = []
    for name, entry in _renamed(imatrix.entries, shapes, where):
        if name in shapes:
            entries[name] = _fitted(entry, sums_shape(name, shapes[name]), where)
        elif _is_spare(name, shapes):
            left_out.append(name)
        else:
            raise ArtifactError(
                f"{where}: has an entry for {shown(name)}, which the model does not have; it is of "
                "another model"
            )
    # headers, manifest and cards repeat the name of the text
    dataset, *more = map(one_line, (imatrix.dataset, *imatrix.more_datasets))
    made = replace(imatrix, entries=entries, dataset=dataset, more_datasets=tuple(more))
    return FittedImatrix(made, tuple(left_out))


def _renamed(
    entries: Mapping[str, ImatrixEntry], shapes: Shapes, where: str
) -> Iterator[tuple[str, ImatrixEntry]]:
    """The entries under the model's names for gate and up projections."""
    for name, entry in entries.items():
        if name in shapes:
            yield name, entry
            continue
        apart = [name.replace(_FUSED, one) for one in _APART]
        fused = name.replace(_APART[0], _FUSED).replace(_APART[1], _FUSED)
        if _FUSED in name and shapes.keys() >= set(apart):
            for one in apart:
                if one not in entries:
                    yield one, replace(entry, name=one)
        elif fused != name and fused in shapes:
            first, second = (entries.get(fused.replace(_FUSED, one)) for one in _APART)
            _check_same(first, second, fused, where)
            if fused not in entries and (entry is first or first is None):
                yield fused, replace(entry, name=fused)
        else:
            yield name, entry


def _check_same(gate: ImatrixEntry | None, up: ImatrixEntry | None, fused: str, where: str) -> None:
    """Raises ArtifactError unless both are of the same input: one of them is to be used."""
    if gate is None or up is None:
        return
    if (
        gate.sums.shape != up.sums.shape
        or not np.array_equal(gate.counts, up.counts)
        or not np.allclose(gate.sums, up.sums, rtol=_SAME)
    ):
        raise ArtifactError(
            f"{where}: {gate.name} and {up.name} differ, and the model has one tensor for both, "
            f"{fused}, which multiplies one input; compute the matrix again"
        )


def _fitted(entry: ImatrixEntry, shape: tuple[int, int], where: str) -> ImatrixEntry:
    n_matrices, n_columns = shape
    rows, width = entry.sums.shape
    counts = entry.counts
    if rows > n_matrices == 1 and (counts == counts[0]).all():
        counts, rows, width = counts[:1], 1, rows * width  # older files count for each head
    if rows * width != n_matrices * n_columns or width % n_columns:
        raise ArtifactError(
            f"{where}: {entry.name} has {rows} x {width} values, expected {n_matrices} x "
            f"{n_columns}; {_OTHER_MODEL}"
        )
    sums = entry.sums.reshape(n_matrices, n_columns)
    if width != n_columns:
        # llama-imatrix writes ones, times the calls, for an expert that it never saw
        ones = (sums == counts.repeat(width // n_columns)[:, None]).all(axis=1)
        counts = np.where(ones, 0, counts.repeat(width // n_columns))
    return replace(entry, sums=sums, counts=counts)


def _is_spare(name: str, shapes: Shapes) -> bool:
    """Whether a model without this tensor may be the one that the matrix is of."""
    if name in _HEADS:
        return True
    found = _BLOCK.match(name)
    return found is not None and int(found[1]) == n_blocks(shapes)


def n_blocks(shapes: Collection[str]) -> int:
    """The number of blocks whose tensors these are."""
    return 1 + max((int(found[1]) for name in shapes if (found := _BLOCK.match(name))), default=-1)


def layer_of(name: str) -> int | None:
    """The block of a GGUF tensor; None outside the blocks."""
    found = _BLOCK.match(name)
    return None if found is None else int(found[1])


def n_experts_of(shapes: Shapes) -> int | None:
    """How many experts a model has in each layer."""
    return next((shape[0] for name, shape in shapes.items() if is_of_experts(name)), None)


def n_experts_in(imatrix: Imatrix, shapes: Shapes, where: str) -> int | None:
    """How many experts a matrix of the model, pruned or not, has in each layer.

    None if it has no entries of experts. Raises ArtifactError for entries that disagree.
    """
    found: dict[int, str] = {}
    for name, entry in _renamed(imatrix.entries, shapes, where):
        if name in shapes and is_of_experts(name):
            n_experts, rest = divmod(entry.sums.size, shapes[name][-1])
            if rest:
                raise ArtifactError(
                    f"{where}: {name} has {entry.sums.size:,} values, expected a multiple of "
                    f"{shapes[name][-1]:,}; it is of another model"
                )
            found.setdefault(n_experts, name)
    if len(found) > 1:
        (one, first), (two, second) = list(found.items())[:2]
        raise ArtifactError(
            f"{where}: {first} has {one} experts and {second} has {two}; it is of another model"
        )
    return next(iter(found), None)


def with_experts(shapes: Shapes, n_experts: int) -> dict[str, tuple[int, ...]]:
    """The same tensors of a model with another number of experts."""
    return {
        name: (n_experts, *shape[1:]) if is_of_experts(name) else shape
        for name, shape in shapes.items()
    }


def cut(imatrix: Imatrix, kept: Kept, where: str) -> Imatrix:
    """A fitted matrix of the unpruned model with the kept experts alone, in their new order.

    Raises ArtifactError for a layer whose kept experts are not known.
    """
    entries = dict(imatrix.entries)
    for name, entry in imatrix.entries.items():
        if is_of_experts(name):
            layer = layer_of(name)
            ids = None if layer is None else kept.get(layer)
            if ids is None or max(ids, default=0) >= len(entry.counts):
                raise ArtifactError(
                    f"{where}: {name} has {len(entry.counts)} experts, and which of them are kept "
                    "is not recorded; it is of another model"
                )
            chosen = list(ids)
            entries[name] = replace(entry, sums=entry.sums[chosen], counts=entry.counts[chosen])
    return replace(imatrix, entries=entries)
