"""Statistics of an importance matrix as text, as comma-separated values, and as JSON."""

from __future__ import annotations

import csv
import io
import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from reap2gguf.gguf_files.activation_statistics import (
    ExpertHits,
    ImatrixStatistics,
    TensorStatistics,
    tensor_kind,
)

if TYPE_CHECKING:
    from reap2gguf.building.slicing import SlicedImatrix
    from reap2gguf.gguf_files.imatrix_merge import MergedImatrix

_COLUMNS = 80  # of text that is not a table
_LEAST_NAME = 14


def as_lines(found: ImatrixStatistics, title: str, with_experts: bool = False) -> Iterator[str]:
    """Statistics for people; `title` names the file."""
    size = f" of {found.chunk_size:,} tokens" if found.chunk_size else ""
    yield f"{title}: {found.n_chunks:,} chunks{size} of {found.dataset or 'an unnamed text'}"
    yield ""
    yield from _tensor_lines(found.tensors)
    if found.layers:
        yield ""
        yield f"{'layer':>5} {'sum':>10} {'ZD':>6} {'cosine':>6}   means, weighted by N"
        for layer in found.layers:
            numbers = f"{layer.total:>10.2f} {layer.z_density:>6.2%} {layer.cosine:>6.3f}"
            yield f"{layer.layer:>5} {numbers}"
    if found.experts:
        yield ""
        yield from expert_lines(found.experts, found.below, with_experts)
    yield ""
    for line in _notes(found):
        yield from textwrap.wrap(line, _COLUMNS)


def _tensor_lines(tensors: Iterable[TensorStatistics]) -> Iterator[str]:
    tensors = list(tensors)
    width = max([_LEAST_NAME, *(len(tensor_kind(one.name)) for one in tensors)])
    yield (
        f"{'layer':>5} {'tensor':<{width}} {'sum':>10} {'min':>8} {'max':>10} {'mean':>8} "
        f"{'sd':>8} {'active':>7} {'N':>8} {'entropy':>7} {'E norm':>7} {'ZD':>6} {'cosine':>6}"
    )
    for one in tensors:
        layer = "-" if one.layer is None else one.layer
        yield (
            f"{layer:>5} {tensor_kind(one.name):<{width}} {one.total:>10.2f} "
            f"{one.smallest:>8.4f} {one.largest:>10.4f} {one.mean:>8.3f} {one.deviation:>8.3f} "
            f"{one.active:>7.2%} {one.n_values:>8} {one.entropy:>7.3f} {one.entropy_share:>7.2%} "
            f"{one.z_density:>6.2%} {one.cosine:>6.3f}"
        )


def expert_lines(
    experts: Iterable[ExpertHits], below: int, with_experts: bool = False
) -> Iterator[str]:
    """A row for the tensors of a layer whose experts saw the same tokens."""
    rows: dict[tuple[int | None, tuple[int, ...]], list[ExpertHits]] = {}
    for one in experts:
        rows.setdefault((one.layer, one.hits), []).append(one)
    yield (
        f"{'layer':>5} {'experts':>7} {'unseen':>6} {f'<{below}':>7} {'share':>7} {'fewest':>8} "
        f"{'median':>8}   tensors"
    )
    for (layer, hits), same in rows.items():
        one = same[0]
        names = ", ".join(tensor_kind(other.name) for other in same)
        yield (
            f"{'-' if layer is None else layer:>5} {len(hits):>7} {one.n_unseen:>6} "
            f"{one.n_below:>7} {one.share_below:>7.2%} {one.fewest:>8,} {one.median:>8,}   {names}"
        )
        if with_experts:
            listed = " ".join(f"{expert}:{count:,}" for expert, count in enumerate(hits))
            indent = " " * 6
            yield from textwrap.wrap(
                listed, _COLUMNS, initial_indent=indent, subsequent_indent=indent
            )


def _notes(found: ImatrixStatistics) -> Iterator[str]:
    """What the columns mean, and what the matrix lacks."""
    yield (
        "sum, min, max, mean, sd: of the mean squares of a tensor's inputs, per column and expert; "
        "active: share above 0.00001; N: how many; entropy: bits, and as a share of the most; ZD: "
        "share more than one sd above the mean; cosine: with the block before"
    )
    if found.experts:
        total = sum(len(one.hits) for one in found.experts)
        unseen = sum(one.n_unseen for one in found.experts)
        few = sum(one.n_below for one in found.experts)
        yield (
            f"experts, one per tensor: {unseen:,} of {total:,} never hit (quantized with equal "
            f"weights), {few:,} ({few / total:.1%}) with fewer than {found.below:,} tokens"
        )
    if found.uncounted:
        yield (
            f"tokens per expert are not known for {len(found.uncounted):,} tensors, such as "
            f"{found.uncounted[0]}: a .dat file does not have them"
        )
    if found.empty:
        yield f"no token reached {len(found.empty):,} tensors, such as {found.empty[0]}"


def as_table(found: ImatrixStatistics) -> list[str]:
    """A row per tensor that was hit, with a row of names first; coverage where it is known."""
    hits = {one.name: one for one in found.experts}
    of_hits = ("n_unseen", "n_below", "share_below", "fewest", "median")
    names = [*TensorStatistics.__dataclass_fields__, "n_experts", *of_hits]
    rows: list[list[Any]] = [names]
    for tensor in found.tensors:
        row = list(asdict(tensor).values())
        if (one := hits.get(tensor.name)) is None:
            row += [""] * (1 + len(of_hits))
        else:
            row += [len(one.hits), *(getattr(one, name) for name in of_hits)]
        rows.append(row)
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().splitlines()


def as_values(found: ImatrixStatistics) -> dict[str, Any]:
    """Statistics for programs."""
    return asdict(found)


def sliced_notes(sliced: SlicedImatrix, where: str) -> Iterator[str]:
    """What was cut, and what was left out."""
    if sliced.n_before != sliced.n_after:
        yield f"{where}: {sliced.n_after} of {sliced.n_before} experts per layer are kept"
    elif sliced.n_before is not None:
        yield f"{where}: has the experts of the pruned model already, so none are cut"
    if sliced.left_out:
        yield (
            f"{where}: {len(sliced.left_out):,} entries are left out, such as "
            f"{sliced.left_out[0]}: the model has no such tensor"
        )


def sliced_as_values(sliced: SlicedImatrix) -> dict[str, Any]:
    """A cut matrix for programs."""
    return {
        "entries": len(sliced.imatrix.entries),
        "experts_before": sliced.n_before,
        "experts_after": sliced.n_after,
        "left_out": list(sliced.left_out),
        "coverage": asdict(sliced.coverage),
    }


def merged_notes(merged: MergedImatrix) -> Iterator[str]:
    """What some of the matrices lack."""
    for where, names in merged.lacking:
        yield (
            f"{where}: has no entry for {len(names):,} tensors of the others, such as {names[0]}; "
            "theirs are taken"
        )


def merged_as_values(merged: MergedImatrix) -> dict[str, Any]:
    """A sum of matrices for programs."""
    made = merged.imatrix
    return {
        "entries": len(made.entries),
        "datasets": list(made.datasets),
        "chunks": made.n_chunks,
        "chunk_size": made.chunk_size,
        "lacking": {where: list(names) for where, names in merged.lacking},
    }
