"""Times `--sensitivity measured` at a real model's shape: a few layers measured, all extrapolated.

    python bench/sensitivity_cost.py FOLDER --device cuda
    python bench/sensitivity_cost.py FOLDER --device cpu --rows 1

FOLDER receives a checkpoint of the shape with a few layers, the model's whole vocabulary and random
weights, unless an earlier run left one there: 8.5 GB for 4 layers of Qwen3.5-35B-A3B, of which
every fourth has another kind. The whole model has a probe for each kind of tensor in each of four
bands of layers, and all of them pass through all layers. Here the layers are one band, and the
other three probes of a kind are views that change nothing: as many variants pass through a layer as
in the whole model, and every weight is quantized once, as there.

First the source alone takes one row, so that kernels are compiled: that is counted once. Then all
variants take `--rows` rows of 512 tokens. The time of the whole model is that of the layers, times
all layers by those that were measured, and all else: embeddings, heads, and what starts. With fewer
rows than the 8 of a build, what is measured is multiplied, weights that are quantized once as well:
the result is then more than it takes.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from export import random_imatrix
from sparse_checkpoint import SHAPES
from synthetic import VOCABULARY, write_apart

from reap2gguf.checkpoint.checkpoint import Checkpoint
from reap2gguf.choosing.texts import scored_half
from reap2gguf.evaluating import engine
from reap2gguf.evaluating.scores import ScoredRow
from reap2gguf.evaluating.variants import Variant
from reap2gguf.exporting.row_ranges import BlockMaker
from reap2gguf.fitting import probing
from reap2gguf.fitting.fitted import Problem
from reap2gguf.fitting.perturbed import Perturbing
from reap2gguf.fitting.target import PROBE_CHUNK, PROBE_CHUNKS
from reap2gguf.machine import available_threads
from reap2gguf.models.table import describe
from reap2gguf.options import ComputeOptions
from reap2gguf.progress import Silent
from reap2gguf.quantizing.quantizer import load_quantizer


class Timed:
    """Evaluates variants, and adds up how long their layers take, and all else."""

    def __init__(self, options: ComputeOptions) -> None:
        self._options = options
        self._layers = 0.0

    def evaluate(
        self, variants: Sequence[Variant], rows: Sequence[ScoredRow]
    ) -> tuple[float, float]:
        """Seconds of the layers, and of all else."""
        whole: Callable[[Any], None] = engine._Evaluation.all_layers

        def layers(evaluation: Any) -> None:
            begun = time.perf_counter()
            whole(evaluation)
            self._layers = time.perf_counter() - begun

        begun = time.perf_counter()
        pairs = [(variants[0].name, one.name) for one in variants[1:]]
        engine._Evaluation.all_layers = layers  # type: ignore[method-assign]
        try:
            engine.evaluate_variants(variants, rows, pairs, self._options, Silent())
        finally:
            engine._Evaluation.all_layers = whole  # type: ignore[method-assign]
        return self._layers, time.perf_counter() - begun - self._layers


def probed_variants(checkpoint: Checkpoint, model: Any) -> list[Variant]:
    """The source and as many variants of it as the whole model has probes."""
    n_bands, probing.BANDS = probing.BANDS, 1  # these layers are a part of one band
    imatrix = random_imatrix(checkpoint)
    host = BlockMaker(checkpoint, load_quantizer(0), imatrix.entries)
    tensors = model.gguf_tensors(checkpoint.tensors)
    problem = Problem(tensors, model.facts, model.facts.n_experts, imatrix.entries)
    probes, perturbing = probing.probes_of(problem, model.facts), Perturbing(host, model)
    variants = [Variant("source", "source", checkpoint, model, 0, 16.0)]
    for probe in probes:
        of_layers = any(name.startswith("blk.") for name in probe.types)
        for number in range(n_bands if of_layers else 1):
            view = perturbing.with_types({} if number else probe.types)
            name = f"{probe.name} {number}"
            variants.append(Variant(name, "pruned", view, view.model, 0, 16.0))
    return variants


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="qwen3.5-35b-a3b")
    parser.add_argument("--layers", type=int, default=4, help="to be measured")
    parser.add_argument("--experts", type=int, help="few, with a small vocabulary: a trial")
    parser.add_argument("--rows", type=int, default=PROBE_CHUNKS)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--threads", type=int, default=available_threads())
    arguments = parser.parse_args()
    config = SHAPES[arguments.shape][0]
    config = config.get("text_config", config)
    folder: Path = arguments.folder
    if not (folder / "config.json").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        others = {"vocab_size": config["vocab_size"]}
        if arguments.experts is not None:
            others = {"vocab_size": VOCABULARY, "num_experts": arguments.experts}
        write_apart(arguments.shape, arguments.layers, folder, same_layers=True, **others)
    random = np.random.default_rng(0)
    tokens = random.integers(0, VOCABULARY, (arguments.rows, PROBE_CHUNK)).astype(np.int32)
    rows = [scored_half(row) for row in tokens]
    timed = Timed(ComputeOptions(arguments.device, threads=arguments.threads))
    with Checkpoint.open(folder) as checkpoint:
        model = describe(checkpoint)
        variants = probed_variants(checkpoint, model)
        once = sum(timed.evaluate(variants[:1], rows[:1]))
        layers, rest = timed.evaluate(variants, rows)
    n_all, n_measured = config["num_hidden_layers"], model.facts.n_layers
    times = PROBE_CHUNKS / arguments.rows
    whole = once + times * (rest + layers * n_all / n_measured)
    most = "" if times == 1 else f" (at most: {arguments.rows} rows, times {times:g})"
    print(
        f"{arguments.shape}, {arguments.device}, {arguments.threads} threads, {len(variants)} "
        f"variants, {arguments.rows} rows: first row {once:.1f} s, {n_measured} layers "
        f"{layers:.1f} s, the rest {rest:.1f} s; {n_all} layers: {whole:.0f} s{most}"
    )


if __name__ == "__main__":
    main()
