"""The rows of the heads of some variants, read block by block.

Variants that share a head, as a model and its pruned form do, share its blocks.

Letters: V vocabulary, B a block of it, H hidden.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from reap2gguf.observing.targets import rows_of

if TYPE_CHECKING:
    from pathlib import Path

    from reap2gguf.checkpoint.weights import Weights
    from reap2gguf.evaluating.run import VariantRun

Blocks = Mapping[str, Tensor]  # by variant, (B, H)


class HeadWeights:
    """The heads of variants that have been through all layers. Memory: two blocks of each head."""

    def __init__(self, runs: Mapping[str, VariantRun]) -> None:
        self._heads: dict[str, VariantRun] = {}  # by variant, the run that reads its head
        by_origin: dict[tuple[Path, str], VariantRun] = {}
        for name, run in runs.items():
            origin = _origin(run.decoder.weights, run.decoder.model.head_name)
            self._heads[name] = by_origin.setdefault(origin, run)
        self.n_heads = len(by_origin)
        self.vocabulary: int = next(iter(runs.values())).decoder.model.facts.vocab_size

    def blocks(self, size: int) -> Iterator[tuple[int, Blocks]]:
        """Blocks of at most `size` tokens, each with its first token; the next is being read."""
        self._ask(0, size)
        for first in range(0, self.vocabulary, size):
            taken = self._take(first)
            self._ask(first + size, size)
            yield first, taken

    def _ask(self, first: int, size: int) -> None:
        """Begin to read the rows from token `first` on, if there are any."""
        last = min(first + size, self.vocabulary)
        if first >= last:
            return
        for run in set(self._heads.values()):
            decoder = run.decoder
            name = decoder.model.head_name
            target = rows_of(decoder.weights, name, first, last, decoder.dtype)
            decoder.loader.ask(f"head {first}", {name: target})

    def _take(self, first: int) -> Blocks:
        taken = {
            run: run.decoder.loader.take(f"head {first}")[run.decoder.model.head_name]
            for run in set(self._heads.values())
        }
        return {name: taken[run] for name, run in self._heads.items()}


def _origin(weights: Weights, name: str) -> tuple[Path, str]:
    """The tensor's folder, and its name there: a pruned view has the tensors of its source."""
    return weights.folder, weights.origin(name)[0]
