"""All candidates in one sweep: views of the source, each with the experts that it keeps.

Candidates that keep the same experts are one variant. Memory and time are those of an evaluation
(`evaluating/engine.py`): two layers, and the hidden states of all variants.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from reap2gguf.choosing.candidates import first_with_same
from reap2gguf.choosing.figures import SOURCE, choice_of_scores
from reap2gguf.evaluating.variants import Variant
from reap2gguf.pruning.view import PrunedView

if TYPE_CHECKING:
    from reap2gguf.bundle.choice import ChoiceRecord
    from reap2gguf.bundle.evaluation import Kind
    from reap2gguf.checkpoint.checkpoint import Checkpoint
    from reap2gguf.checkpoint.weights import Weights
    from reap2gguf.choosing.texts import MeasuredText
    from reap2gguf.models.contract import MoeModel
    from reap2gguf.options import ComputeOptions
    from reap2gguf.progress import Progress
    from reap2gguf.pruning.select import Kept


def measure(
    checkpoint: Checkpoint,
    model: MoeModel,
    kept: Mapping[str, Kept],
    held_out: MeasuredText,
    other: MeasuredText | None,
    options: ComputeOptions,
    progress: Progress,
) -> ChoiceRecord:
    """Measure what each candidate costs, and choose.

    Every process of torchrun computes its share and returns the same. Raises what
    `evaluate_variants` raises.
    """
    from reap2gguf.evaluating.engine import evaluate_variants  # loads torch

    same = first_with_same(kept)
    names = list(dict.fromkeys(same.values()))
    variants = [_variant(SOURCE, "source", checkpoint, model)]
    for name in names:
        view = PrunedView(checkpoint, model, kept[name])
        variants.append(_variant(name, "pruned", view, view.model))
    rows = [*held_out.rows, *(() if other is None else other.rows)]
    pairs = [(SOURCE, name) for name in names]
    scores = evaluate_variants(variants, rows, pairs, options, progress)
    return choice_of_scores(scores, same, held_out, other)


def _variant(name: str, kind: Kind, weights: Weights, model: MoeModel) -> Variant:
    bits = 8 * weights.n_bytes / weights.n_parameters
    return Variant(name, kind, weights, model, weights.n_bytes, bits)
