"""The GGUF files: how large and how good each is, and which one to take for how much memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from reap2gguf.bundle.card_choice import Choice, choices, how_chosen, needed_bytes
from reap2gguf.messages import size
from reap2gguf.reporting.charts import Legend, figure, legend
from reap2gguf.reporting.html import Html, absent, code, element, section
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
    from reap2gguf.bundle.evaluation import Divergence, Evaluation
    from reap2gguf.bundle.manifest import GgufRecord
    from reap2gguf.reporting.facts import ReportFacts

GIB = 2**30
_NOT_EVALUATED = "How good these files are was not measured."


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


def _recommendation(facts: ReportFacts) -> Html:
    rows = [_choice_row(facts, one) for one in choices(facts.manifest)]
    columns = [
        Column("memory", is_number=False),
        Column("file", is_number=False),
        Column("needs"),
        Column("KL divergence", note="from the source, nats"),
    ]
    return table("Which file for how much memory", columns, rows, how_chosen(facts.manifest))


def _choice_row(facts: ReportFacts, choice: Choice) -> list[Cell]:
    record, found = choice.record, from_source(facts, choice.record)
    return [
        Cell(choice.title, choice.memory),
        words(record.file, code(record.file)),
        byte_size(needed_bytes(facts.manifest, record)),
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
    model = facts.words.model
    entries = [Legend("both", "from the source"), Legend("quantizing", f"from the {model} model")]
    level = None
    if pruning is not None:
        text = f"{model}, not quantized: {with_error(pruning.mean)}"
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
            whose = "the source" if reference == "source" else f"the {facts.words.model} model"
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
