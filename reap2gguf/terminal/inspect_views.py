"""Inspections as text of at most 80 columns, as comma-separated values, and as JSON."""

from __future__ import annotations

import csv
import io
import sys
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from reap2gguf.bundle.manifest import NO_METHOD
from reap2gguf.bundle.markdown import ranges
from reap2gguf.gguf_files.imatrix_statistics import ImatrixInspection
from reap2gguf.gguf_source.inspection import GgufInspection
from reap2gguf.messages import one_line, quantity, size
from reap2gguf.pruning.coverage import observed_notes
from reap2gguf.pruning.inspection import BundleInspection, ObservationsInspection
from reap2gguf.pruning.methods import GIVEN, merges, method_name

if TYPE_CHECKING:
    from reap2gguf.bundle.records import MergeRecord

Inspection = ObservationsInspection | BundleInspection | ImatrixInspection | GgufInspection
_COLUMNS = 80
_SHORTEST_BAR, _LONGEST_BAR = 6, 30
_BLOCKS = " \u258f\u258e\u258d\u258c\u258b\u258a\u2589\u2588"  # eighths of a letter


def as_lines(found: Inspection, title: str) -> Iterable[str]:
    """An inspection for people; `title` names what was inspected."""
    if isinstance(found, ObservationsInspection):
        lines = _observations_lines(found, title)
    elif isinstance(found, BundleInspection):
        lines = _bundle_lines(found)
    elif isinstance(found, GgufInspection):
        lines = _gguf_lines(found)
    else:
        lines = _imatrix_lines(found, title)
    for line in lines:
        # rows of tables are never longer, unless more ratios were asked for than fit
        yield from [line] if line.startswith(" ") else textwrap.wrap(line, _COLUMNS) or [""]


def _observations_lines(found: ObservationsInspection, title: str) -> Iterator[str]:
    seen = found.observations
    yield f"{title}: {seen.n_rows:,} rows, {seen.n_tokens:,} tokens of {seen.calibration}"
    if seen.made_with:
        yield f"made with {', '.join(f'{name} {n}' for name, n in seen.made_with.items())}"
    yield ""
    yield f"share of the scores ({found.method}) that stays if these experts are removed"
    yield ""
    heads = [f"{100 * ratio:g}%" for ratio in found.ratios]
    lead = f"{'layer':>6} {'unseen':>6} {'fewest':>7} {'median':>7}"
    numbers = "".join(f" {head:>7}" for head in heads)
    width = _bar_width(len(lead + numbers))
    yield f"{lead}{numbers}{f'  stays at {heads[-1]}' if width else ''}"[: _most(width)]
    for layer in found.layers:
        one = layer.coverage
        left = f"{layer.layer:>6} {one.n_unseen:>6,} {one.fewest:>7,} {one.median:>7,}"
        yield f"{left}{_shares(layer.shares)}{_bar(layer.shares[-1], width)}".rstrip()
    every = found.coverage
    left = f"{'lowest':>6} {'':>6} {'':>7} {'':>7}"
    yield f"{left}{_shares(found.lowest)}{_bar(found.lowest[-1], width)}".rstrip()
    left = f"{'mean':>6} {every.n_unseen:>6,} {every.fewest:>7,} {every.median:>7,}"
    yield f"{left}{_shares(found.means)}{_bar(found.means[-1], width)}".rstrip()
    yield ""
    yield from observed_notes(seen)
    total = found.layers[0].coverage.n_experts
    for enough in found.enough:
        yield (
            f"{enough.share:.0%} of the scores stay with {enough.n_kept} of {total} experts per "
            f"layer or more (ratio {enough.ratio:.3g})"
        )


def _most(width: int) -> int | None:
    return _COLUMNS if width else None


def _shares(shares: Sequence[float]) -> str:
    return "".join(f" {100 * share:>6.1f}%" for share in shares)


def _gguf_lines(found: GgufInspection) -> Iterator[str]:
    parts = f", {found.n_parts} parts" if found.n_parts > 1 else ""
    yield one_line(f"{found.file}: {found.name or 'no name'}, {found.architecture}{parts}")
    yield (
        f"{size(found.n_bytes)}, {quantity(found.n_parameters, 'parameters')}, "
        f"{found.bits_per_weight:.2f} bits per weight"
    )
    yield (
        f"{found.n_experts} experts in each of {found.n_moe_layers} layers, "
        f"{found.experts_per_token} active per token"
    )
    if found.kept and found.source_experts is not None:
        of = f"{found.n_experts} of {found.source_experts} experts of {found.source}"
        if found.method is not None and merges(found.method):
            by = f"has {of}: the others were merged into them by {method_name(found.method)}"
            yield one_line(by)
        else:
            yield one_line(f"keeps {of}, chosen by {found.method}")
    yield ""
    yield f"{'type':>8} {'tensors':>8} {'size':>12}"
    for one in found.types:
        yield f"{one.type:>8} {one.n_tensors:>8,} {size(one.n_bytes):>12}"


def _bundle_lines(found: BundleInspection) -> Iterator[str]:
    pruning, source = found.manifest.pruning, found.manifest.source
    yield f"{found.manifest.name}: made of {source.label}"
    if pruning.method == NO_METHOD:
        yield f"keeps all {pruning.n_experts} experts of each of {len(found.layers)} layers"
        return
    has = f"{pruning.n_kept} of {pruning.n_experts} experts in each of {len(found.layers)} layers"
    if pruning.merge is not None:
        yield from _merge_lines(pruning.merge, has)
        return
    by = f"ranked by {pruning.method}" if pruning.method != GIVEN else "named in a list"
    if pruning.repair is not None:
        by += f", and repaired ({pruning.repair.kind})"
    yield f"keeps {has}, {by}"
    yield f"calibration: {pruning.n_rows:,} rows, {pruning.n_tokens:,} tokens"
    if found.observations is None:
        if pruning.coverage is not None:
            one = pruning.coverage
            yield (
                f"experts: fewest tokens {one.fewest:,}, median {one.median:,}; never seen: "
                f"{one.n_unseen:,} ({one.n_unseen_kept:,} kept); under {one.thin_below} tokens: "
                f"{one.n_thin:,} ({one.n_thin_kept:,} kept)"
            )
        yield (
            "the observations are no longer in .work/observations beside the bundle, so the share "
            "of the scores that stays is not known"
        )
        return
    yield ""
    lead = f"{'layer':>6} {'kept':>6} {'unseen kept':>12} {'scores':>7}"
    width = _bar_width(len(lead))
    yield lead
    for layer in found.layers:
        share = layer.share or 0.0
        left = f"{layer.layer:>6} {layer.n_kept:>6} {layer.n_unseen_kept:>12}"
        yield f"{left} {100 * share:>6.1f}%{_bar(share, width)}".rstrip()
    n_unseen = sum(layer.n_unseen_kept or 0 for layer in found.layers)
    mean = found.mean or 0.0
    yield f"{'mean':>6} {pruning.n_kept:>6} {n_unseen:>12} {100 * mean:>6.1f}%{_bar(mean, width)}"
    yield ""
    yield f"scores: share of the sum of scores ({found.method}) that the kept experts have"


def _merge_lines(merge: MergeRecord, has: str) -> Iterator[str]:
    """Which experts became one, layer by layer: the one that stays, and those merged into it."""
    yield f"has {has}: the others were merged into them by {method_name(merge.method)}"
    yield f"calibration: {merge.n_rows:,} rows, {merge.n_tokens:,} tokens"
    yield ""
    yield f"{'layer':>6}  experts that became one, by their numbers in the source"
    for layer, one in sorted(merge.layers.items()):
        groups = (group for group in one.groups if len(group) > 1)
        text = "; ".join(f"{group[0]} <- {ranges(group[1:])}" for group in groups) or "none"
        first, *more = textwrap.wrap(text, _COLUMNS - 8)
        yield f"{layer:>6}  {first}"
        yield from (f"{'':8}{line}" for line in more)


def _imatrix_lines(found: ImatrixInspection, title: str) -> Iterator[str]:
    size = f" of {found.chunk_size:,} tokens" if found.chunk_size else ""
    yield f"{title}: {found.n_chunks:,} chunks{size} of {found.dataset or 'an unnamed text'}"
    yield ""
    width = max(len("tensors"), *(len(group.name) for group in found.groups))
    width = min(width, _COLUMNS - 49)
    yield (
        f"{'tensors':<{width}} {'blocks':>6} {'unseen':>7} {'fewest':>8} {'median':>8} "
        f"{'mean sq':>9} {'active':>6}"
    )
    for group in found.groups:
        yield (
            f"{group.name[:width]:<{width}} {group.n_entries:>6} {group.n_unseen:>7,} "
            f"{group.fewest:>8,} {group.median:>8,} {group.mean_square:>9.3g} {group.active:>6.1%}"
        )
    yield ""
    yield "fewest, median: tokens per matrix; mean sq: mean square of the inputs"
    if found.n_experts:
        yield (
            f"experts that no token reached: {found.n_unseen_experts:,} of {found.n_experts:,}, in "
            "all layers together"
        )


def _bar_width(n_letters: int) -> int:
    """Letters for a bar beside a row of `n_letters`; none where the terminal's line is full."""
    left = _COLUMNS - n_letters - 2
    return 0 if left < _SHORTEST_BAR else min(left, _LONGEST_BAR)


def _bar(share: float, width: int) -> str:
    """A bar of at most `width` letters, in `#` where the terminal cannot print blocks."""
    if not width:
        return ""
    if not can_print(_BLOCKS):
        return f"  {'#' * round(share * width)}"
    eighths = round(share * width * 8)
    return f"  {_BLOCKS[-1] * (eighths // 8)}{_BLOCKS[eighths % 8]}".rstrip()


def can_print(text: str) -> bool:
    """Whether stdout has these letters."""
    try:
        text.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return False
    return True


def as_table(found: Inspection) -> Iterable[str]:
    """An inspection as comma-separated values, with a row of names first."""
    if isinstance(found, ObservationsInspection):
        names = [f"kept_at_{ratio:g}" for ratio in found.ratios]
        rows = [[one.layer, *asdict(one.coverage).values(), *one.shares] for one in found.layers]
        head = ["layer", *asdict(found.coverage), *names]
    elif isinstance(found, BundleInspection):
        rows = [list(asdict(one).values()) for one in found.layers]
        head = ["layer", "n_experts", "n_kept", "share", "n_unseen_kept"]
    elif isinstance(found, GgufInspection):
        rows = [list(asdict(one).values()) for one in found.types]
        head = ["type", "n_tensors", "n_bytes"]
    else:
        rows = [list(asdict(one).values()) for one in found.groups]
        head = list(asdict(found.groups[0]))
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([head, *rows])
    return text.getvalue().splitlines()


def as_values(found: Inspection) -> dict[str, Any]:
    """An inspection for programs."""
    if isinstance(found, ImatrixInspection):
        return {"kind": "imatrix", **asdict(found)}
    if isinstance(found, GgufInspection):
        return {"kind": "gguf", **asdict(found), "bits_per_weight": found.bits_per_weight}
    if isinstance(found, BundleInspection):
        pruning = found.manifest.pruning
        return {
            "kind": "bundle",
            "name": found.manifest.name,
            "source": found.manifest.source.label,
            "method": found.method,
            "n_experts": pruning.n_experts,
            "n_kept": pruning.n_kept,
            "coverage": None if pruning.coverage is None else asdict(pruning.coverage),
            "has_observations": found.observations is not None,
            "mean_share": found.mean,
            "layers": [
                {**asdict(one), "kept": list(pruning.kept[one.layer])} for one in found.layers
            ],
            "repair": None if pruning.repair is None else asdict(pruning.repair),
            "merge": None if pruning.merge is None else asdict(pruning.merge),
        }
    seen = found.observations
    return {
        "kind": "observations",
        "calibration": seen.calibration,
        "n_rows": seen.n_rows,
        "n_tokens": seen.n_tokens,
        "made_with": dict(seen.made_with),
        "method": found.method,
        "ratios": list(found.ratios),
        "coverage": asdict(found.coverage),
        "mean_shares": list(found.means),
        "lowest_shares": list(found.lowest),
        "enough": [asdict(one) for one in found.enough],
        "layers": [
            {"layer": one.layer, **asdict(one.coverage), "shares": list(one.shares)}
            for one in found.layers
        ],
    }
