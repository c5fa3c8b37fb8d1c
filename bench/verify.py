"""Times the verification of GGUF files: within bounds, and with every tensor quantized again.

    python bench/verify.py

A checkpoint of Qwen3-30B-A3B's layer shape with random weights, 2.6 GB at the default size, and its
GGUF files (by default Q4_K_M and Q8_0) are written to a temporary folder, which is removed. Each
job runs in a process of its own, its input in the page cache, and prints a line:

    seconds             wall time
    cpu_seconds         processor time of all threads, which a busy machine changes least
    weights_per_second  weights of the model over seconds
    peak_rss_gib        peak resident memory of the job's process
    violations          0, or something is wrong

`export` is the time to write the file, for comparison: quantizing again takes about as long.
"""

from __future__ import annotations

import argparse
import json
import os
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
from reap2gguf.verifying.gguf_file import ExpectedGguf, check_gguf

RECIPES = ("q4km", "q8_0")


def verify(folder: Path, path: Path, every_type: bool, n_threads: int) -> Figures:
    """One file against its checkpoint, measured in the process that calls this."""
    exactness = Exactness(every_type, load_imatrix(folder / "imatrix.gguf"), load_ggml().label)
    with Checkpoint.open(folder) as checkpoint:
        opened = checkpoint, describe(checkpoint)
        with measured(checkpoint.n_parameters) as figures:
            found = list(check_gguf(path, ExpectedGguf(), opened, n_threads, Silent(), exactness))
    return figures | {"violations": len(found)}


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
        for recipe in arguments.recipes:
            path = root / f"{recipe}.gguf"
            figures = apart(export, model, root, (recipe,), n_threads)
            print(json.dumps({"job": "export", "recipe": recipe} | figures), flush=True)
            for every_type in (False, True):
                for file in (path, *model.glob("*.safetensors")):
                    warm(file)
                job = {"job": "exact" if every_type else "within bounds", "recipe": recipe}
                figures = apart(verify, model, path, every_type, n_threads)
                print(json.dumps(job | figures), flush=True)
            path.unlink()


if __name__ == "__main__":
    main()
