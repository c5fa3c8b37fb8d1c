"""Times a repair on a synthetic checkpoint of a real model's layer shape, and says what 48 take.

    python bench/repair.py --shape qwen3-30b-a3b --layers 3 --tokens 524288 --memory 70GiB,24GiB

Weights are random, routing has its true width, half of the experts are dropped. For each limit of
memory one process repairs the layers and prints a line of JSON: how the Gram matrix was held,
seconds of each layer (the first one compiles and tunes kernels), the mean of the others times
--of layers, peaks of GPU and host memory, and the error before and after. `--way never` asks for
one way of holding the Gram matrix, whatever the memory allows.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from sparse_checkpoint import SHAPES
from synthetic import VOCABULARY, write_checkpoint

from reap2gguf.checkpoint.checkpoint import Checkpoint
from reap2gguf.machine import peak_bytes
from reap2gguf.models.table import describe
from reap2gguf.options import ComputeOptions
from reap2gguf.progress import Task
from reap2gguf.pruning.view import PrunedView
from reap2gguf.repairing.gram_size import WAYS
from reap2gguf.repairing.record import RepairFolder
from reap2gguf.repairing.sweep import repair
from reap2gguf.terminal.option_types import read_size


class Timed:
    """A Progress that notes when each layer begins, and prints the notes."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.notes: list[str] = []

    @contextmanager
    def task(self, title: str, total: float, unit: str) -> Iterator[Task]:
        yield self
        if title.startswith("Repairing"):
            self.times.append(time.monotonic())

    def advance(self, amount: float = 1) -> None:
        """Nobody watches."""

    def at(self, step: str) -> None:
        """A layer begins."""
        self.times.append(time.monotonic())

    def note(self, text: str) -> None:
        self.notes.append(text)
        print(text, file=sys.stderr, flush=True)


def measure(arguments: argparse.Namespace) -> dict[str, object]:
    """One repair, timed; run in a process of its own."""
    generator, timed = np.random.default_rng(0), Timed()
    n_rows = arguments.tokens // arguments.max_length
    rows = list(generator.integers(0, VOCABULARY, (n_rows, arguments.max_length)))
    with Checkpoint.open(arguments.folder) as checkpoint, tempfile.TemporaryDirectory() as made:
        model = describe(checkpoint)
        ids = tuple(range(0, model.facts.n_experts, 2))
        view = PrunedView(checkpoint, model, dict.fromkeys(model.facts.moe_layers, ids))
        options = ComputeOptions(
            arguments.device,
            memory=None if arguments.memory is None else read_size(arguments.memory),
            scratch=Path(made),
        )
        folder = RepairFolder(Path(made) / "repaired", "bench")
        begun = time.monotonic()
        found = repair(view, rows, arguments.kind, folder, options, timed, arguments.way)
        whole = time.monotonic() - begun
    seconds = np.diff(timed.times)
    later = seconds[1:] if len(seconds) > 1 else seconds
    figures: dict[str, object] = {
        "shape": arguments.shape,
        "kind": arguments.kind,
        "memory": arguments.memory,
        "tokens": n_rows * arguments.max_length,
        "held": next((line for line in timed.notes if line.startswith("repair:")), ""),
        "seconds_of_layers": [round(float(one), 2) for one in seconds],
        f"seconds_of_{arguments.of}_layers": round(float(later.mean()) * arguments.of, 1),
        "seconds_whole": round(whole, 2),
        "peak_host_gib": round(peak_bytes() / 2**30, 2),
        "errors": {k: [one.facts.error_before, one.facts.error_after] for k, one in found.items()},
        "alphas": {layer: one.facts.alpha for layer, one in found.items()},
    }
    if torch.cuda.is_available() and arguments.device != "cpu":
        figures["peak_gpu_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        figures["gpu"] = torch.cuda.get_device_name()
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-30b-a3b")
    parser.add_argument("--layers", type=int, default=3, help="that are repaired")
    parser.add_argument("--of", type=int, default=48, help="layers of the whole model")
    parser.add_argument("--tokens", type=int, default=524288)
    parser.add_argument("--max-length", type=int, default=2048)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--memory", help="limits of GPU memory, with commas: 70GiB,24GiB")
    parser.add_argument("--kind", choices=("ridge", "scale"), default="ridge")
    parser.add_argument("--way", choices=WAYS, help="how the Gram matrix is held")
    parser.add_argument("--same-layers", action="store_true", help="write them quickly")
    parser.add_argument("--folder", type=Path, help="checkpoint; written if it is not there")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments)), flush=True)
        return
    with tempfile.TemporaryDirectory() as made:
        folder = arguments.folder or Path(made)
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "config.json").is_file():
            write_checkpoint(arguments.shape, arguments.layers, folder, arguments.same_layers)
        for memory in (arguments.memory or "").split(","):
            again = [*sys.argv[1:], "--folder", str(folder), "--one"]
            if memory:
                again += ["--memory", memory]
            subprocess.run([sys.executable, __file__, *again], check=True)


if __name__ == "__main__":
    main()
