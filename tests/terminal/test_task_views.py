from __future__ import annotations

from reap2gguf.bundle.evaluation import Estimate, TaskScore
from reap2gguf.terminal.task_views import task_lines
from tests.evaluations import EXAMPLE

FILES = tuple(f"Qwen3-REAP-{name}.gguf" for name in ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q3_K_M"))


def scores_of(*variants: str) -> list[TaskScore]:
    found = []
    for number, variant in enumerate(variants):
        for task, group, n_items, value in (
            ("mmlu", "", 14_042, 0.8434),
            ("mmlu_stem", "mmlu", 3153, 0.8146),
            ("mmlu_anatomy", "mmlu_stem", 135, 0.8),
            ("boolq", "", 250, 0.88),
        ):
            score = Estimate(value - 0.01 * number, 0.0031)
            found.append(TaskScore(task, variant, "acc", score, n_items, group=group))
        found.append(
            TaskScore("wikitext", variant, "word_perplexity", Estimate(9.5 + number, 0.1), 62)
        )
    return found


def test_scores_errors_and_differences_from_the_source() -> None:
    assert list(task_lines(scores_of("source", "pruned", FILES[3]))) == [
        (
            "task         metric                n         source                  pruned"
            "                  Q4_K_M"
        ),
        (
            "mmlu         acc              14,042   84.34 ± 0.31     83.34 ± 0.31  -1.00"
            "     82.34 ± 0.31  -2.00"
        ),
        (
            "  mmlu_stem  acc               3,153   81.46 ± 0.31     80.46 ± 0.31  -1.00"
            "     79.46 ± 0.31  -2.00"
        ),
        (
            "boolq        acc                 250   88.00 ± 0.31     87.00 ± 0.31  -1.00"
            "     86.00 ± 0.31  -2.00"
        ),
        (
            "wikitext     word_perplexity      62  9.500 ± 0.100  10.500 ± 0.100  +1.000"
            "  11.500 ± 0.100  +2.000"
        ),
        "1 task that is part of a group is not listed.",
        (
            "acc and other shares in %; ± is the standard error; + and - are differences from "
            "source; 0-shot."
        ),
    ]


def test_all_tasks_if_asked_for() -> None:
    lines = list(task_lines(scores_of("source"), is_whole=True))
    assert lines[3].startswith("    mmlu_anatomy  acc")
    assert "not listed" not in "".join(lines)
    assert "differences" not in lines[-1]


def test_many_files_are_several_tables_beside_the_source() -> None:
    lines = list(task_lines(scores_of("source", "pruned", *FILES)))
    heads = [line.split()[3:] for line in lines if line.startswith("task ")]
    assert heads == [
        ["source", "pruned", "Q8_0"],
        ["source", "Q6_K", "Q5_K_M"],
        ["source", "Q4_K_M", "Q3_K_M"],
    ]
    assert max(map(len, lines)) <= 120
    assert len(list(task_lines(scores_of("source", "pruned", FILES[0]), width=10))) == 13


def test_a_task_that_was_not_scored_for_all_has_a_gap() -> None:
    scores = [*scores_of("source"), *scores_of("pruned")[3:4]]
    lines = list(task_lines([one for one in scores if one.task in ("mmlu", "boolq")]))
    assert lines[1].endswith(" -")
    assert list(task_lines([])) == []


def test_a_task_of_a_group_without_a_score_is_listed() -> None:
    scores = [one for one in scores_of("source") if one.task != "mmlu_stem"]
    assert any(line.startswith("mmlu_anatomy") for line in task_lines(scores))


def test_the_example() -> None:
    lines = list(task_lines(EXAMPLE.tasks))
    assert lines[1].split()[:2] == ["arc_easy", "acc"]
    assert lines[2].split()[:2] == ["arc_easy", "acc_norm"]
