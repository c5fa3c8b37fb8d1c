from __future__ import annotations

from dataclasses import replace

import pytest

from reap2gguf.bundle.evaluation import Estimate, Evaluation, TaskScore
from reap2gguf.bundle.evaluation_update import updated
from tests.evaluations import EXAMPLE, Q4, Q8

NOTHING = Evaluation("llama.cpp", None, device="cuda", dtype="bfloat16")


def scores(task: str, *variants: str, score: float = 0.5, n: int = 250) -> list[TaskScore]:
    return [TaskScore(task, one, "acc", Estimate(score, 0.1), n) for one in variants]


def test_tasks_alone_keep_the_text() -> None:
    tasks = scores("rte", "source", "pruned", Q8, Q4)
    found = updated(EXAMPLE, replace(NOTHING, tasks=tasks, made_with={"lm_eval": "0.4"}))
    assert (found.engine, found.device, found.dtype) == ("streamed", "cpu", "float32")
    assert (found.text, found.variants) == (EXAMPLE.text, EXAMPLE.variants)
    assert (found.comparisons, found.speeds) == (EXAMPLE.comparisons, EXAMPLE.speeds)
    assert set(found.tasks) == {*EXAMPLE.tasks, *tasks}
    assert [one.variant for one in found.tasks] == [
        name for name in ("source", "pruned", Q8, Q4) for _ in range(3)
    ]
    assert found.made_with == {**EXAMPLE.made_with, "lm_eval": "0.4"}


def test_a_task_that_is_asked_again_is_replaced() -> None:
    again = scores("arc_easy", "pruned", Q8, Q4, score=0.9)
    found = updated(EXAMPLE, replace(NOTHING, tasks=again))
    assert found.scores("source") == EXAMPLE.scores("source")  # as many questions
    assert found.scores(Q8) == [again[1]]
    fewer = scores("arc_easy", "pruned", Q8, Q4, n=10)
    found = updated(EXAMPLE, replace(NOTHING, tasks=fewer))
    assert list(found.tasks) == fewer


def test_a_text_alone_keeps_tasks_and_speeds() -> None:
    assert EXAMPLE.text is not None
    variants = [replace(one, perplexity=Estimate(20, 1)) for one in EXAMPLE.variants]
    newer = replace(
        EXAMPLE, text=replace(EXAMPLE.text, label="other"), variants=variants,
        tasks=(), speeds=(), smoke_tests=(), device="cuda", dtype="bfloat16",
    )  # fmt: skip
    found = updated(EXAMPLE, newer)
    assert (found.text, found.variants, found.dtype) == (newer.text, newer.variants, "bfloat16")
    assert (found.tasks, found.speeds) == (EXAMPLE.tasks, EXAMPLE.speeds)
    assert found.smoke_tests == EXAMPLE.smoke_tests


@pytest.mark.parametrize("is_same", [True, False])
def test_a_variant_that_is_not_there_keeps_figures_of_the_same_text(is_same: bool) -> None:
    """A bundle on a machine without its source is measured again."""
    own = [one for one in EXAMPLE.comparisons if one.reference == "pruned"]
    variants = [replace(one, perplexity=Estimate(20, 1)) for one in EXAMPLE.variants[1:]]
    newer = replace(EXAMPLE, variants=variants, comparisons=own)
    if not is_same:
        newer = replace(newer, dtype="bfloat16")
    found = updated(EXAMPLE, newer)
    if is_same:
        assert found.variants == (EXAMPLE.variants[0], *variants)
        assert found.divergence("pruned", "source") == EXAMPLE.divergence("pruned", "source")
        assert len(found.comparisons) == len(EXAMPLE.comparisons)
    else:
        assert (found.variants, found.comparisons) == (newer.variants, newer.comparisons)


def test_speeds_and_answers_are_of_files() -> None:
    speed = replace(EXAMPLE.speeds[0], variant=Q8)
    again = replace(EXAMPLE.speeds[0], n_threads=9)
    found = updated(EXAMPLE, replace(NOTHING, speeds=[speed]))
    assert found.speeds == (*EXAMPLE.speeds, speed)
    assert updated(found, replace(NOTHING, speeds=[again])).speeds == (speed, again)
    answer = replace(EXAMPLE.smoke_tests[0], question="Who?")
    found = updated(EXAMPLE, replace(NOTHING, smoke_tests=[answer]))
    assert found.smoke_tests == (EXAMPLE.smoke_tests[1], answer)


def test_nothing_earlier_but_a_speed() -> None:
    earlier = replace(NOTHING, speeds=EXAMPLE.speeds)
    found = updated(earlier, replace(EXAMPLE, speeds=()))
    assert found == EXAMPLE
