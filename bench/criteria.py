"""Compares the criteria of `prune`, and experts drawn at random, by what pruning costs on a text.

    python bench/criteria.py MODEL --calibration TEXT --text HELD_OUT --keep-experts 12

observes MODEL on TEXT, chooses the experts to keep by every criterion, and at random by `--seeds`
seeds, and evaluates all of these pruned models on the first `--chunks` chunks of HELD_OUT, which no
criterion has seen: in one sweep, as views of MODEL, so that nothing is written but the
observations.
"""

from __future__ import annotations

import argparse
import tempfile
from contextlib import ExitStack
from pathlib import Path

import numpy as np

import reap2gguf
from reap2gguf.bundle.evaluation import Evaluation
from reap2gguf.evaluating import texts
from reap2gguf.evaluating.engine import evaluate_variants
from reap2gguf.evaluating.measure import evaluation_of_scores
from reap2gguf.evaluating.opening import OpenVariants, pairs_of
from reap2gguf.evaluating.variants import Variant
from reap2gguf.options import CalibrationOptions, ComputeOptions
from reap2gguf.progress import Silent
from reap2gguf.pruning.methods import OBSERVED
from reap2gguf.pruning.select import Kept
from reap2gguf.pruning.view import PrunedView
from reap2gguf.tokenizer.tokenizer import Tokenizer


def chosen(arguments: argparse.Namespace, compute: ComputeOptions) -> dict[str, Kept]:
    """By criterion or seed, the experts that are kept of each layer."""
    with tempfile.TemporaryDirectory() as folder:
        texts_seen = CalibrationOptions(spec=arguments.calibration)
        seen = reap2gguf.observe(
            arguments.model, Path(folder) / "o.safetensors", calibration=texts_seen, compute=compute
        )
    number = {"keep_experts": arguments.keep_experts}
    found: dict[str, Kept] = {
        method: reap2gguf.select(arguments.model, seen, method=method, **number).kept
        for method in OBSERVED
    }
    total = len(next(iter(seen.layers.values())).count)
    for seed in range(arguments.seeds):
        draw = np.random.default_rng(seed)
        found[f"random {seed}"] = {
            layer: tuple(sorted(draw.permutation(total)[: arguments.keep_experts].tolist()))
            for layer in found["reap"]
        }
    return found


def evaluated(arguments: argparse.Namespace, compute: ComputeOptions) -> Evaluation:
    """All pruned models beside their source."""
    kept = chosen(arguments, compute)
    with ExitStack() as stack:
        opened = OpenVariants(stack, Silent())
        opened.source(arguments.model)
        source = opened.variants[0]
        views = [PrunedView(source.weights, source.model, experts) for experts in kept.values()]
        pruned = [
            Variant(name, "pruned", view, view.model, 2 * view.n_parameters, 16.0)
            for name, view in zip(kept, views, strict=True)
        ]
        label, content = texts.read_text(arguments.text, print)
        tokenizer = Tokenizer(Path(arguments.model))
        vocabulary = source.model.facts.vocab_size
        text = texts.cut_text(label, content, tokenizer, vocabulary, 512, arguments.chunks)
        variants = [source, *pruned]
        scores = evaluate_variants(variants, text.rows, pairs_of(variants), compute, Silent())
        return evaluation_of_scores(variants, text, scores, compute)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--text", default=texts.HELD_OUT)
    parser.add_argument("--keep-experts", type=int, required=True)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--chunks", type=int)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    found = evaluated(arguments, ComputeOptions(device="cpu", threads=arguments.threads))
    source, *others = found.variants
    print(
        f"{found.text.n_scored:,} tokens scored; the source's perplexity is "
        f"{source.perplexity.value:.4f} ± {source.perplexity.error:.4f}\n"
    )
    print("| kept by | perplexity | ratio to the source's | KL from the source, nats | same top |")
    print("|---|---|---|---|---|")
    apart = {one.variant: one.divergence for one in found.comparisons}
    for variant in sorted(others, key=lambda one: one.perplexity.value):
        figures = apart[variant.name]
        cells = [
            f"{variant.perplexity.value:.3f} ± {variant.perplexity.error:.3f}",
            f"{figures.perplexity_ratio.value:.4f} ± {figures.perplexity_ratio.error:.4f}",
            f"{figures.mean.value:.4f} ± {figures.mean.error:.4f}",
            f"{figures.same_top.value:.1%} ± {figures.same_top.error:.1%}",
        ]
        print(f"| {variant.name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
