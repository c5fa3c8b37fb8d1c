"""Variants of another program beside streamed ones: here the program is the engine itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from reap2gguf.errors import EvaluationError
from reap2gguf.evaluating import outside as outside_module
from reap2gguf.evaluating.engine import evaluate_variants
from reap2gguf.evaluating.outside import Step
from reap2gguf.evaluating.scores import Pair, ScoredRow, Scores, VariantScores, joined
from reap2gguf.progress import Silent
from tests.evaluating.test_engine import CPU, Case, opened

PAIRS: list[Pair] = [("source", "pruned"), ("source", "Q8_0"), ("pruned", "Q8_0")]
NAMES = ("source", "pruned")


class Read:
    """Logits that are there already."""

    def __init__(self, logits: npt.NDArray[np.float32]) -> None:
        self._logits, self._at = logits, 0
        self.n_tokens = logits.shape[1]

    def read(self, count: int) -> npt.NDArray[np.float32]:
        self._at += count
        return self._logits[self._at - count : self._at].copy()


@dataclass
class Program:
    """A program that has the log-probabilities of each row, by its tokens."""

    case: Case
    logits_of: dict[bytes, npt.NDArray[np.float32]]
    scores_of: dict[bytes, VariantScores]
    name: str = "Q8_0"

    @contextmanager
    def logits(self, rows: Sequence[ScoredRow]) -> Iterator[Read]:
        assert all(row.is_compared and not row.instead for row in rows)
        yield Read(np.concatenate([self.logits_of[row.tokens.tobytes()] for row in rows]))

    def scores(self, rows: Sequence[ScoredRow]) -> VariantScores:
        assert not any(row.instead for row in rows)
        found = [self.scores_of[row.tokens.tobytes()] for row in rows]
        nll, top = [one.nll for one in found], [one.top for one in found]
        return VariantScores(np.concatenate(nll), np.concatenate(top))


def rows_of(case: Case) -> list[ScoredRow]:
    """Rows that are compared, and a question with four answers that is not, among them."""
    question = np.arange(11)
    answers = [ScoredRow(np.append(question, token), 11, is_compared=False) for token in range(4)]
    return [*case.rows[:3], *joined(answers), *case.rows[3:]]


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    with opened("qwen3", tmp_path_factory.mktemp("outside")) as found:
        yield found


@pytest.fixture(scope="module")
def program(case: Case) -> Program:
    logits = case.logits()["Q8_0"]
    by_row = {
        row.tokens.tobytes(): one.float().numpy()
        for row, one in zip(case.rows, logits, strict=True)
    }
    apart = [one for row in rows_of(case) for one in row.apart()]
    variants = [one for one in case.variants if one.name == "Q8_0"]
    scores = evaluate_variants(variants, apart, [], CPU, Silent())
    found = {
        row.tokens.tobytes(): scores.part(number, number + 1).variants["Q8_0"]
        for number, row in enumerate(apart)
    }
    return Program(case, by_row, found)


def streamed(case: Case) -> Scores:
    variants = [one for one in case.variants if one.name in (*NAMES, "Q8_0")]
    return evaluate_variants(variants, rows_of(case), PAIRS, CPU, Silent())


def beside(case: Case, program: Any, pairs: Sequence[Pair] = PAIRS) -> Scores:
    variants = [one for one in case.variants if one.name in NAMES]
    return evaluate_variants(variants, rows_of(case), pairs, CPU, Silent(), outside=[program])


@pytest.mark.parametrize("step", [None, Step(3, 100), Step(1000, 37)])
def test_it_is_as_if_it_were_streamed(
    case: Case, program: Program, step: Step | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if step is not None:
        monkeypatch.setattr(outside_module.Step, "into", lambda *_: step)
    found, expected = beside(case, program), streamed(case)
    assert list(found.variants) == list(expected.variants)
    for name, one in expected.variants.items():
        np.testing.assert_allclose(found.variants[name].nll, one.nll, atol=1e-4)
        assert (found.variants[name].top == one.top).all()
    for pair in PAIRS:
        assert np.isnan(found.divergences[pair]).sum() == 4
        np.testing.assert_allclose(
            found.divergences[pair], expected.divergences[pair], atol=1e-4, equal_nan=True
        )
    assert np.nanmean(found.divergences["source", "Q8_0"]) > 1e-4


def test_without_pairs_no_logits_are_read(case: Case, program: Program) -> None:
    silent = Program(case, {}, program.scores_of)
    found = beside(case, silent, [])
    np.testing.assert_allclose(
        found.variants["Q8_0"].nll, streamed(case).variants["Q8_0"].nll, atol=1e-4
    )


def test_another_vocabulary_is_refused(case: Case, program: Program) -> None:
    fewer = {row: one[:, :100] for row, one in program.logits_of.items()}
    with pytest.raises(EvaluationError, match="Q8_0: it has 100 tokens, but the model has"):
        beside(case, Program(case, fewer, program.scores_of))


def test_a_step_keeps_to_its_memory() -> None:
    vocabulary, row_bytes, n_logits = 248_320, 2 * 2048 * 4, 6
    for usable in (2**31, 2**33, 2**36):
        step = Step.into(usable, vocabulary, row_bytes, n_logits)
        blocks = 1 if step.block == vocabulary else 2
        held = blocks * step.block * row_bytes + 4 * vocabulary * n_logits * step.tokens
        assert held <= usable
        assert 4 * vocabulary * n_logits * step.tokens <= 2**31
    assert Step.into(2**36, vocabulary, row_bytes, n_logits).block == vocabulary
    assert Step.into(2**20, vocabulary, row_bytes, n_logits) == Step(16, 256)
