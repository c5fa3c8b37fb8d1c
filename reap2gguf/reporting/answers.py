"""Tasks with the change from the source, and how quickly llama.cpp runs the files."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from reap2gguf.messages import size
from reap2gguf.reporting.charts import Dot, DotRow, Legend, dot_rows, figure, legend
from reap2gguf.reporting.html import Html, absent, section
from reap2gguf.reporting.numbers import difference, with_error
from reap2gguf.reporting.scales import linear_scale
from reap2gguf.reporting.tables import (
    Cell,
    Column,
    byte_size,
    count,
    measured,
    missing,
    table,
    words,
)

if TYPE_CHECKING:
    from reap2gguf.bundle.evaluation import Evaluation, Speed, TaskScore
    from reap2gguf.reporting.facts import ReportFacts

_SHOTS = {0: "zero-shot"}
_FIRST_LOOKS = ("source", "pruning")
_FILE_LOOKS = ("quantizing", "file-2", "file-3", "file-4", "file-5")  # then from the first again


def tasks(facts: ReportFacts) -> Html:
    """The section of tasks."""
    evaluation = facts.evaluation
    if evaluation is None or not evaluation.tasks:
        return section("tasks", "Tasks", absent("No tasks were run on this bundle."))
    variants = list(dict.fromkeys(one.variant for one in evaluation.tasks))
    kinds = list(dict.fromkeys((one.task, one.metric) for one in evaluation.tasks))
    scores = {(one.task, one.metric, one.variant): one for one in evaluation.tasks}
    looks = _looks(variants)
    title = "Scores of the tasks"
    rows = [
        DotRow(
            f"{task}, {metric}",
            [
                _dot(facts, scores[task, metric, variant], looks[variant])
                for variant in variants
                if (task, metric, variant) in scores
            ],
            is_joined=True,
        )
        for task, metric in kinds
    ]
    values = [100 * one.score.value for one in evaluation.tasks]
    errors = [100 * one.score.error for one in evaluation.tasks]
    edges = [v + s * e for v, e in zip(values, errors, strict=True) for s in (-1, 1)]
    return section(
        "tasks",
        "Tasks",
        figure(
            "scores",
            title,
            legend([Legend(looks[v], facts.label(v)) for v in variants]),
            dot_rows(title, rows, linear_scale(edges), "%"),
            note="Bars are one standard error. From top to bottom in the order of the names.",
        ),
        _score_table(facts, kinds, variants, scores),
    )


def _looks(variants: Sequence[str]) -> dict[str, str]:
    """The class that colours each variant."""
    looks = {"source": _FIRST_LOOKS[0], "pruned": _FIRST_LOOKS[1]}
    files = [one for one in variants if one not in looks]
    return looks | {one: _FILE_LOOKS[n % len(_FILE_LOOKS)] for n, one in enumerate(files)}


def _dot(facts: ReportFacts, one: TaskScore, series: str) -> Dot:
    tip = (
        f"{facts.label(one.variant)}\n{one.task}, {one.metric}: "
        f"{with_error(one.score, 100, ' %')}\n"
        f"{one.n_items:,} items, {_shots(one.n_shots)}"
    )
    return Dot(100 * one.score.value, 100 * one.score.error, series, tip)


def _shots(count_: int) -> str:
    return _SHOTS.get(count_, f"{count_}-shot")


def _score_table(
    facts: ReportFacts,
    kinds: Sequence[tuple[str, str]],
    variants: Sequence[str],
    scores: dict[tuple[str, str, str], TaskScore],
) -> Html:
    """One row per task and metric: the first variant's score, and every other's with its change."""
    columns = [Column("task", is_number=False), Column("metric", is_number=False), Column("items")]
    columns += [Column(facts.label(one), note="%") for one in variants]
    base = variants[0]
    columns += [
        Column(f"{facts.label(one)} \u2212 {facts.label(base)}", note="points")
        for one in variants[1:]
    ]
    rows = []
    for task, metric in kinds:
        found = [scores.get((task, metric, variant)) for variant in variants]
        some = next(one for one in found if one is not None)
        row = [
            words(_task(task, some)),
            words(metric),
            count(some.n_items),
        ]
        row += [measured(None if one is None else one.score, 100) for one in found]
        row += [_change(one, found[0]) for one in found[1:]]
        rows.append(row)
    note = (
        "± is one standard error. That of a change takes both scores as independent; they are of "
        "the same items, so it is too large rather than too small."
    )
    return table("Scores and changes", columns, rows, note)


def _task(name: str, one: TaskScore) -> str:
    return f"{name} ({_shots(one.n_shots)})" if one.n_shots else name


def _change(one: TaskScore | None, base: TaskScore | None) -> Cell:
    if one is None or base is None:
        return missing()
    return measured(difference(one.score, base.score), 100, plus=True)


def speeds(facts: ReportFacts) -> Html:
    """The section of speeds."""
    evaluation = facts.evaluation
    if evaluation is None or not evaluation.speeds:
        why = "How quickly the files run was not measured."
        return section("speed", "Speed", absent(why))
    return section(
        "speed", "Speed", _speed_chart(facts, evaluation), _speed_table(facts, evaluation)
    )


def _speed_chart(facts: ReportFacts, evaluation: Evaluation) -> list[Html]:
    """One chart per test: tokens per second of a prompt and of generation differ by far."""
    found: list[Html] = []
    for test in dict.fromkeys(one.test for one in evaluation.speeds):
        some = [one for one in evaluation.speeds if one.test == test]
        title = f"{_test(test)}, in tokens per second"
        rows = [
            DotRow(
                facts.label(one.variant),
                [_speed_dot(facts, one)],
                with_error(one.tokens_per_second),
                has_stem=True,
            )
            for one in some
        ]
        scale = linear_scale([one.tokens_per_second.value for one in some], from_zero=True)
        found.append(figure(f"speed-{len(found)}", title, dot_rows(title, rows, scale, "tokens/s")))
    return found


def _speed_dot(facts: ReportFacts, one: Speed) -> Dot:
    rate = one.tokens_per_second
    tip = (
        f"{facts.label(one.variant)}\n{_test(one.test)}: {with_error(rate)} tokens per second\n"
        f"{_where(one)}; peak {size(one.peak_bytes)}"
    )
    return Dot(rate.value, rate.error, "quantizing", tip)


def _test(name: str) -> str:
    """`pp512` and `tg128` in words; another name as it is."""
    number = name[2:]
    if name[:2] == "pp" and number.isdigit():
        return f"A prompt of {number} tokens ({name})"
    if name[:2] == "tg" and number.isdigit():
        return f"{number} tokens, one by one ({name})"
    return name


def _where(one: Speed) -> str:
    return "GPU" if one.on_gpu else f"CPU, {one.n_threads} threads"


def _speed_table(facts: ReportFacts, evaluation: Evaluation) -> Html:
    columns = [
        Column("file", is_number=False),
        Column("test", is_number=False),
        Column("tokens per second"),
        Column("on", is_number=False),
        Column("peak memory", note="of the process"),
    ]
    rows = [
        [
            words(facts.label(one.variant)),
            words(one.test),
            measured(one.tokens_per_second),
            words(_where(one)),
            byte_size(one.peak_bytes),
        ]
        for one in evaluation.speeds
    ]
    note = "Measured by llama.cpp, on the machine that evaluated the bundle."
    return table("Speed of the files", columns, rows, note)
