"""Scores of tasks as a table: a line per task and metric, a column per variant."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from reap2gguf.bundle.evaluation import TaskScore

_SHARES = ("acc", "exact_match", "f1", "em")  # metrics, or their first words, that are from 0 to 1
_WIDTH = 120  # letters: enough for the source and three variants
_GAP = "  "


def task_lines(
    scores: Sequence[TaskScore], *, is_whole: bool = False, width: int = _WIDTH
) -> Iterable[str]:
    """Each variant's score with its standard error, and its difference from the first variant.

    Shares are in percent. Tasks of a group that has a score of its own are left out, such as the 57
    subjects of MMLU, unless `is_whole`. There are several tables where one would be wider than
    `width` letters; each has the first variant.
    """
    if not scores:
        return
    variants = list(dict.fromkeys(one.variant for one in scores))
    listed = scores if is_whole else _without_members(scores)
    names, columns = _names(listed), _columns(listed, variants)
    first, others = columns[0], columns[1:]
    while True:
        n_columns = _fitting([names, first], others, width)
        yield from _side_by_side([names, first, *others[:n_columns]])
        others = others[n_columns:]
        if not others:
            break
        yield ""
    n_hidden = len({one.task for one in scores} - {one.task for one in listed})
    if n_hidden:
        what = "task that is part of a group is" if n_hidden == 1 else "tasks of groups are"
        yield f"{n_hidden} {what} not listed."
    yield _legend(listed, variants[0] if len(variants) > 1 else None)


def _without_members(scores: Sequence[TaskScore]) -> list[TaskScore]:
    """Groups, and tasks for which no group stands."""
    scored = {one.task for one in scores}
    groups = {one.group for one in scores}
    return [one for one in scores if one.task in groups or one.group not in scored]


def _names(scores: Sequence[TaskScore]) -> list[str]:
    """The first column: task, metric and number of questions, below a head."""
    depths = _depths(scores)
    rows = [["task", "metric", "n"]]
    for (task, metric), one in _lines(scores).items():
        rows.append([f"{'  ' * depths[task]}{task}", metric, f"{one.n_items:,}"])
    longest = [max(len(row[column]) for row in rows) for column in range(3)]
    return [
        f"{task:<{longest[0]}}{_GAP}{metric:<{longest[1]}}{_GAP}{n:>{longest[2]}}"
        for task, metric, n in rows
    ]


def _lines(scores: Sequence[TaskScore]) -> dict[tuple[str, str], TaskScore]:
    """Task and metric of each line, with a score of it."""
    found: dict[tuple[str, str], TaskScore] = {}
    for one in scores:
        found.setdefault((one.task, one.metric), one)
    return found


def _columns(scores: Sequence[TaskScore], variants: Sequence[str]) -> list[list[str]]:
    """A column per variant, each below its name and as wide as its longest cell."""
    found = {(one.task, one.metric, one.variant): one for one in scores}
    columns = []
    for name, variant in zip(_short_names(variants), variants, strict=True):
        cells = [name]
        for line in _lines(scores):
            reference = found.get((*line, variants[0])) if variant != variants[0] else None
            cells.append(_cell(found.get((*line, variant)), reference))
        longest = max(map(len, cells))
        columns.append([f"{cell:>{longest}}" for cell in cells])
    return columns


def _fitting(begun: Sequence[list[str]], columns: Sequence[list[str]], width: int) -> int:
    """How many columns fit beside those of a table that is begun; at least one."""
    left = width - sum(len(column[0]) + len(_GAP) for column in begun) + len(_GAP)
    for number, column in enumerate(columns):
        left -= len(column[0]) + len(_GAP)
        if left < 0:
            return max(number, 1)
    return len(columns)


def _side_by_side(columns: Sequence[list[str]]) -> Iterator[str]:
    for cells in zip(*columns, strict=True):
        yield _GAP.join(cells)


def _depths(scores: Sequence[TaskScore]) -> dict[str, int]:
    """How many of the listed groups each task or group is in."""
    groups = {one.task: one.group for one in scores}
    depths: dict[str, int] = {}
    for task in groups:  # groups come before their members
        depths[task] = depths[groups[task]] + 1 if groups[task] in depths else 0
    return depths


def _cell(score: TaskScore | None, reference: TaskScore | None) -> str:
    """Such as `80.89 ± 0.31 -3.45`."""
    if score is None:
        return "-"
    scale, digits = (100, 2) if _is_share(score.metric) else (1, 3)
    value, error = score.score.value * scale, score.score.error * scale
    text = f"{value:.{digits}f} ± {error:.{digits}f}"
    if reference is None:
        return text
    return f"{text} {value - reference.score.value * scale:+{digits + 4}.{digits}f}"


def _is_share(metric: str) -> bool:
    return metric.partition(",")[0].partition("_")[0] in _SHARES or metric in _SHARES


def _short_names(variants: Sequence[str]) -> list[str]:
    """Names without .gguf and without what all files' names begin with."""
    files = [name.removesuffix(".gguf") for name in variants if name.endswith(".gguf")]
    tails = [name.rpartition("-")[2] for name in files]
    if not all(tails) or len(set(tails)) < len(tails):
        tails = files
    short = dict(zip(files, tails, strict=True))
    return [short.get(name.removesuffix(".gguf"), name) for name in variants]


def _legend(scores: Sequence[TaskScore], first: str | None) -> str:
    parts = []
    if any(_is_share(one.metric) for one in scores):
        parts.append("acc and other shares in %")
    parts.append("± is the standard error")
    if first is not None:
        parts.append(f"+ and - are differences from {first}")
    shots = sorted({one.n_shots for one in scores})
    parts.append(" or ".join(f"{one}-shot" for one in shots))
    return "; ".join(parts) + "."
