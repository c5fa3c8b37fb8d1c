"""Likelihoods and logits that llama.cpp computes for rows of tokens.

With rows of 512 tokens whose second halves are scored (`first` is 257), several rows are read in
one call, as llama-perplexity does with its default options, and so the figures are its own
(https://github.com/ggml-org/llama.cpp/tree/master/tools/perplexity). Rows begin with the BOS token
where the file asks for it: whoever cuts the text puts it there.

Letters: S scored tokens of all rows together, n of a chunk, V tokens of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from reap2gguf.errors import ArtifactError, UsageError
from reap2gguf.evaluating.llama.batches import is_constant
from reap2gguf.evaluating.llama.model import LlamaModel, LlamaOptions
from reap2gguf.evaluating.scores import VariantScores

if TYPE_CHECKING:
    from reap2gguf.evaluating.llama.batches import Floats
    from reap2gguf.evaluating.scores import ScoredRow
    from reap2gguf.progress import Progress


def llama_scores(
    path: Path, rows: Sequence[ScoredRow], options: LlamaOptions, progress: Progress
) -> VariantScores:
    """What llama.cpp gives the scored tokens of all rows, in their order: arrays (S,).

    Raises ArtifactError if the file is broken, of another model than the tokens, or computes values
    that are not finite; UsageError for rows or options that llama.cpp does not take; and
    DependencyError if llama-cpp-python does not load. Memory of the process of llama.cpp, besides
    the model and the cache of `options.batch` tokens: at most 512 MiB of logits (or those of one
    token), and `options.ubatch` x V x 4 bytes to compute them in; here 16 bytes per scored token.
    """
    scored = _scored(rows)
    n_scored = sum(row.n_scored for row in scored)
    nll, top = np.empty(n_scored), np.empty(n_scored, dtype=np.int64)
    n_tokens, at = sum(len(row.tokens) for row in scored), 0
    with LlamaModel(path, options) as model:
        tokens = _checked(model, scored)
        with progress.task(f"llama.cpp: {path.name}", n_tokens, "tokens") as task:
            for answer in model.answers(_request("scores", scored), tokens.data):
                span = slice(at, at + answer["count"])
                model.read_into(nll[span].data)
                model.read_into(top[span].data)
                if not np.isfinite(nll[span]).all():
                    raise _not_finite(path)
                at += answer["count"]
                task.advance(answer["n_read"])
    return VariantScores(nll, top)


class LlamaLogits:
    """The logits of all scored tokens, in the order of the rows, computed as they are taken.

    The contract, for whoever takes them in place of those of a streamed variant:

    - `read(n)` gives the next n scored tokens as float32 (n, V), fewer only at the end of all rows,
      and (0, V) after it. Row i of it is what llama.cpp predicts from all tokens before the scored
      one. Iterating gives the same in chunks of one call of llama.cpp; the two may be mixed.
    - V is `n_tokens`, the vocabulary of the file, with the padding that the checkpoint has.
    - Tokens come first and the whole vocabulary of each: `HeadSums.add` takes all of `read(n)` as
      one block from token 0 on, beside the logits (n, V) of the streamed variants.
    - An array is the caller's own: it stays as it is, and may be changed.
    - Values are as llama.cpp computes them; those that are not finite, or the same for all tokens,
      raise ArtifactError.
    - llama.cpp computes ahead by one call and then waits until its logits are taken. Memory here:
      the chunk that is asked for; there: see `llama_scores`.
    - Use it as a context manager, or `close` it, which ends the process at any point.

    The logits of a token are read once: open another to read them again.
    """

    def __init__(self, path: Path, rows: Sequence[ScoredRow], options: LlamaOptions) -> None:
        """Load the file and start. Raises as `llama_scores` does."""
        scored = _scored(rows)
        self.path = path
        self._left = 0  # tokens of the current call that are not read yet
        self._to_come = sum(row.n_scored for row in scored)  # these included
        self._model = LlamaModel(path, options)
        try:
            tokens = _checked(self._model, scored)
            self._answers = self._model.answers(_request("logits", scored), tokens.data)
        except BaseException:
            self.close()
            raise
        self.n_tokens = self._model.n_tokens

    def __enter__(self) -> LlamaLogits:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the process, whatever it does."""
        self._model.close()

    def read(self, count: int) -> Floats:
        """The logits of the next `count` scored tokens; see the class.

        Raises ArtifactError if llama.cpp fails or ends, or if a value is not finite.
        """
        count = min(count, self._to_come)
        found = np.empty((count, self.n_tokens), dtype=np.float32)
        at = 0
        while at < count:
            self._next_call()
            n = min(count - at, self._left)
            self._model.read_into(found[at : at + n].data)
            self._left -= n
            self._to_come -= n
            at += n
        if not np.isfinite(found).all() or is_constant(found).any():
            raise _not_finite(self.path)
        return found

    def __iter__(self) -> Iterator[Floats]:
        while self._to_come:
            self._next_call()
            yield self.read(self._left)

    def _next_call(self) -> None:
        """Wait for another call if all of the last one is read."""
        while not self._left:
            self._left = next(self._answers)["count"]


def llama_logits(path: Path, rows: Sequence[ScoredRow], options: LlamaOptions) -> LlamaLogits:
    """The logits that llama.cpp computes for the scored tokens, as a stream; see `LlamaLogits`.

    Raises as `llama_scores` does.
    """
    return LlamaLogits(path, rows, options)


def _request(what: str, rows: Sequence[ScoredRow]) -> dict[str, object]:
    return {
        "do": what,
        "lengths": [len(row.tokens) for row in rows],
        "firsts": [row.first for row in rows],
    }


def _scored(rows: Sequence[ScoredRow]) -> list[ScoredRow]:
    """The rows that have scored tokens: no other row changes what is found."""
    for number, row in enumerate(rows):
        if not 1 <= row.first <= len(row.tokens):
            raise UsageError(
                f"row {number} has {len(row.tokens):,} tokens, scored from {row.first:,} on; "
                "expected a first scored token from 1 to their number"
            )
    scored = [row for row in rows if row.n_scored]
    if not scored:
        raise UsageError("there are no tokens to score; pass a longer text")
    return scored


def _checked(model: LlamaModel, rows: Sequence[ScoredRow]) -> npt.NDArray[np.int32]:
    """All tokens, one row after the other, as llama.cpp takes them."""
    longest = max(len(row.tokens) for row in rows)
    if longest > model.context_length:
        raise UsageError(
            f"a row has {longest:,} tokens, but the context of {model.path} is "
            f"{model.context_length:,}; cut the text into shorter chunks"
        )
    tokens = np.concatenate([row.tokens for row in rows])
    wrong = tokens[(tokens < 0) | (tokens >= model.n_tokens)]
    if len(wrong):
        raise ArtifactError(
            f"{model.path}: its vocabulary has {model.n_tokens:,} tokens, but the text has token "
            f"{wrong[0]:,}; it is the file of another model"
        )
    return tokens.astype(np.int32)


def _not_finite(path: Path) -> ArtifactError:
    return ArtifactError(
        f"{path}: llama.cpp computes logits that are not finite, or the same for all "
        "tokens; check the file with `reap2gguf verify`"
    )
