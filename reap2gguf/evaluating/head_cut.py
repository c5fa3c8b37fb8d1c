"""How much of the vocabulary and of the text the heads compute together, and the memory of that.

Nothing here loads torch: `plan` estimates memory with the same numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

_MOST_TOKENS = {"cpu": 256, "cuda": 4096}  # on a CPU, what stays in its caches
_MOST_BLOCK = {"cpu": 8192, "cuda": 2**20}  # tokens of the vocabulary
_LEAST_BLOCK = 256
_LEAST_TOKENS = 16
SPAN = 4  # positions that are loaded at once, in multiples of the tokens computed together
_PARTS = 4  # parts whose hidden states are there, beside those that wait for a thread
_FLOAT = 4  # bytes of a logit


@dataclass(frozen=True)
class HeadShape:
    """Heads of some variants, of which several may share one."""

    vocabulary: int
    row_bytes: int  # of a head for one token of the vocabulary, and of a hidden state
    n_heads: int
    n_variants: int
    n_threads: int

    @property
    def n_logits(self) -> int:
        """Arrays of logits, of as many tokens as are computed together, at the same time."""
        return (self.n_variants + 2) * self.n_threads

    @property
    def n_states(self) -> int:
        """The same of hidden states."""
        return self.n_variants * (2 * self.n_threads + _PARTS) + SPAN


@dataclass(frozen=True)
class Cut:
    """How many tokens of the vocabulary, and of the text, are computed together."""

    block: int
    tokens: int

    @classmethod
    def into(cls, usable: int, shape: HeadShape, kind: str) -> Cut:
        """The largest cut that fits into `usable` bytes; the smallest one if none does.

        kind: cpu or cuda
        """
        cut = cls(min(shape.vocabulary, _MOST_BLOCK[kind]), _MOST_TOKENS[kind])
        while cut.n_bytes(shape) > usable and (
            cut.block > _LEAST_BLOCK or cut.tokens > _LEAST_TOKENS
        ):
            # logits and weights get smaller by turns
            if cut.tokens > _LEAST_TOKENS and (
                cut.tokens >= cut.block // 64 or cut.block <= _LEAST_BLOCK
            ):
                cut = cls(cut.block, cut.tokens // 2)
            else:
                cut = cls(cut.block // 2, cut.tokens)
        return cut

    def n_bytes(self, shape: HeadShape) -> int:
        """Blocks of the heads, hidden states and logits that are there at the same time."""
        blocks = 1 if self.block == shape.vocabulary else 2
        weights, states = self.block * blocks * shape.n_heads, self.tokens * shape.n_states
        logits = _FLOAT * shape.n_logits * self.tokens * self.block
        return shape.row_bytes * (weights + states) + logits
