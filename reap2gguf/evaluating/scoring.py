"""Rows of a text and of tasks, scored for all variants in one sweep, and kept until all is done."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from reap2gguf.artifacts.made_with import COMPUTING, versions
from reap2gguf.evaluating.engine import evaluate_variants
from reap2gguf.evaluating.kept import KeptScores, load_scores, save_scores
from reap2gguf.evaluating.llama.model import LlamaOptions
from reap2gguf.evaluating.llama.outside import LlamaVariant
from reap2gguf.evaluating.opening import pairs_of
from reap2gguf.observing.compute.ranks import join
from reap2gguf.options import Resume

if TYPE_CHECKING:
    from reap2gguf.evaluating.scores import Pair, ScoredRow, Scores
    from reap2gguf.evaluating.variants import Variant
    from reap2gguf.options import ComputeOptions
    from reap2gguf.progress import Progress


def key_of(*inputs: object) -> str:
    """A hash that changes when any input does."""
    text = json.dumps(inputs, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def rows_sha256(rows: Sequence[ScoredRow]) -> str:
    """The hash of all tokens, and of which are scored."""
    digest = hashlib.sha256()
    for row in rows:
        shape = len(row.tokens), row.first, row.instead, row.is_compared
        digest.update(str(shape).encode() + row.tokens.tobytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class Scorer:
    """Scores rows for all variants; GGUF files by llama.cpp, if it is the engine.

    With `state`, the path that names of saved progress begin with, an interrupted call resumes from
    its last layer, and rows that were scored already are not scored again.
    """

    variants: Sequence[Variant]
    engine: str
    compute: ComputeOptions
    state: Path | None
    progress: Progress
    pairs: Sequence[Pair] | None = None  # what is compared; None: as `pairs_of` says

    def __call__(self, rows: Sequence[ScoredRow]) -> Scores:
        """What all variants give the rows. Raises what `evaluate_variants` raises."""
        ranks = join()
        pairs = pairs_of(self.variants) if self.pairs is None else self.pairs
        same = [(one.name, one.n_bytes, one.model.facts.n_experts) for one in self.variants]
        tokens = rows_sha256(rows)
        ranks.check_same(
            "the evaluation", key_of(same, tokens), "use the same files, texts and tasks everywhere"
        )
        key = key_of(
            tokens,
            pairs,
            [(one.name, one.identity) for one in self.variants],
            [self.engine, self.compute.likely_device, self.compute.likely_dtype],
            versions(COMPUTING),
        )
        kept = self._kept(rows, pairs, key) if ranks.is_first else None
        (found,) = ranks.broadcast((kept,))
        if found is None:
            found = self._scored(rows, pairs, key)
            if self.state is not None and ranks.is_first:
                save_scores(self._scores_file(self.state), key, found)
        return found

    def _scored(self, rows: Sequence[ScoredRow], pairs: Sequence[Pair], key: str) -> Scores:
        """Compute them: folders streamed, and files as well or by llama.cpp."""
        is_outside = self.engine == "llama.cpp"
        streamed = [one for one in self.variants if one.kind != "gguf" or not is_outside]
        options = llama_options(self.compute)
        outside = [
            LlamaVariant(one.path, options, self.progress)
            for one in self.variants
            if is_outside and one.kind == "gguf" and one.path is not None
        ]
        kept = None if self.state is None else KeptScores(self._scores_file(self.state), key)
        return evaluate_variants(
            streamed,
            rows,
            pairs,
            self._resuming(key),
            self.progress,
            outside=outside,
            kept=kept,
        )

    def _resuming(self, key: str) -> ComputeOptions:
        """Keep the progress between layers beside the output."""
        if self.state is None:
            return self.compute
        resume = Resume(self.state, key, versions(COMPUTING))
        return replace(self.compute, scratch=self.state.parent, resume=resume)

    def _kept(self, rows: Sequence[ScoredRow], pairs: Sequence[Pair], key: str) -> Scores | None:
        if self.state is None:
            return None
        names = [one.name for one in self.variants]
        return load_scores(self._scores_file(self.state), key, rows, names, pairs)

    def _scores_file(self, state: Path) -> Path:
        return state.with_name(f"{state.name}.scores")


def llama_options(compute: ComputeOptions) -> LlamaOptions:
    """How llama.cpp runs a file, where the rest is computed like this."""
    return LlamaOptions(compute.threads, 0 if compute.device == "cpu" else -1)
