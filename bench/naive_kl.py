"""Compares `evaluate` with whole models: every logit, in float64, by transformers.

    python bench/naive_kl.py MODEL --calibration TEXT --text HELD_OUT --keep-experts 12

prunes MODEL, quantizes it to Q4_K_M, and evaluates source, pruned model and file as a user does.
Then transformers loads each of them whole in float64, of the file the weights that `GgufWeights`
reads (which are gguf-py's, bit for bit: tests/gguf_source/test_weights.py), and perplexities
and mean KL divergences come from all logits. It is for small models.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file
from transformers import AutoModelForCausalLM

import reap2gguf
from reap2gguf.bundle.evaluation import Evaluation
from reap2gguf.checkpoint.checkpoint import Checkpoint
from reap2gguf.checkpoint.weights import Weights
from reap2gguf.evaluating import texts
from reap2gguf.evaluating.options import EvaluateOptions
from reap2gguf.gguf_files.reader import read_gguf_header
from reap2gguf.gguf_source.weights import GgufWeights
from reap2gguf.models.table import describe
from reap2gguf.options import CalibrationOptions, ComputeOptions
from reap2gguf.tokenizer.tokenizer import Tokenizer

CHUNK = 512


def whole(folder: Path) -> Any:
    """A model of transformers in float64."""
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float64, experts_implementation="eager"
    ).eval()


def as_folder(weights: Weights, folder: Path) -> Path:
    """Weights as a folder of float32 that transformers loads."""
    folder.mkdir()
    tensors = {name: weights.read_float32(name) for name in weights.tensors}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({**weights.config, "dtype": "float32"}))
    return folder


def predictions(model: Any, chunks: list[np.ndarray]) -> Iterator[torch.Tensor]:
    """Log-probabilities (n, V) of the scored tokens of each chunk."""
    for chunk in chunks:
        with torch.inference_mode():
            logits = model(torch.from_numpy(chunk)[None]).logits[0]
        yield logits[CHUNK // 2 : -1].log_softmax(-1)


def naive(folders: dict[str, Path], chunks: list[np.ndarray]) -> dict[str, float]:
    """Perplexities by name, and mean KL divergences by `name of the other from the reference`."""
    models = {name: whole(folder) for name, folder in folders.items()}
    total: dict[str, float] = {}
    n_scored = 0
    for chunk, *logs in zip(
        chunks, *(predictions(one, chunks) for one in models.values()), strict=True
    ):
        right = torch.from_numpy(chunk[CHUNK // 2 + 1 :])[:, None]
        n_scored += len(right)
        for (name, log), (reference, base) in product(
            zip(models, logs, strict=True), zip(models, logs, strict=True)
        ):
            key = name if name == reference else f"{name} from {reference}"
            added = -log.gather(1, right) if name == reference else base.exp() * (base - log)
            total[key] = total.get(key, 0.0) + float(added.sum())
    means = {key: value / n_scored for key, value in total.items()}
    return {key: math.exp(mean) if key in folders else mean for key, mean in means.items()}


def compared(given: argparse.Namespace, root: Path) -> tuple[Evaluation, dict[str, float]]:
    """What `evaluate` finds, and what whole models say."""
    compute = ComputeOptions(device="cpu", threads=given.threads)
    seen = reap2gguf.observe(
        given.model,
        root / "o.safetensors",
        calibration=CalibrationOptions(spec=given.calibration),
        compute=compute,
    )
    pruned = root / "pruned"
    reap2gguf.prune(given.model, seen, pruned, keep_experts=given.keep_experts)
    file = reap2gguf.quantize(pruned, "Q4_K_M", root / "Q4_K_M.gguf").path
    options = EvaluateOptions(text=given.text, chunks=given.chunks)
    found = reap2gguf.evaluate(given.model, pruned, file, options=options, compute=compute)
    with Checkpoint.open(pruned) as checkpoint:
        model = describe(checkpoint)
        weights = GgufWeights(read_gguf_header(file), model, checkpoint.tensors)
        dequantized = as_folder(weights, root / "dequantized")
    label, content = texts.read_text(given.text, print)
    vocabulary = model.facts.vocab_size
    text = texts.cut_text(label, content, Tokenizer(given.model), vocabulary, CHUNK, given.chunks)
    folders = {"source": given.model, "pruned": pruned, file.name: dequantized}
    return found, naive(folders, [np.asarray(row.tokens) for row in text.rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--text", default=texts.HELD_OUT)
    parser.add_argument("--keep-experts", type=int, required=True)
    parser.add_argument("--chunks", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found, expected = compared(given, Path(folder))
    print(f"{found.text.n_scored:,} tokens scored\n")
    print("| | streamed | whole, float64 | difference |\n|---|---|---|---|")
    for variant in found.variants:
        _line(f"perplexity: {variant.name}", variant.perplexity.value, expected[variant.name])
    for one in found.comparisons:
        key = f"{one.variant} from {one.reference}"
        _line(f"mean KL: {key}", one.divergence.mean.value, expected[key])


def _line(name: str, streamed: float, value: float) -> None:
    print(f"| {name} | {streamed:.7f} | {value:.7f} | {abs(streamed - value):.1e} |")


if __name__ == "__main__":
    main()
