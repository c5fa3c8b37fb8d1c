from __future__ import annotations

from dataclasses import replace

import pytest

from reap2gguf.bundle.evaluation import Estimate, Evaluation, TaskScore
from reap2gguf.bundle.evaluation_update import outdated_groups, updated
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


GROUPED = ("source", "pruned")


def grouped(
    task: str, group: str = "", definition: str = "a", score: float = 0.5, n: int = 250
) -> list[TaskScore]:
    found = scores(task, *GROUPED, score=score, n=n)
    return [replace(one, group=group, definition=definition) for one in found]


def kept_of(*newer: list[TaskScore]) -> dict[str, tuple[str, str, float]]:
    """A group in a group and two tasks, and what an update makes of them."""
    earlier = [
        *grouped("all", n=500), *grouped("half", "all"), *grouped("one", "half"),
        *grouped("two", "all"),
    ]  # fmt: skip
    before = Evaluation("streamed", None, tasks=earlier)
    found = updated(before, replace(NOTHING, tasks=[one for ones in newer for one in ones]))
    told = {one.task: (one.group, one.definition, one.score.value) for one in found.tasks}
    assert len(found.tasks) == len(GROUPED) * len(told), "of all variants, or of none"
    gone = sorted({one.task for one in earlier} - told.keys())
    assert outdated_groups(before, found) == gone
    return told


def test_the_score_of_a_group_goes_where_a_task_of_it_is_another_one() -> None:
    found = kept_of(grouped("one", definition="b", score=0.9))
    assert found == {"one": ("", "b", 0.9), "two": ("", "a", 0.5)}
    found = kept_of(grouped("two", n=10))
    assert found == {"two": ("", "a", 0.5), "half": ("", "a", 0.5), "one": ("half", "a", 0.5)}


def test_a_task_that_is_the_same_stays_in_its_group() -> None:
    found = kept_of(grouped("one", score=0.6))
    assert found["one"] == ("half", "a", 0.6)
    assert found["all"] == ("", "a", 0.5)
    assert found["half"] == ("all", "a", 0.5)


def test_a_group_that_is_asked_again_says_itself_what_it_holds() -> None:
    found = kept_of(grouped("all", definition="b"), grouped("two", "all", "b", 0.9))
    assert found == {
        "all": ("", "b", 0.5), "two": ("all", "b", 0.9), "half": ("", "a", 0.5),
        "one": ("half", "a", 0.5),
    }  # fmt: skip


def test_a_variant_keeps_no_score_of_another_definition() -> None:
    again = [one for one in grouped("one", definition="b") if one.variant == "pruned"]
    before = Evaluation("streamed", None, tasks=grouped("one"))
    assert list(updated(before, replace(NOTHING, tasks=again)).tasks) == again
    same = [replace(one, definition="a") for one in again]
    found = updated(before, replace(NOTHING, tasks=same)).tasks
    assert [one.variant for one in found] == ["source", "pruned"]
