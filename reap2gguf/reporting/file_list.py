"""The GGUF files: how large and how good each is, and which one to take for how much memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from reap2gguf.messages import size
from reap2gguf.reporting.charts import Legend, figure, legend
from reap2gguf.reporting.html import Html, absent, code, element, paragraph, section
from reap2gguf.reporting.numbers import with_error
from reap2gguf.reporting.plots import Point, points
from reap2gguf.reporting.scales import linear_scale, log_scale
from reap2gguf.reporting.tables import (
    Cell,
    Column,
    byte_size,
    measured,
    missing,
    number,
    table,
    words,
)

if TYPE_CHECKING:
    from reap2gguf.bundle.evaluation import Divergence, Estimate, Evaluation
    from reap2gguf.bundle.manifest import GgufRecord
    from reap2gguf.reporting.facts import ReportFacts

GIB = 2**30
MEMORIES = (2, 4, 6, 8, 12, 16, 24, 32, 48, 64, 80, 96, 128, 192, 256, 384, 512, 768, 1024)
_NOT_EVALUATED = "How good these files are was not measured."
_MORE_SHARE, _MORE_BYTES = 0.1, GIB  # beside the file: context, buffers, the program


def files(facts: ReportFacts) -> Html:
    """The section of the files."""
    return section(
        "files",
        "Files",
        _table(facts),
        None if facts.evaluation is not None else absent(_NOT_EVALUATED),
        _kl_against_size(facts),
        _recommendation(facts),
    )


def from_source(facts: ReportFacts, record: GgufRecord) -> Divergence | None:
    """How far a file is from the source; None if that was not measured."""
    name = facts.variant_of(record)
    if facts.evaluation is None or name is None:
        return None
    return facts.evaluation.divergence(name, "source")


def _table(facts: ReportFacts) -> Html:
    columns = [
        Column("file", is_number=False),
        Column("size"),
        Column("bits per weight"),
        Column("perplexity"),
        Column("KL divergence", note="from the source, nats"),
        Column("same top token", note="as the source, %"),
    ]
    rows = [_row(facts, record) for record in facts.manifest.gguf]
    for side in facts.manifest.side_files:
        name = _named(side.file, side.title)
        rows.append([name, byte_size(side.n_bytes), *[missing("\u2013")] * 4])
    note = "± is one standard error." if facts.evaluation is not None else ""
    return table("GGUF files of this bundle", columns, rows, note)


def _named(file: str, title: str) -> Cell:
    return words(file, [code(file), element("span", title, class_="title")])


def _row(facts: ReportFacts, record: GgufRecord) -> list[Cell]:
    name, evaluation = facts.variant_of(record), facts.evaluation
    variant = None if evaluation is None or name is None else evaluation.variant(name)
    found = from_source(facts, record)
    parts = f" in {len(record.parts)} parts" if len(record.parts) > 1 else ""
    return [
        _named(record.file, record.title),
        byte_size(record.n_bytes, parts),
        number(record.bits_per_weight, f"{record.bits_per_weight:.2f}"),
        measured(None if variant is None else variant.perplexity),
        measured(None if found is None else found.mean),
        measured(None if found is None else found.same_top, 100),
    ]


def needed_bytes(facts: ReportFacts, record: GgufRecord) -> int:
    """Memory that a file needs, with room for context, buffers and the projector."""
    side = sum(one.n_bytes for one in facts.manifest.side_files)
    return round((record.n_bytes + side) * (1 + _MORE_SHARE)) + _MORE_BYTES


def recommended(facts: ReportFacts, memory: int) -> GgufRecord | None:
    """The best file that fits: the closest to the source, or with the most bits; None if none fits.

    Files are compared by divergence if it is known of all. Of those that cannot be told apart
    within the standard error, the smallest is taken.
    """
    fitting = [one for one in facts.manifest.gguf if needed_bytes(facts, one) <= memory]
    means = _means(facts)
    if not fitting or not means:
        return max(fitting, key=lambda one: (one.bits_per_weight, -one.n_bytes), default=None)
    lowest = min((means[one.file] for one in fitting), key=lambda mean: mean.value)
    alike = [one for one in fitting if means[one.file].value <= lowest.value + lowest.error]
    return min(alike, key=lambda one: one.n_bytes)


def _means(facts: ReportFacts) -> dict[str, Estimate]:
    """The mean divergence of every file from the source; empty if one was not measured."""
    found = {one.file: from_source(facts, one) for one in facts.manifest.gguf}
    measured = {name: one.mean for name, one in found.items() if one is not None}
    return measured if len(measured) == len(found) else {}


def by_memory(facts: ReportFacts) -> list[tuple[int, int | None, GgufRecord]]:
    """Spans of memory in GiB (None: and more), each with the file to take."""
    spans: list[tuple[int, int | None, GgufRecord]] = []
    for memory in MEMORIES:
        record = recommended(facts, memory * GIB)
        if record is None:
            continue
        if spans and spans[-1][2] is record:
            spans[-1] = (spans[-1][0], memory, record)
        else:
            spans.append((memory, memory, record))
    if spans:
        spans[-1] = (spans[-1][0], None, spans[-1][2])
    return spans


def _recommendation(facts: ReportFacts) -> Html:
    spans = by_memory(facts)
    if not spans:
        return paragraph(f"No file fits into {MEMORIES[-1]} GiB.")
    rows = [_span_row(facts, *span) for span in spans]
    columns = [
        Column("memory", is_number=False),
        Column("file", is_number=False),
        Column("needs"),
        Column("KL divergence", note="from the source, nats"),
    ]
    best = "the one with the most bits per weight"
    if _means(facts):
        best = "the closest to the source, or the smallest of those that the standard error allows"
    note = (
        f"Of the files that fit, {best}. Memory is that of GPU and computer together. A file needs "
        f"its own size, {_MORE_SHARE:.0%} more, and {size(_MORE_BYTES)} for context and buffers; "
        "long contexts need more."
    )
    return table("Which file for how much memory", columns, rows, note)


def _span_row(facts: ReportFacts, low: int, high: int | None, record: GgufRecord) -> list[Cell]:
    span = f"{low} GiB" if high == low else f"{low} to {high} GiB"
    found = from_source(facts, record)
    return [
        Cell(f"{low} GiB and more" if high is None else span, low),
        words(record.file, code(record.file)),
        byte_size(needed_bytes(facts, record)),
        measured(None if found is None else found.mean),
    ]


def _kl_against_size(facts: ReportFacts) -> Html | None:
    """Each file twice: how far from the source it is, and how far from what was quantized."""
    evaluation = facts.evaluation
    if evaluation is None:
        return None
    found = _points(facts, evaluation)
    if not found:
        return None
    title = "KL divergence against size"
    pruning = evaluation.divergence("pruned", "source") if facts.is_pruned else None
    heights = [one.y for one in found] + ([] if pruning is None else [pruning.mean.value])
    entries = [Legend("both", "from the source"), Legend("quantizing", "from the pruned model")]
    level = None
    if pruning is not None:
        text = f"pruned, not quantized: {with_error(pruning.mean)}"
        level = (pruning.mean.value, text)
        entries.append(Legend("pruning", text))
    return figure(
        "kl-size",
        title,
        legend(entries) if facts.is_pruned else None,
        points(
            title,
            found,
            linear_scale([one.x for one in found]),
            log_scale(heights),
            ("size in GiB" if _unit(_file_sizes(facts)) == GIB else "size in MiB", "nats, mean"),
            level,
        ),
        note="Lower is better. Bars are one standard error.",
    )


def _file_sizes(facts: ReportFacts) -> Sequence[int]:
    return [record.n_bytes for record in facts.manifest.gguf]


def _unit(sizes: Sequence[int]) -> int:
    return GIB if max(sizes) >= GIB else 2**20


def _points(facts: ReportFacts, evaluation: Evaluation) -> list[Point]:
    unit = _unit(_file_sizes(facts))
    found = []
    for record in facts.manifest.gguf:
        name = facts.variant_of(record)
        for reference in ("source", "pruned"):
            divergence = None if name is None else evaluation.divergence(name, reference)
            if divergence is None:
                continue
            is_both = reference == "source" and facts.is_pruned
            whose = "the source" if reference == "source" else "the pruned model"
            tip = (
                f"{record.label}\nfrom {whose}: {with_error(divergence.mean)} nats\n"
                f"{size(record.n_bytes)}, "
                f"{record.bits_per_weight:.2f} bits per weight"
            )
            series = "both" if is_both else "quantizing"
            mean = divergence.mean
            point = Point(record.n_bytes / unit, mean.value, mean.error, series, record.label, tip)
            found.append(point)
    return found
