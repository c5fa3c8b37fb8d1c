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

from synthetic import write_checkpoint

from reap2gguf.quantizing.recipe import load_recipe

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
    line = {
        "job": job,
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu, 1),
        "stages": stages,
    }
    print(json.dumps(line), flush=True)
    return seconds


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
        imatrix = ["--imatrix", str(gguf / "imatrix.gguf")]
        least = run("quantize", "quantize", str(hf), *third, *imatrix, "-o", str(alone), *threads)
        least += run("verify", "verify", str(hf), str(alone), "--exact", *threads)
        by_build = run("build, a third recipe", *build, *third)
        (gguf / f"{NAME}-{load_recipe(arguments.third).label}.gguf").unlink()
        by_add = run("add", "add", str(hf), *third, "--exact", *threads)
        ratios = {"build": round(by_build / least, 2), "add": round(by_add / least, 2)}
        print(json.dumps({"of quantize and verify": ratios}), flush=True)


if __name__ == "__main__":
    main()
