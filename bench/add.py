"""Times a third recipe for a finished bundle, against quantizing and verifying that file alone.

    python bench/add.py

A checkpoint of Qwen3-30B-A3B's layer shape with random weights, 2.6 GB at the default size, is
built with two recipes; then `build` and `add` each give the bundle one more. Each job is a process
of its own and prints a line:

    seconds      wall time of the whole command
    cpu_seconds  processor time of all threads
    stages       what was computed, with seconds; "build, 2 recipes" has all of them

`quantize` and `verify` write the same file from the pruned safetensors and compare it with them:
the least time that an addition could take.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from export import Figures, apart, measured
from synthetic import write_checkpoint

from reap2gguf.checkpoint.checkpoint import Checkpoint
from reap2gguf.ggml import load_ggml
from reap2gguf.gguf_files.imatrix import load_imatrix
from reap2gguf.models.table import describe
from reap2gguf.progress import Silent
from reap2gguf.quantizing.recipe import load_recipe
from reap2gguf.verifying.exactness import Exactness
from reap2gguf.verifying.gguf_file import ExpectedGguf, check_gguf

NAME = "model-REAP-0.5"
_STAGE = re.compile(r"  (\w+) +([\d.]+) s   peak memory so far (.*)")


def run(job: str, *arguments: str) -> float:
    """One command in a process of its own; its wall time, after a line about it is printed."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    begun = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "reap2gguf", *arguments], capture_output=True, text=True, check=False
    )
    seconds = time.monotonic() - begun
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(done.stderr)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    stages = {name: float(took) for name, took, _ in _STAGE.findall(done.stdout)}
    report(job, {"seconds": seconds, "cpu_seconds": cpu}, stages)
    return seconds


def report(job: str, figures: Figures, stages: dict[str, float] | None = None) -> None:
    """Print a line about a job."""
    rounded = {name: round(figures[name], 1) for name in ("seconds", "cpu_seconds")}
    print(json.dumps({"job": job, **rounded, "stages": stages or {}}), flush=True)


def verify(folder: Path, path: Path, imatrix: Path, n_threads: int) -> Figures:
    """Every tensor of a file quantized again and compared, as a build does for small files."""
    exactness = Exactness(True, load_imatrix(imatrix), load_ggml().label)
    with Checkpoint.open(folder) as checkpoint:
        opened = checkpoint, describe(checkpoint)
        with measured(checkpoint.n_parameters) as figures:
            found = list(check_gguf(path, ExpectedGguf(), opened, n_threads, Silent(), exactness))
    return figures | {"violations": len(found)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--third", default="unsloth-iq4km")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()
    with TemporaryDirectory() as temporary:
        root, threads = Path(temporary), ["--threads", str(arguments.threads)]
        (model := root / "model").mkdir()
        write_checkpoint("qwen3-30b-a3b", arguments.layers, model, num_experts=arguments.experts)
        n_bytes = sum(shard.stat().st_size for shard in model.glob("*.safetensors"))
        print(json.dumps({"checkpoint_gb": round(n_bytes / 1e9, 3)}), flush=True)
        build = ["build", str(model), "--compression", "0.5", "--samples", "8", "--name", NAME]
        build += ["--max-length", "512", "--output", str(root / "build"), *threads]
        two = ["--recipe", "q4km", "--recipe", "q8_0"]
        run("build, 2 recipes", *build, *two)
        hf, gguf = root / "build" / NAME, root / "build" / f"{NAME}-GGUF"
        third, alone = ["--recipe", arguments.third], root / "alone.gguf"
        imatrix = gguf / "imatrix.gguf"
        quantize = ["quantize", str(hf), *third, "--imatrix", str(imatrix), "-o", str(alone)]
        least = run("quantize", *quantize, *threads)
        figures = apart(verify, hf, alone, imatrix, arguments.threads)
        if figures["violations"]:
            raise SystemExit("the file that was quantized alone is not exact")
        report("verify", figures)
        least += figures["seconds"]
        by_build = run("build, a third recipe", *build, *third)
        (gguf / f"{NAME}-{load_recipe(arguments.third).label}.gguf").unlink()
        by_add = run("add", "add", str(hf), *third, "--exact", *threads)
        ratios = {"build": round(by_build / least, 2), "add": round(by_add / least, 2)}
        print(json.dumps({"of quantize and verify": ratios}), flush=True)


if __name__ == "__main__":
    main()
