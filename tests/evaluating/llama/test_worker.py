"""What the process of llama.cpp reads, written down by a context that computes nothing."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import pytest

from reap2gguf.evaluating.llama import worker as worker_module
from reap2gguf.evaluating.llama.batches import Part
from reap2gguf.evaluating.llama.worker import _Worker
from reap2gguf.local.frames import receive

VOCAB = 50


class Vocabulary:
    n_tokens = VOCAB


class Recorder:
    """In the place of a context."""

    made: list[Recorder]

    def __init__(self, model: Any, n_rows: int, length: int, n_batch: int, n_ubatch: int) -> None:
        self.sizes = (n_rows, length, n_batch, n_ubatch)
        self.runs: list[list[list[tuple[int, int, int]]]] = []  # calls of each run
        self.n_waits = 0
        Recorder.made.append(self)

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def clear(self) -> None:
        self.runs.append([])

    def read(self, parts: Sequence[Part], tokens: Sequence[Sequence[int]]) -> None:
        for part, own in zip(parts, tokens, strict=True):
            assert len(own) == part.stop - part.start
            assert all(0 <= token < VOCAB for token in own)
        self.runs[-1].append([(part.row, part.start, part.stop) for part in parts])

    def wait(self) -> None:
        self.n_waits += 1


def speed(monkeypatch: pytest.MonkeyPatch, **test: int) -> tuple[Recorder, list[dict[str, Any]]]:
    Recorder.made = []
    monkeypatch.setattr(worker_module, "Context", Recorder)
    pipe = io.BytesIO()
    worker: Any = _Worker(Vocabulary(), 512, 128, pipe)  # type: ignore[arg-type]
    worker.answer({"do": "speed", "test": {**test, "repetitions": 2}}, io.BytesIO())
    pipe.seek(0)
    answers = []
    while (answer := receive(pipe)) is not None:
        answers.append(answer)
    (context,) = Recorder.made
    return context, answers


def test_a_prompt_is_read_in_batches_after_a_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    context, answers = speed(monkeypatch, n_prompt=700, n_generated=0, n_rows=1)
    assert context.sizes == (1, 700, 512, 128)
    assert context.runs == [[[(0, 0, 512)], [(0, 512, 700)]]] * 3
    assert context.n_waits == 3, "a run ends when all is computed"
    assert [set(answer) for answer in answers] == [{"seconds"}, {"seconds"}, {"peak"}]


def test_sequences_are_continued_together(monkeypatch: pytest.MonkeyPatch) -> None:
    context, answers = speed(monkeypatch, n_prompt=0, n_generated=5, n_rows=3)
    assert context.sizes == (3, 5, 15, 128)
    assert context.runs == [[[(row, at, at + 1) for row in range(3)] for at in range(5)]] * 3
    assert context.n_waits == 15, "a token is there before the next one is read"
    assert len(answers) == 3
