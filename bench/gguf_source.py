"""Peak memory and time of profiling and pruning a GGUF file of a real model's full size.

    python bench/gguf_source.py FOLDER --memory 4GiB

FOLDER gets a Q4_K_M file with all tensors of Qwen3-30B-A3B (18.6 GB; its blocks are those of a few
random rows, repeated), and what is left of it (14 GB). Each command runs as a user runs it, in a
process of its own, whose peak the kernel keeps. Few tokens are observed: weights are what takes the
time of a file that is dequantized.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from memory import MIB, peak
from sparse_checkpoint import SHAPES, write

from reap2gguf.checkpoint.checkpoint import Checkpoint
from reap2gguf.exporting.header import lay_out
from reap2gguf.exporting.header_facts import FileTypes, HeaderNames, model_facts
from reap2gguf.models.description import GgufTensor
from reap2gguf.models.table import describe
from reap2gguf.quantizing.quantizer import load_quantizer
from reap2gguf.quantizing.recipe import load_recipes
from reap2gguf.quantizing.resolve import resolve

_ROWS = 256  # that are drawn; the others repeat them
_STEP = 2**24  # bytes written at a time


def write_file(shape: str, file_type: str, folder: Path) -> Path:
    """A GGUF file of the full size of a model, with finite values in every block."""
    config, shapes = SHAPES[shape]
    sparse, path = folder / "sparse", folder / f"{shape}-{file_type}.gguf"
    if path.exists():
        return path
    if not sparse.exists():
        write(config, shapes(config), sparse)
    with Checkpoint.open(sparse) as checkpoint:
        model = describe(checkpoint)
        tensors = model.gguf_tensors(checkpoint.tensors)
        (asked,) = load_recipes([file_type], {}, ())
        recipe = resolve(asked, tensors, model.facts, model.facts.n_experts, False)
        types = recipe.tensor_types()
        files = FileTypes(recipe.name, recipe.llama_file_type, types)
        facts = model_facts(checkpoint, model, HeaderNames(shape), files, None)
        layout = lay_out(sparse, tensors, facts)
    part = path.with_suffix(".part")
    with part.open("wb") as file:
        file.write(layout.header)
        for tensor in tensors:
            file.seek(layout.offsets[tensor.name])
            blocks = rows_of(tensor, types[tensor.name])
            n_rows = int(np.prod(tensor.shape[:-1]))
            many = np.concatenate(
                [blocks] * max(1, min(n_rows, _STEP // blocks.shape[1]) // len(blocks))
            )
            for first in range(0, n_rows, len(many)):
                file.write(many[: n_rows - first].data)
        file.truncate(layout.n_bytes)
    part.rename(path)
    return path


def rows_of(tensor: GgufTensor, tensor_type: object) -> np.ndarray:
    """Rows of a tensor, as bytes: all of a small one, else a few."""
    n_rows = min(int(np.prod(tensor.shape[:-1])), _ROWS)
    generator = np.random.default_rng(len(tensor.name))
    center = 1.0 if tensor.name.endswith("norm.weight") else 0.0
    values = generator.normal(center, 0.02, (n_rows, tensor.n_columns)).astype(np.float32)
    made = load_quantizer().quantize(values, tensor_type, None)  # type: ignore[arg-type]
    return np.ascontiguousarray(made).view(np.uint8).reshape(n_rows, -1)


def timed(name: str, arguments: Sequence[str | Path], log: Path) -> None:
    """Run a command and print a line of its peak and its time."""
    begun = time.monotonic()
    measured = peak(arguments, log)
    seconds = time.monotonic() - begun
    print(f"| {name} | {measured / MIB:,.0f} MiB | {seconds:,.0f} s |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", default="qwen3-30b-a3b", choices=SHAPES)
    parser.add_argument("--type", default="Q4_K_M", dest="file_type")
    parser.add_argument("--memory", default="4GiB")
    parser.add_argument("--samples", default="2")
    parser.add_argument("--max-length", default="128")
    given = parser.parse_args()
    folder = given.folder
    folder.mkdir(parents=True, exist_ok=True)
    source, log = write_file(given.shape, given.file_type, folder), folder / "log"
    text, seen, output = (folder / name for name in ("text.txt", "o.safetensors", "out.gguf"))
    text.write_text((Path(__file__).parents[1] / "calibration/prose.txt").read_text()[:30000])
    for old in (seen, output):
        old.unlink(missing_ok=True)
    print(f"{source.name}: {source.stat().st_size / 1e9:.1f} GB, --memory {given.memory}")
    print("| command | peak resident | time |\n|---|---|---|", flush=True)
    rows = "--samples", given.samples, "--max-length", given.max_length
    how = "--memory", given.memory, "--device", "cpu", "--threads", "2"
    timed("observe", ["observe", source, "--calibration", text, *rows, *how, "-o", seen], log)
    timed("prune", ["prune", source, "--observations", seen, "-o", output], log)
    timed("verify", ["verify", output, "--source", source], log)


if __name__ == "__main__":
    main()
