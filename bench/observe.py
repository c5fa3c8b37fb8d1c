"""Times the program's own sweeps on a synthetic checkpoint of a real model's layer shape.

    python bench/observe.py --shape qwen3-30b-a3b --layers 4 --tokens 2097152 --max-length 2048 \\
        --floor --peer llm-compressor
    torchrun --nproc-per-node 2 bench/observe.py --shape qwen3-30b-a3b --folder CHECKPOINT

Weights are random, routing has its true width. Every sweep runs in a process of its own, twice, so
that kernels are compiled and tuned, and prints one line of JSON of the second time: tokens a second
and layer (of the sweep's layers; `whole` counts embedding and allocation in), peaks of GPU and host
memory, the share of time that it waited for weights, and with --parts where the rest went.
`--floor` adds the bare forward: the same layers and batches with nothing watching, and the same
through transformers' own experts and norms.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from parts import Stopwatch
from sparse_checkpoint import SHAPES
from synthetic import VOCABULARY, write_checkpoint
from torch import Tensor

from reap2gguf.checkpoint.checkpoint import Checkpoint
from reap2gguf.machine import peak_bytes
from reap2gguf.models.contract import MoeModel
from reap2gguf.models.table import describe
from reap2gguf.observing import decoder as decoder_module
from reap2gguf.observing.compute.experts import RoutedPairs
from reap2gguf.observing.compute.ranks import join, leave
from reap2gguf.observing.importance import ImportanceObserver
from reap2gguf.observing.observer import Arrays, LayerObserver
from reap2gguf.observing.saliency import SaliencyObserver
from reap2gguf.observing.sweep import sweep
from reap2gguf.observing.sweep_plan import resolve_device
from reap2gguf.options import ComputeOptions
from reap2gguf.progress import Task
from reap2gguf.terminal.option_types import read_size

PEERS = {"llm-compressor": Path(__file__).with_name("peer_llm_compressor.py")}


class Floor(LayerObserver):
    """Watches nothing: the forward alone."""

    def last_layer(self) -> int:
        return self._model.facts.n_layers - 1

    def attach(self, index: int, layer: torch.nn.Module) -> None:
        """Nothing is attached."""

    def see(self, pairs: RoutedPairs) -> None:
        """Nothing is seen."""

    def finish(self, index: int, sums: Sequence[Tensor], peaks: Sequence[Tensor]) -> None:
        """There are no sums."""

    def sums(self) -> Iterable[Tensor]:
        return ()

    def finished_sums(self) -> Arrays:
        return {}

    def restore(self, arrays: Arrays) -> None:
        """There are no sums."""


SWEEPS: dict[str, Any] = {
    "transformers": Floor,  # with its own grouped experts and norms
    "floor": Floor,
    "observe": SaliencyObserver,
    "imatrix": ImportanceObserver,
}


class Timed:
    """A Progress that notes when a sweep's layers begin and end."""

    begun = ended = 0.0

    @contextmanager
    def task(self, title: str, total: float, unit: str) -> Iterator[Task]:
        self.begun = time.monotonic()
        yield self
        self.ended = time.monotonic()

    def advance(self, amount: float = 1) -> None:
        """Nobody watches."""

    def at(self, step: str) -> None:
        """Nobody watches."""

    def note(self, text: str) -> None:
        print(text, file=sys.stderr)


def measure(arguments: argparse.Namespace, name: str) -> dict[str, Any]:
    """One sweep, timed; run in a process of its own."""
    if name == "transformers":
        decoder_module.IMPLEMENTATION = "grouped_mm"
        decoder_module.has_triton = lambda device: False
    options = ComputeOptions(
        arguments.device, memory=arguments.memory, spool=arguments.spool, scratch=arguments.folder
    )
    ranks = join()
    with Checkpoint.open(arguments.folder) as checkpoint:
        model = describe(checkpoint)
        rows = random_rows(arguments)
        # kernels are compiled and tuned for the shapes of the very batches
        first = run(checkpoint, model, rows[: arguments.warm_rows], name, options)
        if arguments.cold:
            forget(checkpoint)
        figures = run(checkpoint, model, rows, name, options)
        figures["seconds_first_time"] = first["seconds"]
        if arguments.parts:
            some = rows[: max(1, len(rows) // 4)]
            figures["parts"] = run(checkpoint, model, some, name, options, parts=True)["parts"]
    return {"shape": arguments.shape, "sweep": name, "processes": ranks.size} | figures


def run(
    checkpoint: Checkpoint,
    model: MoeModel,
    rows: list[np.ndarray],
    name: str,
    options: ComputeOptions,
    parts: bool = False,
) -> dict[str, Any]:
    """One sweep; its speed, memory and, with `parts`, where the time went."""
    device, _ = resolve_device(options)
    on_gpu = device.type == "cuda"
    observer: LayerObserver = SWEEPS[name](model)
    stopwatch = Stopwatch(device)
    if parts:
        stopwatch.watch(observer)
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    timed = Timed()
    begun = time.monotonic()
    report = sweep(checkpoint, model, rows, observer, options, name, timed)
    if on_gpu:
        torch.cuda.synchronize()
    seconds = timed.ended - timed.begun
    stopwatch.stop()
    passed = report.n_tokens * (observer.last_layer() + 1)
    figures = {
        "tokens": report.n_tokens,
        "tokens_per_second_and_layer": round(passed / seconds),
        "whole": round(passed / (time.monotonic() - begun)),
        "seconds": round(seconds, 2),
        "seconds_before": round(timed.begun - begun, 2),
        "seconds_whole": round(time.monotonic() - begun, 2),
        "waiting_for_weights": round(report.seconds_waited / seconds, 3),
        "peak_host_gib": round(peak_bytes() / 2**30, 2),
    }
    if on_gpu:
        free, total = torch.cuda.mem_get_info()
        reserved = torch.cuda.memory_reserved()
        context = total - free - reserved
        figures["peak_gpu_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        # what the whole process took of the GPU: CUDA's context and unused blocks included
        figures["process_gpu_gib"] = round((torch.cuda.max_memory_reserved() + context) / 2**30, 2)
    if parts:
        figures["parts"] = stopwatch.shares(seconds)
    return figures


def random_rows(arguments: argparse.Namespace) -> list[np.ndarray]:
    n_rows = arguments.tokens // arguments.max_length
    generator = np.random.default_rng(0)
    return list(generator.integers(0, VOCABULARY, (n_rows, arguments.max_length)))


def forget(checkpoint: Checkpoint) -> None:
    """Drop the checkpoint from the page cache, so that it is read from the disk."""
    for shard in checkpoint.shards:
        with shard.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-30b-a3b")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=2097152)
    parser.add_argument("--max-length", type=int, default=2048)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--memory", type=read_size, help="limit of GPU memory, such as 12GiB")
    parser.add_argument("--spool", default="auto", help="auto, device, host or disk")
    parser.add_argument("--floor", action="store_true", help="time the bare forward as well")
    parser.add_argument("--parts", action="store_true", help="say where the time goes")
    parser.add_argument("--cold", action="store_true", help="drop the checkpoint from the cache")
    parser.add_argument("--peer", choices=PEERS, help="time a peer as well")
    parser.add_argument("--warm-rows", type=int, help="rows of the first, untimed sweep; all")
    parser.add_argument("--same-layers", action="store_true", help="write them quickly")
    parser.add_argument("--sweeps", default="observe,imatrix", help="which, with commas")
    parser.add_argument("--folder", type=Path, help="checkpoint; written if it is not there")
    parser.add_argument("--one", choices=SWEEPS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one or "LOCAL_RANK" in os.environ:
        # a process of its own, or one of torchrun's
        for name in [arguments.one] if arguments.one else arguments.sweeps.split(","):
            figures = measure(arguments, name)
            if join().is_first:
                print(json.dumps(figures), flush=True)
        leave()
        return
    with tempfile.TemporaryDirectory() as made:
        arguments.folder = arguments.folder or Path(made)
        arguments.folder.mkdir(parents=True, exist_ok=True)
        if not (arguments.folder / "config.json").is_file():
            write_checkpoint(
                arguments.shape, arguments.layers, arguments.folder, arguments.same_layers
            )
        floors = ["transformers", "floor"] if arguments.floor else []
        for name in [*floors, *arguments.sweeps.split(",")]:
            again = [*sys.argv[1:], "--folder", str(arguments.folder), "--one", name]
            subprocess.run([sys.executable, __file__, *again], check=True)
        if arguments.peer:
            sys.exit(subprocess.run([sys.executable, str(PEERS[arguments.peer])]).returncode)


if __name__ == "__main__":
    main()
