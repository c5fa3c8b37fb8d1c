"""A GGUF file that llama.cpp computes, beside variants that are streamed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from reap2gguf.evaluating.llama.scoring import LlamaLogits, llama_logits, llama_scores

if TYPE_CHECKING:
    from reap2gguf.evaluating.llama.model import LlamaOptions
    from reap2gguf.evaluating.scores import ScoredRow, VariantScores
    from reap2gguf.progress import Progress


@dataclass(frozen=True)
class LlamaVariant:
    """One file; see `reap2gguf.evaluating.outside.Outside`."""

    path: Path
    options: LlamaOptions
    progress: Progress

    @property
    def name(self) -> str:
        return self.path.name

    def logits(self, rows: Sequence[ScoredRow]) -> LlamaLogits:
        """The logits of all scored tokens, computed as they are taken."""
        return llama_logits(self.path, rows, self.options)

    def scores(self, rows: Sequence[ScoredRow]) -> VariantScores:
        """What llama.cpp gives the scored tokens."""
        return llama_scores(self.path, rows, self.options, self.progress)
