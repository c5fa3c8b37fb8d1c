"""KL divergence of files of equal size: recipes, and types fitted by the table and as measured.

    python bench/sensitivity.py MODEL IMATRIX TEXT --chunks 20 --size-of Q4_K_M,unsloth-q5kxl

For each file type or recipe of --size-of, types are chosen for the same bytes by both ways of
`--sensitivity`, and all are evaluated beside MODEL in one sweep; no file is written. The text that
`measured` reads is the one of a build, so TEXT should be another one.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from pathlib import Path
from typing import Any

from reap2gguf.checkpoint.checkpoint import Checkpoint
from reap2gguf.evaluating.engine import evaluate_variants
from reap2gguf.evaluating.figures import divergence
from reap2gguf.evaluating.texts import cut_text, read_text
from reap2gguf.evaluating.variants import Variant
from reap2gguf.exporting.row_ranges import BlockMaker
from reap2gguf.fitting.errors_table import TYPES, Cache, Where, measure
from reap2gguf.fitting.fitted import Named, Problem, fit, tensor_bytes
from reap2gguf.fitting.perturbed import Perturbing
from reap2gguf.fitting.probe_text import probe_text
from reap2gguf.fitting.probing import ProbedText, Probing, probes_of
from reap2gguf.fitting.target import SizeTarget
from reap2gguf.gguf_files.imatrix import load_imatrix
from reap2gguf.machine import available_threads
from reap2gguf.models.table import describe
from reap2gguf.options import ComputeOptions
from reap2gguf.progress import Silent
from reap2gguf.quantizing.quantizer import load_quantizer
from reap2gguf.quantizing.recipe import load_recipe
from reap2gguf.tokenizer.tokenizer import Tokenizer

WAYS = ("recipe", "table", "measured")


def compared(checkpoint: Checkpoint, arguments: argparse.Namespace) -> None:
    """Print a line for each size."""
    model = describe(checkpoint)
    facts, imatrix = model.facts, load_imatrix(arguments.imatrix)
    compute = ComputeOptions(arguments.device, threads=arguments.threads)
    tensors = model.gguf_tensors(checkpoint.tensors)
    problem = Problem(tensors, facts, facts.n_experts, imatrix.entries)
    host = BlockMaker(checkpoint, load_quantizer(0), imatrix.entries)
    where = Where(arguments.device, arguments.threads)
    errors = measure(host, problem.to_measure(), TYPES, where, Silent(), {})
    text, begun = probe_text(arguments.model, facts), time.monotonic()

    def evaluated(rows: Any, variants: Any, pairs: Any) -> Any:
        return evaluate_variants(variants, rows, pairs, compute, Silent())

    with tempfile.TemporaryDirectory() as folder:
        probed = ProbedText(text.sha256, lambda *asked: evaluated(text.rows, *asked))
        made = Probing(checkpoint, model, imatrix, probed, Cache(Path(folder) / "kept.json", ""))
        weights = made.sensitivities(problem, errors, Silent())
    print(f"{len(probes_of(problem, facts))} probes: {time.monotonic() - begun:.0f} s")
    perturbing, free = Perturbing(host, model), {tensor.name for tensor in problem.free}
    label, content = read_text(str(arguments.text), print)
    cut = cut_text(
        label, content, Tokenizer(arguments.model), facts.vocab_size, 512, arguments.chunks
    )
    variants = [Variant("source", "source", checkpoint, model, 0, 16.0)]
    names = arguments.size_of.split(",")
    for name in names:
        resolved = problem.resolve(load_recipe(name))
        n_bytes = sum(tensor_bytes(one.tensor, one.tensor_type) for one in resolved.table)
        named = Named("fit", "FIT", SizeTarget(size=n_bytes))
        for way in WAYS:
            found = resolved
            if way != "recipe":
                counted = weights if way == "measured" else None
                found = fit(named, problem, errors, TYPES, n_bytes, counted).resolved
            types = {t: kind for t, kind in found.tensor_types().items() if t in free}
            view = perturbing.with_types(types)
            variants.append(Variant(f"{name} {way}", "pruned", view, view.model, 0, 16.0))
    pairs = [("source", one.name) for one in variants[1:]]
    scores = evaluated(cut.rows, variants, pairs)
    means = {pair[1]: divergence(scores.pair(*pair)).mean.value for pair in pairs}
    logs = dict.fromkeys(WAYS[1:], 0.0)
    for name in names:
        own = means[f"{name} recipe"]
        cells = [f"{own:.4f}"]
        for way in WAYS[1:]:
            found = means[f"{name} {way}"]
            logs[way] += math.log(found / own) / len(names)
            cells.append(f"{found:.4f} ({1 - found / own:+.0%})")
        print(" | ".join((name, *cells)))
    less = ", ".join(f"{way} {1 - math.exp(one):+.1%}" for way, one in logs.items())
    print(f"less than the recipes, geometric mean: {less}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("imatrix", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--chunks", type=int, default=20)
    parser.add_argument("--size-of", default="Q4_K_M,Q3_K_M,unsloth-q5kxl,unsloth-q6kxl")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--threads", type=int, default=available_threads())
    arguments = parser.parse_args()
    with Checkpoint.open(arguments.model) as checkpoint:
        compared(checkpoint, arguments)


if __name__ == "__main__":
    main()
