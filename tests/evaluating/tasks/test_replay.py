from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from reap2gguf.bundle.evaluation import TaskScore
from reap2gguf.errors import EvaluationError
from reap2gguf.evaluating.scores import ScoredRow, Scores, VariantScores
from reap2gguf.evaluating.tasks.encoding import Encoded
from reap2gguf.evaluating.tasks.replay import answers_of
from reap2gguf.evaluating.tasks.run import run_tasks
from reap2gguf.evaluating.tasks.spec import TaskSpec
from reap2gguf.progress import CallbackProgress, ProgressEvent
from tests.evaluating.tasks.task_folders import (
    TEXTS,
    choice,
    hash_scores,
    questions,
    write_data,
    write_task,
)
from tests.tiny import EXAMPLE

ROWS = [ScoredRow(np.array([1, 2, 3]), 1), ScoredRow(np.array([1, 2, 4]), 2)]


def scores_of(nll: Sequence[float], top: Sequence[int]) -> Scores:
    return Scores(ROWS, {"source": VariantScores(np.array(nll), np.array(top))})


def test_an_answer_is_a_sum_and_greedy_if_all_its_tokens_are() -> None:
    found = answers_of(Encoded(ROWS), scores_of([0.5, 1.0, 2.0], [2, 3, 3]), "source")
    assert found == [(-1.5, True), (-2.0, False)]


@pytest.mark.parametrize(
    ("nll", "words"),
    [
        ([0.5, 1.0], "source: 2 scored tokens, expected 3"),
        ([0.5, math.nan, 1.0], "source: log-likelihoods of tasks are not finite"),
        ([0.5, math.inf, 1.0], "use --dtype float32"),
    ],
)
def test_scores_that_cannot_be(nll: list[float], words: str) -> None:
    with pytest.raises(EvaluationError, match=words):
        answers_of(Encoded(ROWS), scores_of(nll, [0] * len(nll)), "source")


def run(folder: Path, *names: str, score: Any = hash_scores) -> tuple[list[TaskScore], list[str]]:
    events: list[ProgressEvent] = []
    spec = TaskSpec(names, folder=folder)
    found = run_tasks(spec, EXAMPLE, score, ["source"], CallbackProgress(events.append))
    return found, [event.text for event in events if event.kind == "note"]


def write_rolling(folder: Path, name: str, texts: Sequence[str]) -> None:
    data = write_data(folder / "data", name, [{"text": text} for text in texts])
    rolling = {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "text"}
    write_task(folder, name, data, **rolling, metric_list=[{"metric": "bits_per_byte"}])


def test_perplexities_have_errors_which_lm_eval_does_not_give(tmp_path: Path) -> None:
    """The error of a quotient of sums, by the delta method, is what repeated draws come to."""
    texts = [f"{number}. {TEXTS[0]} " * (number + 1) for number in range(40)]
    write_rolling(tmp_path, "rolling", texts)
    seen: list[Scores] = []

    def score(rows: Sequence[ScoredRow]) -> Scores:
        seen.append(hash_scores(rows))
        return seen[-1]

    ((one,), _) = run(tmp_path, "rolling", score=score)
    (scores,) = seen
    # every text is one row, of distinct lengths: bytes are found by the text itself
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(EXAMPLE)
    texts_of = [tokenizer.decode(row.tokens[row.first :]) for row in scores.rows]
    assert sorted(texts_of) == sorted(set(texts))
    nll = np.array([scores.variants["source"].nll[span].sum() for span in scores.spans()])
    n_bytes = np.array([len(text.encode()) for text in texts_of])
    ratio = nll.sum() / n_bytes.sum()
    residuals = nll - ratio * n_bytes
    error = residuals.std(ddof=1) / math.sqrt(len(nll)) / n_bytes.mean()
    assert one.metric == "bits_per_byte"
    assert one.score.value == pytest.approx(ratio / math.log(2), rel=1e-9)
    assert one.score.error == pytest.approx(error / math.log(2), rel=0.25)


def test_a_group_of_perplexities_has_an_error_too(tmp_path: Path) -> None:
    for number, name in enumerate(("one", "two")):
        write_rolling(tmp_path, name, TEXTS[number:])
    metrics = '[{"metric": "bits_per_byte", "weight_by_size": false}]'
    text = f'{{"group": "pair", "task": ["one", "two"], "aggregate_metric_list": {metrics}}}'
    (tmp_path / "pair.yaml").write_text(text)
    found = {one.task: one for one in run(tmp_path, "pair")[0]}
    first, second = found["one"].score, found["two"].score
    assert found["pair"].score.value == pytest.approx((first.value + second.value) / 2)
    assert found["pair"].score.error == pytest.approx(math.hypot(first.error, second.error) / 2)
    assert first.error > 0


def test_one_question_has_no_error_and_that_is_said(tmp_path: Path) -> None:
    data = write_data(tmp_path / "data", "questions", questions(1))
    write_task(tmp_path, "single", data, **choice("acc"))
    ((one,), notes) = run(tmp_path, "single")
    assert (one.score.error, one.n_items) == (0.0, 1)
    assert "single: one question has no standard error; it is given as 0" in notes


@pytest.mark.slow
def test_errors_by_draws_and_filters_of_answers(tmp_path: Path) -> None:
    """f1 has no formula for its error; a filter with a name is part of the metric's."""
    data = write_data(tmp_path / "data", "questions", questions(40))
    f1 = {"metric": "f1", "aggregation": "f1", "higher_is_better": True}
    values = {**choice("acc"), "doc_to_choice": ["yes", "no"]}
    filters = [{"name": "first", "filter": [{"function": "take_first"}]}]
    write_task(tmp_path, "drawn", data, **{**values, "metric_list": [f1]}, filter_list=filters)
    ((one,), _) = run(tmp_path, "drawn")
    assert one.metric == "f1,first"
    assert 0 < one.score.error < 0.5


def test_a_score_that_overflows_is_refused(tmp_path: Path) -> None:
    write_rolling(tmp_path, "rolling", TEXTS)
    path = tmp_path / "rolling.yaml"
    path.write_text(path.read_text().replace("bits_per_byte", "word_perplexity"))

    def score(rows: Sequence[ScoredRow]) -> Scores:
        found = hash_scores(rows)
        one = found.variants["source"]
        return replace(found, variants={"source": replace(one, nll=one.nll * 1e6)})

    with pytest.raises(EvaluationError, match=r"lm-eval fails on the answers \(OverflowError"):
        run(tmp_path, "rolling", score=score)
