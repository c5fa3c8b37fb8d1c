"""Which experts every layer keeps, how high they scored, and how often they are used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from reap2gguf.reporting.charts import Legend, figure, legend
from reap2gguf.reporting.grids import cell_grid, data_block, runs_of, tabs
from reap2gguf.reporting.html import Html, absent, details, element, paragraph, section
from reap2gguf.reporting.numbers import layers as ranges
from reap2gguf.reporting.overview import method
from reap2gguf.reporting.plots import LayerMark, Spread, by_layer, columns
from reap2gguf.reporting.scales import Scale, log_scale
from reap2gguf.reporting.tables import Cell, Column, count, missing, number, table, words

if TYPE_CHECKING:
    from reap2gguf.bundle.manifest import CoverageRecord
    from reap2gguf.bundle.records import MergeRecord, PruningRecord
    from reap2gguf.reporting.facts import Counts, Doubles, ReportFacts

GRID_DATA = "experts-data"
HEATS = 7
_EDGES = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)  # of a score divided by the median of its layer
_HEAT_TITLES = ("< ¼", "¼ to ½", "½ to 1", "1 to 2", "2 to 4", "4 to 8", "≥ 8 times the median")
_DROPPED = (0, 0, 1, 2, 2, 2, 2)  # of dropped experts three looks are told apart
_LEAST_LOAD, _MOST_LOAD = 0.01, 100.0  # of what is drawn, times the even share


def experts(facts: ReportFacts) -> Html:
    """The section of the experts."""
    title, pruning = "Experts", facts.manifest.pruning
    if not facts.is_pruned:
        why = f"Nothing was pruned: every layer keeps its {pruning.n_experts} experts."
        return section("experts", title, paragraph(why), _usage(facts))
    scores = facts.scores()
    return section(
        "experts",
        title,
        _grid(facts, scores),
        None if scores or pruning.merge is not None else absent(_unknown(facts)),
        _kept_share(facts, scores),
        _usage(facts),
        *_tables(facts, scores),
    )


def _tables(facts: ReportFacts, scores: Mapping[int, Doubles]) -> tuple[Html, ...]:
    """How many tokens the experts were judged by, and which ones stay."""
    pruning = facts.manifest.pruning
    if pruning.merge is not None:
        text = "Merged experts of every layer, as a table"
        return (details(text, _group_table(pruning.merge)),)
    return (
        _coverage(pruning.coverage, pruning.n_experts * len(pruning.kept)),
        details("Kept experts of every layer, as a table", _layer_table(facts, scores)),
    )


def _unknown(facts: ReportFacts) -> str:
    return (
        "The observations that ranked the experts are not beside this bundle, so the grid shows "
        f"which experts remain and not how high they scored ({method(facts.manifest)})."
    )


def heat(ratio: float) -> int:
    """The step of the colours for a score divided by the median of its layer."""
    return sum(ratio >= edge for edge in _EDGES)


def _heats(scores: Doubles) -> list[int]:
    median = float(np.median(scores))
    if not median > 0:
        highest = float(scores.max(initial=0.0))
        return [HEATS - 1 if highest > 0 and one > 0 else 0 for one in scores.tolist()]
    return [heat(one / median) for one in scores.tolist()]


def _order(scores: Doubles) -> list[int]:
    """Experts from the highest score to the lowest; with equal scores, the lower number first."""
    return [int(one) for one in np.argsort(-scores, kind="stable")]


def _looks(facts: ReportFacts, scores: Mapping[int, Doubles]) -> dict[int, list[str]]:
    """The class of each expert's cell by layer."""
    pruning, found = facts.manifest.pruning, {}
    for layer, kept in sorted(pruning.kept.items()):
        chosen = set(kept)
        heats = _heats(scores[layer]) if layer in scores else [3] * pruning.n_experts
        found[layer] = [
            f"kept h{step}" if expert in chosen else f"dropped d{_DROPPED[step]}"
            for expert, step in enumerate(heats)
        ]
    return found


def _grid(facts: ReportFacts, scores: Mapping[int, Doubles]) -> Html:
    pruning = facts.manifest.pruning
    looks = _looks(facts, scores)
    gone = _gone(pruning)
    rows, title = list(looks), f"Kept and {gone} experts by layer"
    grids = [
        (
            "by number",
            cell_grid(title, rows, pruning.n_experts, runs_of(list(looks.values())), GRID_DATA),
        )
    ]
    if scores:
        ranked = [[looks[layer][one] for one in _order(scores[layer])] for layer in rows]
        grids.append(
            (
                "by score, highest first",
                cell_grid(
                    f"{title}, highest score first",
                    rows,
                    pruning.n_experts,
                    runs_of(ranked),
                    GRID_DATA,
                    cut=pruning.n_kept,
                    order="score",
                    unit="rank of the expert in its layer",
                ),
            )
        )
    return figure(
        "grid",
        title,
        _grid_legend(bool(scores), gone),
        tabs("order", grids),
        data_block(GRID_DATA, _grid_data(facts, scores)),
        note=f"{pruning.n_kept} of {pruning.n_experts} remain in each of {len(rows)} layers.",
    )


def _gone(pruning: PruningRecord) -> str:
    """What the experts are that do not stay."""
    return "dropped" if pruning.merge is None else "merged"


def _grid_legend(has_scores: bool, gone: str) -> Html:
    steps = range(HEATS) if has_scores else [3]
    swatches = [
        element("li", _swatch(f"kept h{step}"), _kept_title(step, has_scores)) for step in steps
    ]
    dropped = element("li", _swatch("dropped d2"), gone)
    return element("ul", swatches, dropped, class_="legend swatches")


def _kept_title(step: int, has_scores: bool) -> str:
    if not has_scores:
        return "kept"
    return f"kept, score {_HEAT_TITLES[0]}" if not step else _HEAT_TITLES[step]


def _swatch(look: str) -> Html:
    line = element("path", d="M0 .5h1", class_=look)
    shape = {"class_": "cells", "viewBox": "0 0 1 1", "preserveAspectRatio": "none"}
    return element("svg", line, **shape, width=16, height=12, aria_hidden="true")


def _grid_data(facts: ReportFacts, scores: Mapping[int, Doubles]) -> dict[str, Any]:
    """What the tooltips say of each cell."""
    pruning = facts.manifest.pruning
    rows, before, after = sorted(pruning.kept), facts.used_before(), facts.used_after
    kept = [set(pruning.kept[layer]) for layer in rows]
    values: dict[str, Any] = {
        "layers": rows,
        "kept": ["".join("01"[e in one] for e in range(pruning.n_experts)) for one in kept],
        "method": method(facts.manifest),
        "act": facts.words.act,
    }
    if pruning.merge is not None:
        values["into"] = [_into(pruning.merge, layer) for layer in rows]
    if scores:
        values["scores"] = [[float(f"{s:.4g}") for s in scores[layer].tolist()] for layer in rows]
        values["order"] = [_order(scores[layer]) for layer in rows]
    if before:
        values["before"] = [before[layer].tolist() for layer in rows]
    if after:
        values["after"] = [after[layer].tolist() if layer in after else None for layer in rows]
    return values


def _into(merge: MergeRecord, layer: int) -> list[int] | None:
    """By expert, the one that it was merged into; itself if it stays. None: none was merged."""
    if layer not in merge.layers:
        return None
    groups = merge.layers[layer].groups
    found = {expert: group[0] for group in groups for expert in group}
    return [found[expert] for expert in sorted(found)]


def _share(scores: Doubles, kept: Sequence[int]) -> float:
    highest = float(scores.max(initial=0.0))
    if not highest > 0:
        return 0.0
    scaled = scores / highest  # no sum of them overflows
    return float(scaled[list(kept)].sum() / scaled.sum())


def _kept_share(facts: ReportFacts, scores: Mapping[int, Doubles]) -> Html | None:
    if not scores:
        return None
    title = "Share of the scores that the kept experts have"
    kept = facts.manifest.pruning.kept
    found = [(layer, 100 * _share(one, kept[layer])) for layer, one in scores.items()]
    marks = [
        (layer, share, f"Layer {layer}\n{share:.2f} % of the scores stay") for layer, share in found
    ]
    lowest = min(share for _, share in found)
    mean = sum(share for _, share in found) / len(found)
    return figure(
        "kept-share",
        title,
        columns(title, marks, Scale(0, 100), "%"),
        note=f"On average over layers {mean:.2f} %; in the layer that loses most {lowest:.2f} %.",
    )


def _usage(facts: ReportFacts) -> Html:
    """How evenly tokens were spread over the experts, before pruning and after."""
    before, after = facts.used_before(), facts.used_after
    if not before and not after:
        return absent(
            "How often each expert is used is not known: neither the observations nor the "
            "importance matrix are beside this bundle."
        )
    title = "Use of the experts"
    act = facts.words.act
    series = [("source", before, f"before {act}"), ("quantizing", after, f"after {act}")]
    if not facts.is_pruned:
        series = [("quantizing", after or before, "all experts")]
    known = [one for one in series if one[1]]
    layers = sorted({layer for _, counts, _ in known for layer in counts})
    marks = [_usage_mark(layer, known) for layer in layers]
    missing_one = [name for _, counts, name in series if not counts]
    note = (
        "Tokens of an expert divided by the even share of its layer. A line goes from the least to "
        "the most used expert, a box holds the middle half. Before: calibration rows. After: the "
        "text of the importance matrix."
    )
    if missing_one:
        note += f" The use {missing_one[0]} is not known."
    return figure(
        "usage",
        title,
        legend([Legend(name, shown) for name, _, shown in known]),
        by_layer(title, marks, _load_scale(marks), "times the even share"),
        details("Use of the experts, as a table", _usage_table(known, layers)),
        note=note,
    )


def _load_scale(marks: Sequence[LayerMark]) -> Scale:
    """Around all loads; what is beyond a hundredth or a hundred times is drawn at the edge."""
    spreads = [spread for one in marks for _, spread in one.spreads]
    loads = [max(one.low, _LEAST_LOAD) for one in spreads]
    return log_scale([*loads, *(min(one.high, _MOST_LOAD) for one in spreads)])


Series = Sequence[tuple[str, Mapping[int, "Counts"], str]]


def _spread(counts: Counts) -> Spread:
    """How the loads of a layer are spread: tokens divided by the even share."""
    total = int(counts.sum())
    loads = counts * (len(counts) / total) if total else np.zeros(len(counts))
    low, quarter, median, three, high = np.quantile(loads, [0, 0.25, 0.5, 0.75, 1]).tolist()
    return Spread(low, quarter, median, three, high)


def _usage_mark(layer: int, known: Series) -> LayerMark:
    spreads, lines = [], [f"Layer {layer}"]
    for name, counts, shown in known:
        if layer not in counts:
            continue
        spread = _spread(counts[layer])
        spreads.append((name, spread))
        lines.append(
            f"{shown}: least {spread.low:.2f}, median {spread.median:.2f}, most {spread.high:.2f}"
        )
    return LayerMark(layer, spreads, "\n".join(lines))


def _usage_table(known: Series, layers: Sequence[int]) -> Html:
    heads = [Column("layer")]
    for _, _, shown in known:
        heads += [Column(f"{what}, {shown}") for what in ("unused", "least", "median", "most")]
    rows = []
    for layer in layers:
        row = [count(layer)]
        for _, counts, _ in known:
            if layer not in counts:
                row += [missing("not known")] * 4
                continue
            spread = _spread(counts[layer])
            row.append(count(int((counts[layer] == 0).sum())))
            values = (spread.low, spread.median, spread.high)
            row += [number(value, f"{value:.2f}") for value in values]
        rows.append(row)
    return table("Tokens per expert, times the even share", heads, rows)


def _coverage(found: CoverageRecord | None, n_experts: int) -> Html:
    if found is None:
        return absent("How many tokens the experts were judged by is not recorded.")
    text = (
        f"The experts were judged by a median of {found.median:,} tokens each; the fewest were "
        f"{found.fewest:,}."
    )
    for what, total, kept in (
        ("were never seen", found.n_unseen, found.n_unseen_kept),
        (f"had under {found.thin_below:,} tokens", found.n_thin, found.n_thin_kept),
    ):
        if total:
            text += f" {total:,} of {n_experts:,} {what}, {kept:,} of these remain."
    return paragraph(text)


def _group_table(merge: MergeRecord) -> Html:
    """A row per expert that others were merged into, with the share of each in the average."""
    heads = [
        Column("layer"),
        Column("stays"),
        Column("experts that became it, with their shares", is_number=False),
    ]
    rows: list[list[Cell]] = [
        [count(layer), count(group[0]), words(_members(group, shares))]
        for layer, one in sorted(merge.layers.items())
        for group, shares in zip(one.groups, one.shares, strict=True)
        if len(group) > 1
    ]
    return table("Merged experts, by their numbers in the source", heads, rows)


def _members(group: Sequence[int], shares: Sequence[float]) -> str:
    pairs = zip(group, shares, strict=True)
    return ", ".join(f"{expert} ({100 * share:.0f} %)" for expert, share in pairs)


def _layer_table(facts: ReportFacts, scores: Mapping[int, Doubles]) -> Html:
    pruning = facts.manifest.pruning
    heads = [
        Column("layer"),
        Column("kept"),
        Column("share of the scores", note="%"),
        Column("kept experts, by their number in the source", is_number=False),
    ]
    rows: list[list[Cell]] = []
    for layer, kept in sorted(pruning.kept.items()):
        share = 100 * _share(scores[layer], kept) if layer in scores else None
        rows.append(
            [
                count(layer),
                count(len(kept)),
                missing("not known") if share is None else number(share, f"{share:.2f}"),
                words(ranges(sorted(kept))),
            ]
        )
    return table("Kept experts", heads, rows)
