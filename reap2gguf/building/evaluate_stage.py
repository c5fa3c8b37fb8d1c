"""The last stage of a build, where it is worth its time: what pruning cost, what quantizing cost.

The source, the pruned model as a view of it, and the verified GGUF files go through the layers
together. `needs/scoring.py` says how much text is scored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from reap2gguf.artifacts.made_with import COMPUTING
from reap2gguf.building.keys import EVALUATE_FORMAT, stage_key
from reap2gguf.building.needs.scoring import CHUNK
from reap2gguf.building.stage import Run, Stage
from reap2gguf.bundle.evaluation import EVALUATION_FILE, Evaluation
from reap2gguf.evaluating.measure import evaluation_of_scores
from reap2gguf.evaluating.opening import pairs_of
from reap2gguf.evaluating.texts import HELD_OUT, EvaluationText, cut_text, read_text
from reap2gguf.evaluating.variants import Variant
from reap2gguf.gguf_files.reader import read_gguf_header
from reap2gguf.gguf_source.weights import GgufWeights
from reap2gguf.tokenizer.tokenizer import Tokenizer

if TYPE_CHECKING:
    from reap2gguf.building.stages import Export
    from reap2gguf.building.verify_stage import Verify
    from reap2gguf.pruning.view import PrunedView


class Evaluate(Stage[Evaluation]):
    """Measures all variants on a text that no calibration of this program reads."""

    name = "evaluate"
    libraries: ClassVar[Sequence[str]] = COMPUTING

    def __init__(
        self, run: Run, pruned: PrunedView, export: Export, verify: Verify, n_chunks: int
    ) -> None:
        super().__init__(run)
        self._pruned = pruned
        self._export = export
        self._verify = verify
        self._n_chunks = n_chunks
        self._text = self._read()

    def _read(self) -> EvaluationText:
        """The text, cut; raises CalibrationError."""
        facts = self._pruned.model.facts
        label, content = read_text(HELD_OUT, self.run.progress.note)
        tokenizer = Tokenizer(self.run.plan.source.folder)
        size = min(CHUNK, facts.context_length)
        return cut_text(label, content, tokenizer, facts.vocab_size, size, self._n_chunks)

    def make_key(self) -> str:
        compute = self.run.plan.options.compute
        where = compute.likely_device, compute.likely_dtype
        return stage_key(
            "evaluate", EVALUATE_FORMAT, self._verify.key, self._text.tokens_sha256, *where
        )

    @property
    def path(self) -> Path:
        return self.run.work.root / EVALUATION_FILE

    @property
    def outputs(self) -> Sequence[Path]:
        return (self.path,)

    def compute(self) -> Mapping[str, Any]:
        from reap2gguf.evaluating.engine import evaluate_variants  # loads torch

        variants, options = self._variants(), self.compute_options
        pairs, progress = pairs_of(variants), self.run.progress
        # the other processes of torchrun have left
        scores = evaluate_variants(variants, self._text.rows, pairs, options, progress, alone=True)
        evaluation_of_scores(variants, self._text, scores, options).save(self.path)
        return {}

    def _variants(self) -> list[Variant]:
        """The source, the pruned model if anything is pruned, and every GGUF file."""
        plan, pruned = self.run.plan, self._pruned
        source = plan.checkpoint
        bits = 8 * source.n_bytes / source.n_parameters
        found = [Variant("source", "source", source, plan.model, source.n_bytes, bits)]
        if plan.target.prunes and not plan.slices:
            bits = 8 * pruned.n_bytes / pruned.n_parameters
            found.append(Variant("pruned", "pruned", pruned, pruned.model, pruned.n_bytes, bits))
        for path, recipe in self._export.files.items():
            weights = GgufWeights(read_gguf_header(path), pruned.model, pruned.tensors)
            n_bytes, bits = recipe.n_bytes, recipe.bits_per_weight
            found.append(Variant(path.name, "gguf", weights, weights.model, n_bytes, bits))
        return found

    def load(self) -> Evaluation:
        return Evaluation.load(self.path)
