"""Which tokens llama.cpp reads in one call, and what their logits say of the tokens that follow.

Letters: n tokens with logits, V tokens of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Tokens = npt.NDArray[np.int64]
_SLICE_BYTES = 2**22  # of logits at once, so that temporary values stay in a processor's cache


@dataclass(frozen=True)
class Part:
    """Tokens `start` to `stop` of a row, and from which position on logits are wanted."""

    row: int
    start: int
    stop: int
    first: int  # position of the first token whose logits are wanted
    last: int  # position after the last one: what the last token of a row predicts is not scored

    @property
    def n_outputs(self) -> int:
        return max(0, min(self.stop, self.last) - max(self.start, self.first))


@dataclass(frozen=True)
class Limits:
    """Of one call of llama.cpp."""

    tokens: int
    outputs: int  # tokens with logits
    rows: int


def batches(
    lengths: Sequence[int], firsts: Sequence[int], limits: Limits
) -> Iterator[Sequence[Part]]:
    """The parts of rows that each call reads, in the order of the rows.

    Several whole rows share a call where they fit its limits. A row that does not fit is alone in
    several calls, of which each but the first continues from the memory of the one before.
    """
    together: list[Part] = []
    for row, (length, first) in enumerate(zip(lengths, firsts, strict=True)):
        part = Part(row, 0, length, first - 1, length - 1)
        if together and not _fits([*together, part], limits):
            yield together
            together = []
        if _fits([part], limits):
            together.append(part)
        else:
            step = min(limits.tokens, limits.outputs)
            for start in range(0, length, step):
                yield [Part(row, start, min(start + step, length), part.first, part.last)]
    if together:
        yield together


def _fits(parts: Sequence[Part], limits: Limits) -> bool:
    return (
        len(parts) <= limits.rows
        and sum(part.stop - part.start for part in parts) <= limits.tokens
        and sum(part.n_outputs for part in parts) <= limits.outputs
    )


def is_constant(logits: Floats) -> npt.NDArray[np.bool_]:
    """Which rows of logits (n, V) have one value for all tokens, which no model computes."""
    found: npt.NDArray[np.bool_] = (logits == logits[:, :1]).all(axis=1) & (logits.shape[1] > 1)
    return found


def likelihoods(logits: Floats, targets: Tokens) -> tuple[Doubles, Tokens]:
    """Negative log-likelihoods in nats of the targets (n,), and the likeliest tokens (n,).

    Logits are (n, V). Exponentials are of float32 and their sum of float64, as in llama-perplexity.
    A value that is not finite gives a likelihood that is not, and so does one value for all tokens:
    where weights are quantized, llama.cpp makes 0 of a hidden state that is NaN. Of several
    likeliest tokens the lowest number counts. Memory: a few MiB.
    """
    nll, top = np.empty(len(logits)), np.empty(len(logits), dtype=np.int64)
    step = max(1, _SLICE_BYTES // (4 * logits.shape[1]))
    for start in range(0, len(logits), step):
        part, own = logits[start : start + step], slice(start, start + step)
        top[own] = part.argmax(axis=1)
        highest = part.max(axis=1, keepdims=True)
        with np.errstate(invalid="ignore", over="ignore"):  # the caller looks for such values
            total = np.exp(part - highest).sum(axis=1, dtype=np.float64)
            right = np.take_along_axis(part, targets[own, None], axis=1) - highest
            nll[own] = np.log(total) - right[:, 0]
        nll[own][is_constant(part)] = np.nan
    return nll, top
