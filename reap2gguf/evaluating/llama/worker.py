"""The process that runs a GGUF file for an evaluation; `model.py` starts it.

It loads the file of the first message and answers each later one: likelihoods or logits of rows of
tokens, one speed, one greedy answer. Nothing here may load the package's own libggml: llama_cpp
contains one of the same name and fails if the other was loaded first.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from reap2gguf.evaluating.llama.batches import Floats, Limits, Part, batches, likelihoods
from reap2gguf.evaluating.llama.decoding import Context, LlamaCppError, LoadedModel
from reap2gguf.local.frames import Problem, own_pipes, receive_whole, send
from reap2gguf.machine import peak_bytes

_OUTPUT_BYTES = 2**29  # of logits of one call
_SEED = 0  # of the tokens whose speed is measured


def main() -> None:
    """Load a model and answer messages until there are no more."""
    requests, answers = own_pipes()
    setup = receive_whole(requests)
    if setup is None:
        return
    try:
        import llama_cpp
    except (ImportError, OSError, RuntimeError) as error:
        send(answers, {"problem": str(error), "kind": Problem.IMPORT})
        return
    try:
        model = LoadedModel(llama_cpp, setup["path"], setup["threads"], setup["gpu_layers"])
    except LlamaCppError as error:
        send(answers, {"problem": str(error), "kind": Problem.LOAD})
        return
    loaded = {"n_tokens": model.n_tokens, "context_length": model.context_length}
    send(answers, {**loaded, "on_gpu": model.on_gpu})
    worker = _Worker(model, setup["batch"], setup["ubatch"], answers)
    while (request := receive_whole(requests)) is not None:
        worker.answer(request, requests)


class _Worker:
    """Answers requests with a loaded model."""

    def __init__(self, model: LoadedModel, n_batch: int, n_ubatch: int, answers: IO[bytes]) -> None:
        self._model, self._answers = model, answers
        self._n_batch, self._n_ubatch = n_batch, n_ubatch

    def answer(self, request: Mapping[str, Any], requests: IO[bytes]) -> None:
        """One request, whose tokens may follow in the pipe; `{"peak": bytes}` ends its answers."""
        try:
            if request["do"] in ("logits", "scores"):
                rows = _received_rows(request["lengths"], requests)
                self._rows(request["do"], rows, request["firsts"])
            elif request["do"] == "speed":
                self._speed(**request["test"])
            else:
                self._greedy(request["prompt"], request["most"])
        except LlamaCppError as error:
            send(self._answers, {"problem": str(error), "kind": Problem.LOAD})
        else:
            send(self._answers, {"peak": peak_bytes()})

    def _context(self, n_rows: int, length: int) -> Context:
        n_batch = min(self._n_batch, n_rows * length)
        return Context(self._model, n_rows, length, n_batch, self._n_ubatch)

    def _rows(self, what: str, rows: Sequence[npt.NDArray[np.int32]], firsts: list[int]) -> None:
        """Likelihoods or logits of all scored tokens, call by call."""
        lengths = list(map(len, rows))
        longest = max(lengths)
        n_outputs = max(1, _OUTPUT_BYTES // (4 * self._model.n_tokens))
        n_rows = min(len(rows), max(1, self._n_batch // longest), _most_rows(self._model))
        limits = Limits(min(self._n_batch, n_rows * longest), n_outputs, n_rows)
        write = self._write_logits if what == "logits" else self._write_scores
        with self._context(n_rows, longest) as context:
            for parts in batches(lengths, firsts, limits):
                if parts[0].start == 0:
                    context.clear()
                context.read(parts, [rows[part.row][part.start : part.stop] for part in parts])
                count = sum(part.n_outputs for part in parts)
                targets = np.concatenate([_targets(rows[part.row], part) for part in parts])
                n_read = sum(part.stop - part.start for part in parts)
                send(self._answers, {"count": count, "n_read": n_read})
                if count:
                    write(context.logits(count), targets)

    def _write_logits(self, logits: Floats, targets: npt.NDArray[np.int64]) -> None:
        self._answers.write(logits.data.cast("B"))
        self._answers.flush()

    def _write_scores(self, logits: Floats, targets: npt.NDArray[np.int64]) -> None:
        for one in likelihoods(logits, targets):
            self._answers.write(one.tobytes())
        self._answers.flush()

    def _speed(self, n_prompt: int, n_generated: int, n_rows: int, repetitions: int) -> None:
        """Seconds of each repetition, after one that is not timed."""
        draw = random.Random(_SEED)
        token = lambda: draw.randrange(self._model.n_tokens)  # noqa: E731
        run: Callable[[Context], None]
        if n_prompt:
            run, length = (lambda context: self._prompt(context, n_prompt, token)), n_prompt
        else:
            run = lambda context: self._generate(context, n_generated, n_rows, token)  # noqa: E731
            length = n_generated
        with self._context(n_rows, length) as context:
            for number in range(repetitions + 1):
                context.clear()
                begun = time.perf_counter()
                run(context)
                if number:
                    send(self._answers, {"seconds": time.perf_counter() - begun})

    def _prompt(self, context: Context, length: int, token: Callable[[], int]) -> None:
        for start in range(0, length, self._n_batch):
            stop = min(start + self._n_batch, length)
            part = Part(0, start, stop, stop - 1, stop)
            context.read([part], [[token() for _ in range(start, stop)]])
        context.wait()

    def _generate(
        self, context: Context, length: int, n_rows: int, token: Callable[[], int]
    ) -> None:
        for position in range(length):
            parts = [
                Part(row, position, position + 1, position, position + 1) for row in range(n_rows)
            ]
            context.read(parts, [[token()] for _ in parts])
            context.wait()

    def _greedy(self, prompt: str, most: int) -> None:
        """The likeliest tokens after a prompt, until one ends the answer."""
        tokens = self._model.encode(prompt)
        if not tokens:
            raise LlamaCppError("the prompt has no tokens")
        found: list[int] = []
        with self._context(1, len(tokens) + most) as context:
            for token in self._likeliest(context, tokens):
                found.append(token)
                if len(found) == most or self._model.ends(token):
                    break
        text = self._model.decode_text(found)
        send(self._answers, {"prompt_tokens": tokens, "tokens": found, "text": text})

    def _likeliest(self, context: Context, tokens: list[int]) -> Iterator[int]:
        for start in range(0, len(tokens), self._n_batch):
            stop = min(start + self._n_batch, len(tokens))
            context.read([Part(0, start, stop, stop - 1, stop)], [tokens[start:stop]])
        at = len(tokens)
        while True:
            token = int(context.logits(1)[0].argmax())
            yield token
            context.read([Part(0, at, at + 1, at, at + 1)], [[token]])
            at += 1


def _most_rows(model: LoadedModel) -> int:
    return int(model.library.llama_max_parallel_sequences())


def _targets(row: npt.NDArray[np.int32], part: Part) -> npt.NDArray[np.int64]:
    """The token that follows each one whose logits are wanted."""
    first = max(part.start, part.first)
    return row[first + 1 : first + 1 + part.n_outputs].astype(np.int64)


def _received_rows(lengths: list[int], requests: IO[bytes]) -> list[npt.NDArray[np.int32]]:
    """Rows whose tokens follow a request."""
    data = bytearray()
    n_bytes = 4 * sum(lengths)
    while len(data) < n_bytes:
        piece = requests.read(min(n_bytes - len(data), 2**20))
        if not piece:
            raise SystemExit  # whoever asked has ended
        data += piece
    tokens = np.frombuffer(data, dtype=np.int32)
    return np.split(tokens, np.cumsum(lengths)[:-1])
