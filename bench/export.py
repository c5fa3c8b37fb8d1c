"""Times the export of a synthetic Qwen3-MoE checkpoint to three GGUF files in one pass.

    python bench/export.py FOLDER --peer llama.cpp
    python bench/export.py FOLDER --model /dev/shm/model --layers 48 --dd

FOLDER receives a checkpoint of Qwen3-30B-A3B's layer shape with random weights and a random
imatrix, unless an earlier run left them there, and the files: 10 GB at the default size. Each
measured job runs in a process of its own, its input in the page cache unless `--cold` has our
export read from the disk, and prints a line:

    seconds             wall time, until the bytes are on the disk (llama.cpp does not wait)
    cpu_seconds         processor time of all threads, which a busy machine changes least
    weights_per_second  weights of the model, each counted once per file, over seconds
    peak_rss_gib        peak resident memory of the job's process
    temporary_bytes     bytes written that are in none of the files (llama.cpp: its BF16 source)
    shares              where the threads' time went; the rest is Python, waiting and idling

`--peer` times llama.cpp's quantizer on the same three files, from a BF16 GGUF that is written
before, and compares every tensor's type and bytes. `--dd` lets `dd` write as many bytes to the same
disk before and after, flushed at the end and past the page cache.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from gguf import GGUFReader

from reap2gguf.checkpoint.checkpoint import Checkpoint
from reap2gguf.exporting.header_facts import HeaderNames
from reap2gguf.exporting.model_files import WeightedBy, export_model
from reap2gguf.gguf_files.imatrix import Imatrix, ImatrixEntry, load_imatrix, save_gguf
from reap2gguf.machine import peak_bytes
from reap2gguf.models.table import describe
from reap2gguf.progress import Silent
from reap2gguf.quantizing.quantizer import Quantizer
from reap2gguf.quantizing.recipe import load_recipe, shipped_recipes
from reap2gguf.quantizing.resolve import resolve

RECIPES = ("unsloth-iq4km", "unsloth-iq4ks", "q4km")
READ_BYTES = 2**24
Recipes = tuple[str, ...]
Figures = dict[str, Any]


def write_model(folder: Path, n_layers: int, n_experts: int) -> None:
    """Random weights in Qwen3-30B-A3B's layer shape, and random importance."""
    from synthetic import write_checkpoint  # torch is no part of the memory that is measured

    folder.mkdir(parents=True)
    write_checkpoint("qwen3-30b-a3b", n_layers, folder, num_experts=n_experts)
    with Checkpoint.open(folder) as checkpoint:
        save_gguf(random_imatrix(checkpoint), folder / "imatrix.gguf")


def random_imatrix(checkpoint: Checkpoint) -> Imatrix:
    """Sums for every matrix that llama-imatrix sees; the last expert of a layer saw no token."""
    generator = np.random.default_rng(1)
    entries = {}
    for tensor in describe(checkpoint).gguf_tensors(checkpoint.tensors):
        if tensor.always_f32 or not tensor.name.startswith("blk."):
            continue
        counts = generator.integers(1, 5000, tensor.n_matrices)
        counts[1:][-1:] = 0
        spread = generator.lognormal(0, 2, (tensor.n_matrices, tensor.n_columns))
        sums = (spread * counts[:, None]).astype(np.float32)
        entries[tensor.name] = ImatrixEntry(tensor.name, sums, counts)
    return Imatrix(entries, "random", 1000, 512)


def export(folder: Path, target: Path, recipes: Recipes, n_threads: int) -> Figures:
    """One pass of our own export, measured in the process that calls this."""
    imatrix = load_imatrix(folder / "imatrix.gguf")
    with Checkpoint.open(folder) as checkpoint:
        model = describe(checkpoint)
        tensors = model.gguf_tensors(checkpoint.tensors)
        files = {
            target / f"{name}.gguf": resolve(
                load_recipe(name), tensors, model.facts, model.facts.n_experts, True
            )
            for name in recipes
        }
        n_weights = checkpoint.n_parameters * len(files)
        written = bytes_written()
        with measured(n_weights) as figures, clocks(figures, n_threads):
            weighted_by = None if imatrix is None else WeightedBy(imatrix)
            export_model(
                checkpoint, model, HeaderNames("Synthetic"), files, weighted_by, n_threads, Silent()
            )
    kept = sum(path.stat().st_size for path in files)
    # what pads tensors is never written, so the difference can be below zero
    figures["temporary_bytes"] = max(0, bytes_written() - written - kept)
    return figures


def llama_export(
    source: Path, target: Path, imatrix: Path, recipes: Recipes, n_threads: int
) -> Figures:
    """The same files by llama.cpp, one after the other, in the process that calls this."""
    from llama_quantize import quantize

    importance = load_imatrix(imatrix)
    n_weights = sum(int(tensor.n_elements) for tensor in GGUFReader(source).tensors)
    seconds = {}
    with measured(n_weights * len(recipes)) as figures:
        for name in recipes:
            begun = time.monotonic()
            quantize(source, target / f"{name}.gguf", load_recipe(name), importance, n_threads)
            seconds[name] = round(time.monotonic() - begun, 2)
    return figures | {"temporary_bytes": source.stat().st_size, "seconds_of": seconds}


@contextmanager
def measured(n_weights: int) -> Iterator[Figures]:
    """Figures of what runs inside, filled when it ends."""
    figures: Figures = {}
    begun, cpu_begun = time.monotonic(), time.process_time()
    yield figures
    seconds = time.monotonic() - begun
    figures["seconds"] = round(seconds, 2)
    figures["cpu_seconds"] = round(time.process_time() - cpu_begun, 2)
    figures["weights_per_second"] = round(n_weights / seconds)
    figures["peak_rss_gib"] = round(peak_bytes() / 2**30, 2)


def bytes_written() -> int:
    """Bytes that this process has passed to the kernel to write."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("wchar:"))


@contextmanager
def clocks(figures: Figures, n_threads: int) -> Iterator[None]:
    """Shares of `n_threads` threads' time that pass in reading, quantizing and writing."""
    spent: dict[str, float] = {}
    lock = threading.Lock()

    def timed(share: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            begun = time.monotonic()
            result = function(*arguments)
            with lock:
                spent[share] = spent.get(share, 0) + time.monotonic() - begun
            return result

        return run

    begun = time.monotonic()
    with (
        patch.object(Checkpoint, "read_bytes", timed("reading", Checkpoint.read_bytes)),
        patch.object(Quantizer, "quantize", timed("quantizing", Quantizer.quantize)),
        patch.object(os, "pwrite", timed("writing", os.pwrite)),
        patch.object(os, "fsync", timed("syncing", os.fsync)),
    ):
        yield
    total = (time.monotonic() - begun) * n_threads
    figures["shares"] = {share: round(seconds / total, 3) for share, seconds in spent.items()}


def apart(function: Callable[..., Figures], *arguments: Any) -> Figures:
    """Run in a fresh process, earlier outputs on the disk, so that nothing else is measured."""
    os.sync()
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def warm(path: Path) -> None:
    """Read a file, so that the page cache holds it."""
    with path.open("rb") as file:
        while file.read(READ_BYTES):
            pass


def cool(path: Path) -> None:
    """Have the page cache forget a file."""
    os.sync()  # it keeps what is not on the disk yet
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def remove_files(folder: Path, recipes: Recipes) -> None:
    """Remove what an earlier run has written, so that it takes no part of the disk."""
    for name in recipes:
        (folder / f"{name}.gguf").unlink(missing_ok=True)


def export_apart(
    folder: Path, target: Path, recipes: Recipes, n_threads: int, cold: bool = False
) -> Figures:
    remove_files(target, recipes)
    for shard in folder.glob("*.safetensors"):
        cool(shard) if cold else warm(shard)
    return apart(export, folder, target, recipes, n_threads)


def n_different_tensors(ours: Path, theirs: Path) -> int:
    """Tensors whose type or bytes differ, or that only one file has."""
    left, right = ({t.name: t for t in GGUFReader(path).tensors} for path in (ours, theirs))
    different = left.keys() ^ right.keys()
    for name in left.keys() & right.keys():
        same_type = left[name].tensor_type == right[name].tensor_type
        if not same_type or not np.array_equal(left[name].data, right[name].data):
            different.add(name)
    return len(different)


def compare_with_llama_cpp(
    model: Path, folder: Path, recipes: Recipes, n_threads: int, our_seconds: float
) -> None:
    peer = folder / "peer"
    source, imatrix = peer / "bf16.gguf", model / "imatrix.gguf"
    if not peer.exists():
        peer.mkdir()
        export_apart(model, peer, ("bf16",), n_threads)
    remove_files(peer, recipes)
    warm(source)
    figures = apart(llama_export, source, peer, imatrix, recipes, n_threads)
    print(json.dumps({"job": "llama.cpp"} | figures), flush=True)
    different = {
        name: n_different_tensors(folder / f"{name}.gguf", peer / f"{name}.gguf")
        for name in recipes
    }
    ratio = round(our_seconds / figures["seconds"], 3)
    print(json.dumps({"job": "comparison", "ratio": ratio, "different_tensors": different}))


def dd_rates(folder: Path, n_bytes: int) -> Figures:
    """GB that `dd` writes in a second, in either way."""
    rates = {}
    for way in ("conv=fdatasync", "oflag=direct"):
        path, begun = folder / "dd", time.monotonic()
        command = ["dd", "if=/dev/zero", f"of={path}", "bs=16M", f"count={n_bytes >> 24}", way]
        try:
            subprocess.run(command, check=True, capture_output=True)
            rates[way] = round(n_bytes / 1e9 / (time.monotonic() - begun), 2)
        finally:
            path.unlink(missing_ok=True)
    return rates


def compare_with_dd(
    model: Path, folder: Path, recipes: Recipes, n_threads: int, n_bytes: int
) -> None:
    """Our export between two runs of `dd`, for disks change."""
    remove_files(folder, recipes)
    os.sync()
    before = dd_rates(folder, n_bytes)
    figures = export_apart(model, folder, recipes, n_threads)
    remove_files(folder, recipes)
    after = dd_rates(folder, n_bytes)
    ours = round(n_bytes / 1e9 / figures["seconds"], 2)
    ratios = [round(ours / max(rates.values()), 2) for rates in (before, after)]
    print(json.dumps({"job": "dd", "before": before, "gb_per_second": ours, "after": after}))
    print(json.dumps({"job": "comparison", "ratios": ratios} | figures))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--recipes", nargs="+", default=RECIPES, choices=shipped_recipes())
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--cold", action="store_true", help="the checkpoint from the disk")
    parser.add_argument("--peer", choices=["llama.cpp"])
    parser.add_argument("--model", type=Path, help="where it is, or is written")
    parser.add_argument("--dd", action="store_true", help="let dd write as many bytes")
    arguments = parser.parse_args()
    model = arguments.model or arguments.folder / "model"
    recipes = tuple(arguments.recipes)
    if not model.exists():
        write_model(model, arguments.layers, arguments.experts)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    figures = export_apart(model, arguments.folder, recipes, arguments.threads, arguments.cold)
    paths = [arguments.folder / f"{name}.gguf" for name in recipes]
    n_bytes = sum(path.stat().st_size for path in paths)
    figures["gb_per_second"] = round(n_bytes / 1e9 / figures["seconds"], 2)
    print(json.dumps({"job": "reap2gguf"} | figures), flush=True)
    if arguments.peer:
        compare_with_llama_cpp(
            model, arguments.folder, recipes, arguments.threads, figures["seconds"]
        )
    if arguments.dd:
        compare_with_dd(model, arguments.folder, recipes, arguments.threads, n_bytes)


if __name__ == "__main__":
    main()
