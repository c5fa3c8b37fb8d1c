"""Observations as text of at most 80 columns, and as JSON."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from reap2gguf.artifacts.observed_sums import IMATRIX
from reap2gguf.checkpoint.safetensors_header import read_metadata
from reap2gguf.pruning.coverage import observed_notes
from reap2gguf.terminal import inspect_views

if TYPE_CHECKING:
    from pathlib import Path

    from reap2gguf.artifacts.observations import Observations
    from reap2gguf.pruning.inspection import ObservationsInspection

_COLUMNS = 80
_MOST_LAYERS = 12  # whose unseen experts are listed
_MOST_IDS = 16  # of one layer
_OLD = (
    "made by an earlier version: criteria with squares, and --protect-super-experts, need new "
    "observations"
)


def as_lines(found: ObservationsInspection, title: str) -> Iterator[str]:
    """An inspection for people; `title` names what was inspected."""
    for line in _lines(found, title):
        # rows of tables are never longer, unless more ratios were asked for than fit
        yield from [line] if line.startswith(" ") else textwrap.wrap(line, _COLUMNS) or [""]


def _lines(found: ObservationsInspection, title: str) -> Iterator[str]:
    seen = found.observations
    yield f"{title}: {seen.n_rows:,} rows, {seen.n_tokens:,} tokens of {seen.calibration}"
    if seen.n_dropped_rows:
        yield f"{seen.n_dropped_rows:,} rows were skipped: their values were not finite"
    if seen.made_with:
        yield f"made with {', '.join(f'{name} {n}' for name, n in seen.made_with.items())}"
    yield from merge_notes(seen)
    yield ""
    yield f"tokens per expert, and the share of the scores ({found.method}) that stays if these"
    yield "experts are removed"
    yield ""
    shares = "".join(f" {f'{100 * ratio:g}%':>7}" for ratio in found.ratios)
    yield f"{'layer':>6} {'unseen':>6} {'fewest':>8} {'median':>8} {'most':>9}{shares}"
    for layer in found.layers:
        one = layer.coverage
        tokens = f"{one.fewest:>8,} {one.median:>8,} {one.most:>9,}"
        yield f"{layer.layer:>6} {one.n_unseen:>6,} {tokens}{_shares(layer.shares)}"
    yield f"{'lowest':>6} {'':>6} {'':>8} {'':>8} {'':>9}{_shares(found.lowest)}"
    every = found.coverage
    tokens = f"{every.fewest:>8,} {every.median:>8,} {every.most:>9,}"
    yield f"{'all':>6} {every.n_unseen:>6,} {tokens}{_shares(found.means)}"
    yield ""
    yield from _unseen_lines(seen)
    yield from observed_notes(seen)


def _shares(shares: Sequence[float]) -> str:
    return "".join(f" {100 * share:>6.1f}%" for share in shares)


def _unseen_lines(seen: Observations) -> Iterator[str]:
    """Which experts no token reached, of the first layers that have some."""
    unseen = {layer: ids for layer, ids in unseen_experts(seen).items() if ids}
    for layer, ids in list(unseen.items())[:_MOST_LAYERS]:
        more = f" and {len(ids) - _MOST_IDS:,} more" if len(ids) > _MOST_IDS else ""
        named = ", ".join(map(str, ids[:_MOST_IDS]))
        yield f"layer {layer}: never seen: {'experts' if len(ids) > 1 else 'expert'} {named}{more}"
    if len(unseen) > _MOST_LAYERS:
        yield f"{len(unseen) - _MOST_LAYERS:,} layers more have such experts; --json lists them all"


def unseen_experts(seen: Observations) -> Mapping[int, list[int]]:
    """By layer, the experts that no token reached."""
    return {
        layer: [int(one) for one in np.flatnonzero(found.count == 0)]
        for layer, found in sorted(seen.layers.items())
    }


def merge_notes(seen: Observations, files: Sequence[Path] = ()) -> list[str]:
    """What to tell of observations that lack something, which some of `files` may have."""
    notes = [] if all(one.is_complete for one in seen.layers.values()) else [_OLD]
    if seen.imatrix is None and files:
        lacking = [file for file in files if IMATRIX not in read_metadata(file)]
        if len(lacking) < len(files):
            notes.append(
                f"{lacking[0]}: has no sums of an importance matrix, so the merged file has none"
            )
    return notes


def about(seen: Observations) -> dict[str, Any]:
    """What a file of observations says of itself, for programs."""
    return {
        "calibration": seen.calibration,
        "calibration_sha256": seen.calibration_sha256,
        "model_fingerprint": seen.model_fingerprint,
        "n_rows": seen.n_rows,
        "n_tokens": seen.n_tokens,
        "n_dropped_rows": seen.n_dropped_rows,
        "n_layers": len(seen.layers),
        "is_complete": all(one.is_complete for one in seen.layers.values()),
        "has_imatrix": seen.imatrix is not None,
        "made_with": dict(seen.made_with),
    }


def as_values(found: ObservationsInspection) -> dict[str, Any]:
    """An inspection for programs: that of `inspect`, and the experts that no token reached."""
    unseen = unseen_experts(found.observations)
    values = inspect_views.as_values(found) | about(found.observations)
    layers = [{**one, "unseen": unseen[one["layer"]]} for one in values["layers"]]
    return {**values, "layers": layers}
