"""Times the verification of GGUF files: as `verify` does it, and with `--exact`.

    python bench/verify.py
    python bench/verify.py --together --layers 48 --devices cpu cuda \
        --recipes unsloth-iq4km unsloth-iq4ks q4km

A checkpoint of Qwen3-30B-A3B's layer shape with random weights, 2.6 GB at the default size, and its
GGUF files (by default Q4_K_M and Q8_0) are written to a temporary folder, which is removed. Each
job runs in a process of its own, its input in the page cache, and prints a line:

    seconds             wall time
    cpu_seconds         processor time of all threads, which a busy machine changes least
    weights_per_second  weights of the model over seconds
    peak_rss_gib        peak resident memory of the job's process
    violations          0, or something is wrong
    exact               how many files were found to be equal byte for byte
    shares              where the threads' time went on a GPU; the rest is Python and waiting

`export` is the time to write the file, for comparison. Then all files are verified in one pass.
With `--together`, all files are written in one pass too, and none alone.
"""

from __future__ import annotations

import argparse
import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

from export import Figures, apart, export, measured, warm, write_model

from reap2gguf.checkpoint.checkpoint import Checkpoint
from reap2gguf.exporting.device_blocks import DeviceBlocks
from reap2gguf.ggml import load_ggml
from reap2gguf.gguf_files.imatrix import load_imatrix
from reap2gguf.gguf_files.tensor_bytes import TensorBytes
from reap2gguf.models.table import describe
from reap2gguf.options import DEVICES
from reap2gguf.progress import Silent
from reap2gguf.quantizing.kernels.cuda import Channel
from reap2gguf.quantizing.quantizer import Quantizer
from reap2gguf.quantizing.recipe import shipped_recipes
from reap2gguf.verifying import device_comparison
from reap2gguf.verifying.comparison import Comparison
from reap2gguf.verifying.exactness import Exactness
from reap2gguf.verifying.gguf_file import ExpectedGguf, GgufCheck, check_ggufs

RECIPES = ("q4km", "q8_0")


def verify(
    folder: Path,
    paths: Sequence[Path],
    every_type: bool,
    is_known: bool,
    n_threads: int,
    device: str,
) -> Figures:
    """Files against their checkpoint, measured in the process that calls this.

    Unless `is_known`, nothing is quantized again but the types that always are.
    """
    imatrix = load_imatrix(folder / "imatrix.gguf")
    exactness = Exactness(every_type, imatrix, load_ggml().label, tries_bytes=is_known)
    checks = [GgufCheck(path, ExpectedGguf(), exactness) for path in paths]
    with Checkpoint.open(folder) as checkpoint:
        opened = checkpoint, describe(checkpoint)
        n_weights = checkpoint.n_parameters * len(paths)
        with measured(n_weights) as figures, shares(figures, max(4, min(n_threads, 16))):
            found = check_ggufs(checks, opened, n_threads, Silent(), device)
    return figures | {"violations": len(found), "exact": sum(one.is_exact for one in checks)}


@contextmanager
def shares(figures: Figures, n_threads: int) -> Iterator[None]:
    """The part of the threads' time that each step of a verification on a GPU takes."""
    spent: dict[str, float] = {}
    lock = threading.Lock()

    def timed(name: str, step: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **named: Any) -> Any:
            begun = time.monotonic()
            try:
                return step(*arguments, **named)
            finally:
                with lock:
                    spent[name] = spent.get(name, 0.0) + time.monotonic() - begun

        return run

    begun = time.monotonic()
    with ExitStack() as stack:
        for name, (owner, step) in STEPS.items():
            stack.enter_context(patch.object(owner, step, timed(name, getattr(owner, step))))
        yield
    total = n_threads * (time.monotonic() - begun)
    figures["shares"] = {name: round(spent.get(name, 0.0) / total, 3) for name in STEPS}


STEPS: dict[str, tuple[Any, str]] = {
    "by range": (Comparison, "check"),
    "blocks": (DeviceBlocks, "rows_of"),
    "of them reading": (DeviceBlocks, "_send"),
    "of them the GPU": (Channel, "quantize"),
    "of them a sample": (DeviceBlocks, "_complete"),
    "reading files": (TensorBytes, "read"),
    "bytes": (device_comparison, "are_equal"),
    "values": (device_comparison, "is_within_its_type"),
    "dequantizing": (Quantizer, "dequantize"),
}
JOBS = {"within bounds": (False, False), "verify": (False, True), "exact": (True, True)}


def timed(
    model: Path,
    paths: Sequence[Path],
    recipes: Sequence[str],
    n_threads: int,
    devices: Sequence[str],
) -> None:
    """Time each job, its input in the page cache."""
    for device in devices:
        for job, how in JOBS.items():
            for file in (*paths, *model.glob("*.safetensors")):
                warm(file)
            figures = apart(verify, model, paths, *how, n_threads, device)
            line = {"job": job, "device": device, "recipes": list(recipes)}
            print(json.dumps(line | figures), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--recipes", nargs="+", default=RECIPES, choices=shipped_recipes())
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--devices", nargs="+", default=["cpu"], choices=DEVICES)
    parser.add_argument("--together", action="store_true", help="all files in one pass only")
    arguments = parser.parse_args()
    with TemporaryDirectory() as temporary:
        root = Path(temporary)
        model, n_threads = root / "model", arguments.threads
        write_model(model, arguments.layers, arguments.experts)
        n_bytes = sum(shard.stat().st_size for shard in model.glob("*.safetensors"))
        print(json.dumps({"checkpoint_gb": round(n_bytes / 1e9, 3)}), flush=True)
        paths = [root / f"{recipe}.gguf" for recipe in arguments.recipes]
        groups = [[recipe] for recipe in arguments.recipes]
        if arguments.together:
            groups = [arguments.recipes]
        for recipes in groups:
            figures = apart(export, model, root, tuple(recipes), n_threads)
            print(json.dumps({"job": "export", "recipes": recipes} | figures), flush=True)
            written = [root / f"{recipe}.gguf" for recipe in recipes]
            timed(model, written, recipes, n_threads, arguments.devices)
        if len(paths) > 1 and not arguments.together:
            timed(model, paths, arguments.recipes, n_threads, arguments.devices)


if __name__ == "__main__":
    main()
