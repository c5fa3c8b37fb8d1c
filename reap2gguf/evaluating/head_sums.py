"""What is summed over a vocabulary at each scored token, a block of the vocabulary at a time.

Logits exist for one block and a few tokens only, so sums are kept relative to the largest logit so
far, as in an online softmax (arXiv 1805.02867). With a reference p and another q, and l their
logits, KL(p || q) = sum p (l_p - l_q) - log Z_p + log Z_q: the differences of logits are summed as
they come, without the cancellation of two large sums.

Letters: S scored tokens, V vocabulary, B a block of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from reap2gguf.evaluating.scores import Pair

_NEIGHBOURS = 128  # values of a row that a CPU adds in float32


class _Softmax:
    """The likeliest token, the right token's logit and log Z of one variant: (S,) each."""

    def __init__(self, n_scored: int, device: torch.device) -> None:
        self.largest = torch.full((n_scored,), -torch.inf, device=device)  # logit
        self.total = torch.zeros(
            n_scored, dtype=torch.float64, device=device
        )  # of exp(l - largest)
        self.top = torch.zeros(n_scored, dtype=torch.int64, device=device)
        self.right = torch.zeros(n_scored, dtype=torch.float64, device=device)  # logit

    def add(self, span: slice, first: int, logits: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        """Count a block (n, B) from token `first` on; exp(l - largest), and what it shrank by.

        `right` (n,): the tokens that are there.
        """
        before = self.largest[span]
        highest = logits.amax(-1)
        largest = torch.maximum(before, highest)
        shrunk = torch.exp(before.double() - largest.double())
        shares = (logits - largest[:, None]).exp_()
        self.total[span] = self.total[span] * shrunk + _sum(shares)
        self._find_top(span, first, logits, highest > before)
        self.largest[span] = largest
        inside = (right >= first) & (right < first + logits.shape[1])
        found = logits.gather(1, (right - first).clamp(0, logits.shape[1] - 1)[:, None])[:, 0]
        self.right[span] = torch.where(inside, found.double(), self.right[span])
        return shares, shrunk

    def _find_top(self, span: slice, first: int, logits: Tensor, is_higher: Tensor) -> None:
        """Find the likeliest token where a block has a higher logit than those before it."""
        if logits.is_cuda:  # where the host does not wait to learn which rows these are
            place = logits.argmax(-1) + first
            self.top[span] = torch.where(is_higher, place, self.top[span])
            return
        rows = is_higher.nonzero()[:, 0]
        if len(rows):
            chosen = logits if len(rows) == len(logits) else logits[rows]
            self.top[span][rows] = chosen.argmax(-1) + first

    @property
    def log_total(self) -> Tensor:
        """log Z: (S,) float64."""
        return self.largest.double() + self.total.log()


def _sum(values: Tensor) -> Tensor:
    """Sums (n,) in float64 of rows (n, B) of float32.

    A CPU adds a few neighbours in float32, which rounds less than the values were rounded before,
    because it converts each value to float64 ten times slower than it adds it.
    """
    if values.is_cuda:
        return values.sum(-1, dtype=torch.float64)
    end = values.shape[1] // _NEIGHBOURS * _NEIGHBOURS
    groups: Tensor = values[:, :end].unflatten(1, (-1, _NEIGHBOURS))  # type: ignore[no-untyped-call]
    parts = groups.sum(-1)
    rest = values[:, end:]
    return parts.sum(-1, dtype=torch.float64) + rest.sum(-1, dtype=torch.float64)


class HeadSums:
    """The sums of all variants and of the pairs that are compared.

    Memory on the device: 28 bytes per variant and 8 per pair for every scored token. A block takes
    the logits of all variants and two arrays more of that size.
    """

    def __init__(
        self, names: Sequence[str], pairs: Sequence[Pair], n_scored: int, device: torch.device
    ) -> None:
        self._softmax = {name: _Softmax(n_scored, device) for name in names}
        self._apart = {
            pair: torch.zeros(n_scored, dtype=torch.float64, device=device) for pair in pairs
        }  # sum of exp(l_p - largest) (l_p - l_q)

    @torch.inference_mode()
    def add(
        self,
        span: slice,
        first: int,
        logits: Mapping[str, Tensor],
        right: Tensor,
        is_compared: bool = True,
    ) -> None:
        """Count a block of the vocabulary, from token `first` on, for the scored tokens of `span`.

        logits: (n, B) float32 of every variant    right: (n,) the tokens that are there
        Without `is_compared`, pairs are left out.
        """
        for name, own in logits.items():
            shares, shrunk = self._softmax[name].add(span, first, own, right)
            for (reference, other), apart in self._apart.items():
                if is_compared and reference == name:
                    change = _sum((own - logits[other]).mul_(shares))
                    apart[span] = apart[span] * shrunk + change

    def nll(self, name: str) -> Tensor:
        """Negative log-likelihood of the right tokens, (S,) float64, in nats."""
        return self._softmax[name].log_total - self._softmax[name].right

    def top(self, name: str) -> Tensor:
        """The likeliest tokens, (S,) int64; of several the first."""
        return self._softmax[name].top

    def divergence(self, pair: Pair) -> Tensor:
        """KL divergence of the other variant from the reference, (S,) float64, in nats."""
        reference, other = (self._softmax[name] for name in pair)
        mean = self._apart[pair] / reference.total
        # rounding may leave a little less than nothing
        return (mean - reference.log_total + other.log_total).clamp_(min=0)
