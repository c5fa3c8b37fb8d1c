"""A choice in lines of text: the candidates in a table, and why one was taken."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from reap2gguf.choosing.rule import RULE, RULE_ALONE, is_as_good

if TYPE_CHECKING:
    from reap2gguf.bundle.choice import CandidateRecord, ChoiceRecord, ChoiceText, Figures

_NONE = "-"


def choice_lines(found: ChoiceRecord, seconds: Mapping[str, float] | None = None) -> Iterator[str]:
    """All of a choice. `seconds` by candidate: what it takes beyond the observation."""
    yield from table_lines(found, seconds or {})
    yield f"chosen: {found.chosen}"
    yield f"rule: {RULE_ALONE if found.other is None else RULE}"


def table_lines(found: ChoiceRecord, seconds: Mapping[str, float]) -> Iterator[str]:
    """A row per candidate, from the lowest divergence on the held-out rows to the highest."""
    yield text_line(found.held_out)
    if found.other is not None:
        yield text_line(found.other)
    heads = ["candidate", "KL held-out", "perplexity"]
    if found.other is not None:
        heads += ["KL other", "perplexity"]
    seconds = {one.name: seconds[one.name] for one in found.candidates if one.name in seconds}
    if seconds:
        heads.append("cost")
    rows = [heads, *(_row(found, one, seconds) for one in ranked(found))]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [
            cell.rjust(width) if number else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield ("  " + "  ".join(cells)).rstrip()


def ranked(found: ChoiceRecord) -> Sequence[CandidateRecord]:
    """The candidates, best first on the held-out rows."""
    return sorted(found.candidates, key=lambda one: one.held_out.divergence.value)


def text_line(text: ChoiceText) -> str:
    """A text, how much of it was scored, and the perplexity of the source."""
    return (
        f"{text.label}: {text.n_rows:,} rows, {text.n_scored:,} tokens scored; perplexity of the "
        f"source {text.perplexity.value:.3f} ± {text.perplexity.error:.3f}"
    )


def _row(found: ChoiceRecord, one: CandidateRecord, seconds: Mapping[str, float]) -> list[str]:
    cells = [name_of(found, one), *cells_of(one.held_out)]
    if one.other is not None:
        cells += cells_of(one.other)
        if not is_as_good(one.other):
            cells[-2] += " !"
    if seconds:
        cells.append(f"{seconds[one.name]:.1f} s" if one.name in seconds else _NONE)
    return cells


def name_of(found: ChoiceRecord, one: CandidateRecord) -> str:
    """A candidate, marked if it was chosen, and whose experts it keeps if others keep the same."""
    same = "" if one.same_as is None else f" (as {one.same_as})"
    return f"{'*' if one.name == found.chosen else ' '} {one.name}{same}"


def cells_of(figures: Figures) -> list[str]:
    """Mean KL divergence and perplexity, each with its standard error."""
    apart, found = figures.divergence, figures.perplexity
    return [f"{apart.value:.4f} ± {apart.error:.4f}", f"{found.value:.3f} ± {found.error:.3f}"]
