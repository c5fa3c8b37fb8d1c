"""Compares the memory that each command takes with what is promised for it.

    python bench/memory.py FOLDER

FOLDER keeps a checkpoint of Qwen3-30B-A3B's layer shape with random weights (2 layers of 64
experts, 1.2 GiB) and the outputs. Each command runs as a user runs it, in a process of its own,
which is watched fifty times a second; the kernel keeps its peak. Promised are: `--memory` for a
pass and for a build, whose `plan` says how much of it; and for the other commands what the same
command takes for the bundled example, and what it says that it holds besides.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from synthetic import write_checkpoint

from reap2gguf.checkpoint.checkpoint import Checkpoint
from reap2gguf.exporting.memory import export_bytes
from reap2gguf.models.table import describe
from reap2gguf.pruning.write import HELD_BYTES
from reap2gguf.quantizing.recipe import load_recipes
from reap2gguf.quantizing.resolve import resolve
from reap2gguf.resources import example_checkpoint
from reap2gguf.terminal.option_types import read_size

MIB = 2**20
THREADS = 2
COMPARED_BYTES = 7 * 16 * MIB  # of each thread of `verify`: reap2gguf/verifying/comparison.py
PROGRAM = (sys.executable, "-m", "reap2gguf")
RUNS = ("--samples", "4", "--max-length", "512", "--device", "cpu", "--threads", str(THREADS))


def peak(arguments: Sequence[str | Path], log: Path) -> int:
    """The peak resident memory of a command, in bytes."""
    command = [*PROGRAM, *map(str, arguments)]
    most = 0
    with log.open("w") as file, subprocess.Popen(command, stdout=file, stderr=file) as process:
        status = Path(f"/proc/{process.pid}/status")
        while process.poll() is None:
            lines = status.read_text().splitlines()
            found = [int(line.split()[1]) for line in lines if line.startswith("VmHWM")]
            most = max(most, *(1024 * number for number in found), 0)
            time.sleep(0.02)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}: {log.read_text()[-2000:]}")
    return most


class Bench:
    """The folder, and a line for each command."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.source = folder, folder / "source"
        self.example = example_checkpoint()
        self.log = folder / "log"
        if not (self.source / "config.json").is_file():
            self.source.mkdir(parents=True, exist_ok=True)
            write_checkpoint("qwen3-30b-a3b", 2, self.source, num_experts=64)
        self.text = folder / "text.txt"
        self.text.write_text(
            (Path(__file__).parents[1] / "calibration/prose.txt").read_text()[:30000]
        )
        print("| command | promised | measured | ratio |\n|---|---|---|---|", flush=True)

    def line(self, name: str, promised: int, measured: int) -> None:
        """Print what was promised and measured."""
        sizes = " | ".join(f"{n_bytes / MIB:,.0f} MiB" for n_bytes in (promised, measured))
        print(f"| {name} | {sizes} | {measured / promised:.2f} |", flush=True)

    def clear(self, *names: str) -> None:
        for name in names:
            shutil.rmtree(self.folder / name, ignore_errors=True)

    def passes(self, limit: str) -> None:
        """Both passes within a limit."""
        promised = read_size(limit)
        observations, imatrix = self.folder / "o.safetensors", self.folder / "i.gguf"
        texts = ("--calibration", self.text)
        memory = ("--memory", limit)
        measured = peak(
            ["observe", self.source, *texts, *RUNS, *memory, "-o", observations], self.log
        )
        self.line(f"observe --memory {limit}", promised, measured)
        text = ("--text", self.text, "--chunks", "4", "--device", "cpu", "--threads", str(THREADS))
        measured = peak(["imatrix", self.source, *text, *memory, "-o", imatrix], self.log)
        self.line(f"imatrix --memory {limit}", promised, measured)

    def build(self, recipes: str, *memory: str) -> None:
        """A build: what its plan says, within `--memory` where that is given."""
        self.clear("build")
        texts = ("--calibration", self.text, "--imatrix-text", self.text)
        arguments = [
            self.source, "--recipe", recipes, "--compression", "0.5", *texts, *RUNS,
            "--imatrix-chunks", "4", *memory, "--output", self.folder / "build", "--name", "model",
        ]  # fmt: skip
        said = subprocess.run(
            [*PROGRAM, "plan", "--json", *map(str, arguments)], check=True, capture_output=True
        )
        promised = json.loads(said.stdout)["estimate"]["memory_bytes"]
        measured = peak(["build", *arguments], self.log)
        name = " ".join(("build --recipe", recipes, *memory))
        self.line(f"{name} (`plan`)", promised, measured)
        if memory:
            self.line(f"{name} (`--memory`)", read_size(memory[1]), measured)

    def others(self) -> None:
        """Export, prune and verify, each against the same command for the example."""
        output, small = self.folder / "output", self.folder / "small"
        with Checkpoint.open(self.source) as checkpoint:
            model = describe(checkpoint)
            tensors = model.gguf_tensors(checkpoint.tensors)
            (asked,) = load_recipes(["q4km"], {}, ())
            recipe = resolve(asked, tensors, model.facts, model.facts.n_experts, False)
            held = export_bytes(tensors, [recipe.tensor_types()], THREADS)
        pairs = ((self.example, small), (self.source, output))
        self.clear("output", "small")
        for _, to in pairs:
            to.mkdir()
        threads = ("--threads", str(THREADS))
        first, second = (
            peak(["quantize", model, "--recipe", "q4km", *threads, "-o", to / "m.gguf"], self.log)
            for model, to in pairs
        )
        self.line("quantize", first + held, second)
        built = ("--recipe", "q4km", "--name", "model", "--calibration", self.text, *RUNS)
        peak(["build", self.example, *built, "--output", small / "build"], self.log)
        folders = (small / "build", self.folder / "build")  # the last build of `main`
        first, second = (
            peak(["verify", to / "model-GGUF", "--source", model, *threads], self.log)
            for (model, _), to in zip(pairs, folders, strict=True)
        )
        self.line("verify", first + THREADS * COMPARED_BYTES, second)
        for model, to in pairs:
            texts = ("--calibration", self.text)
            peak(["observe", model, *texts, *RUNS, "-o", to / "o.safetensors"], self.log)
        half = ("--compression", "0.5")
        first, second = (
            peak(
                ["prune", model, "--observations", to / "o.safetensors", *half, "-o", to / "hf"],
                self.log,
            )
            for model, to in pairs
        )
        self.line("prune", first + HELD_BYTES, second)
        self.clear("output", "small", "build")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path)
    bench = Bench(parser.parse_args().folder)
    for limit in ("1600MiB", "2500MiB"):
        bench.passes(limit)
    bench.build("q4km,q8_0", "--memory", "1600MiB")
    bench.build("q8_0", "--memory", "1600MiB")
    bench.build("q4km")
    bench.others()


if __name__ == "__main__":
    main()
