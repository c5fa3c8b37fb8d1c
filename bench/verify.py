"""Times the verification of GGUF files: as `verify` does it, and with `--exact`.

    python bench/verify.py

A checkpoint of Qwen3-30B-A3B's layer shape with random weights, 2.6 GB at the default size, and its
GGUF files (by default Q4_K_M and Q8_0) are written to a temporary folder, which is removed. Each
job runs in a process of its own, its input in the page cache, and prints a line:

    seconds             wall time
    cpu_seconds         processor time of all threads, which a busy machine changes least
    weights_per_second  weights of the model over seconds
    peak_rss_gib        peak resident memory of the job's process
    violations          0, or something is wrong
    exact               how many files were found to be equal byte for byte

`export` is the time to write the file, for comparison. Then all files are verified in one pass.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from export import Figures, apart, export, measured, warm, write_model

from reap2gguf.checkpoint.checkpoint import Checkpoint
from reap2gguf.ggml import load_ggml
from reap2gguf.gguf_files.imatrix import load_imatrix
from reap2gguf.models.table import describe
from reap2gguf.progress import Silent
from reap2gguf.quantizing.recipe import shipped_recipes
from reap2gguf.verifying.exactness import Exactness
from reap2gguf.verifying.gguf_file import ExpectedGguf, GgufCheck, check_ggufs

RECIPES = ("q4km", "q8_0")


def verify(
    folder: Path, paths: Sequence[Path], every_type: bool, is_known: bool, n_threads: int
) -> Figures:
    """Files against their checkpoint, measured in the process that calls this.

    Unless `is_known`, nothing is quantized again but the types that always are.
    """
    imatrix = load_imatrix(folder / "imatrix.gguf")
    exactness = Exactness(every_type, imatrix, load_ggml().label, tries_bytes=is_known)
    checks = [GgufCheck(path, ExpectedGguf(), exactness) for path in paths]
    with Checkpoint.open(folder) as checkpoint:
        opened = checkpoint, describe(checkpoint)
        with measured(checkpoint.n_parameters * len(paths)) as figures:
            found = check_ggufs(checks, opened, n_threads, Silent())
    return figures | {"violations": len(found), "exact": sum(one.is_exact for one in checks)}


JOBS = {"within bounds": (False, False), "verify": (False, True), "exact": (True, True)}


def timed(model: Path, paths: Sequence[Path], recipes: Sequence[str], n_threads: int) -> None:
    """Time each job, its input in the page cache."""
    for job, how in JOBS.items():
        for file in (*paths, *model.glob("*.safetensors")):
            warm(file)
        figures = apart(verify, model, paths, *how, n_threads)
        print(json.dumps({"job": job, "recipes": list(recipes)} | figures), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--recipes", nargs="+", default=RECIPES, choices=shipped_recipes())
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()
    with TemporaryDirectory() as temporary:
        root = Path(temporary)
        model, n_threads = root / "model", arguments.threads
        write_model(model, arguments.layers, arguments.experts)
        n_bytes = sum(shard.stat().st_size for shard in model.glob("*.safetensors"))
        print(json.dumps({"checkpoint_gb": round(n_bytes / 1e9, 3)}), flush=True)
        paths = [root / f"{recipe}.gguf" for recipe in arguments.recipes]
        for recipe, path in zip(arguments.recipes, paths, strict=True):
            figures = apart(export, model, root, (recipe,), n_threads)
            print(json.dumps({"job": "export", "recipes": [recipe]} | figures), flush=True)
            timed(model, [path], [recipe], n_threads)
        if len(paths) > 1:
            timed(model, paths, arguments.recipes, n_threads)


if __name__ == "__main__":
    main()
