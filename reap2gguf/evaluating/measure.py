"""From what was found at every scored token to the record of an evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from reap2gguf.artifacts.made_with import COMPUTING, versions
from reap2gguf.bundle.evaluation import Comparison, Evaluation, VariantRecord
from reap2gguf.errors import EvaluationError
from reap2gguf.evaluating.figures import divergence, perplexity

if TYPE_CHECKING:
    from reap2gguf.evaluating.scores import Scores
    from reap2gguf.evaluating.texts import EvaluationText
    from reap2gguf.evaluating.variants import Variant
    from reap2gguf.options import ComputeOptions


def evaluation_of_scores(
    variants: Sequence[Variant], text: EvaluationText, scores: Scores, options: ComputeOptions
) -> Evaluation:
    """The record of what was found at every scored token."""
    records = []
    for variant in variants:
        try:
            found = perplexity(scores.variants[variant.name].nll)
        except OverflowError as error:
            raise EvaluationError(
                f"{variant.name}: its perplexity is beyond all numbers; the model is broken"
            ) from error
        records.append(
            VariantRecord(
                variant.name,
                variant.kind,
                found,
                variant.model.facts.n_experts,
                variant.n_bytes,
                variant.bits_per_weight,
            )
        )
    comparisons = [
        Comparison(reference, other, divergence(scores.pair(reference, other)))
        for reference, other in scores.divergences
    ]
    return Evaluation(
        engine="streamed",
        text=text.record,
        variants=records,
        comparisons=comparisons,
        device=options.likely_device,
        dtype=options.likely_dtype,
        made_with=versions(COMPUTING),
    )
