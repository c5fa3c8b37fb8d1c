"""Measures the memory, temporary files and time of `evaluate` at a real model's layer shape.

    python bench/evaluate.py FOLDER
    python bench/evaluate.py FOLDER --memory 2816MiB --memory 8GiB --spool disk --chunks 16
    python bench/evaluate.py FOLDER --memory 12GiB --device cuda --chunks 586

FOLDER keeps the variants (11 GB, made once): Qwen3.5-35B-A3B's layer shape with random weights, one
DeltaNet layer and one of full attention, 256 experts of width 512 and the vocabulary of 248,320; a
model of 128 experts in the place of its pruned form, whose embedding and head are the same file;
and three GGUF files of that one. `evaluate` runs as a user runs it, in a process of its own, which
is watched fifty times a second: its peak memory, on a GPU that of the GPU too, and the files that
it holds open or has in its folder beside the inputs, which may be no larger than the hidden states.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from full import gpu_bytes
from plan import long_text
from synthetic import write_apart

from reap2gguf.terminal.option_types import read_size

MIB = 2**20
SHAPE, LAYERS, HIDDEN, CHUNK = "qwen3.5-35b-a3b", 2, 2048, 512
OTHERS = {"vocab_size": 248320, "full_attention_interval": 2}
RECIPES = ("Q8_0", "Q4_K_M", "IQ4_XS")
PROGRAM = (sys.executable, "-m", "reap2gguf")


@dataclass
class Watched:
    """What a process took at most."""

    memory: int = 0
    gpu: int = 0
    files: int = 0  # bytes that are open for writing, or in its folder
    seconds: float = 0.0


class Variants:
    """The folder with all variants."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.source, self.pruned = folder / "source", folder / "pruned"
        self.files = [folder / f"{recipe}.gguf" for recipe in RECIPES]

    def make(self) -> None:
        """Write those that are not there."""
        for path, more in ((self.source, {}), (self.pruned, {"num_experts": 128})):
            if not (path / "config.json").is_file():
                shutil.rmtree(path, ignore_errors=True)
                path.mkdir(parents=True)
                write_apart(SHAPE, LAYERS, path, **OTHERS, **more)
        ends = self.pruned / "ends.safetensors"  # the same numbers in both
        if ends.stat().st_nlink == 1:
            ends.unlink()
            os.link(self.source / ends.name, ends)
        for path, recipe in zip(self.files, RECIPES, strict=True):
            if not path.is_file():
                command = [*PROGRAM, "quantize", self.pruned, "-r", recipe, "-o", path, "-q"]
                subprocess.run(list(map(str, command)), check=True)

    @property
    def all(self) -> list[Path]:
        return [self.source, self.pruned, *self.files]


def written(process: int, inputs: Path) -> int:
    """Bytes of the files that a process has open beside its inputs: unnamed ones too."""
    total = 0
    with suppress(OSError):  # the process has ended
        for entry in os.scandir(f"/proc/{process}/fd"):
            with suppress(FileNotFoundError):  # closed just now
                path = os.readlink(entry.path)
                if path.startswith("/") and not path.startswith(("/dev/", "/proc/", "/sys/")):
                    is_input = path.startswith(f"{inputs}/") and not path.endswith(" (deleted)")
                    if not is_input and os.access(entry.path, os.W_OK):
                        total += entry.stat().st_size
    return total


def run(
    command: Sequence[str | Path], inputs: Path, scratch: Path, log: Path, on_gpu: bool
) -> Watched:
    """Run a command to its end, watched."""
    found, begun = Watched(), time.monotonic()
    with (
        log.open("w") as file,
        subprocess.Popen(list(map(str, command)), stdout=file, stderr=file, cwd=scratch) as process,
    ):
        status = Path(f"/proc/{process.pid}/status")
        while process.poll() is None:
            lines = status.read_text().splitlines()
            peaks = [int(line.split()[1]) for line in lines if line.startswith("VmHWM")]
            found.memory = max(found.memory, *(1024 * peak for peak in peaks), 0)
            found.gpu = max(found.gpu, gpu_bytes() if on_gpu else 0)
            named = sum(path.stat().st_blocks * 512 for path in scratch.iterdir())
            found.files = max(found.files, named + written(process.pid, inputs))
            time.sleep(0.02)
    if process.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}: {log.read_text()[-2000:]}")
    found.seconds = time.monotonic() - begun
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--memory", action="append", default=[])
    parser.add_argument("--spool", default="auto")
    parser.add_argument("--chunks", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    variants = Variants(folder)
    variants.make()
    text = folder / "text.txt"
    text.write_text(long_text())
    on_gpu = arguments.device == "cuda"
    spooled = arguments.chunks * CHUNK * HIDDEN * 4 * len(variants.all)
    print(f"hidden states of {len(variants.all)} variants: {spooled / MIB:,.0f} MiB")
    print(f"limit on the memory of the {'GPU' if on_gpu else 'process'}")
    print("| `--memory` | peak: host | GPU | share of the limit | temporary files | seconds |")
    print("|---|---|---|---|---|---|")
    for limit in arguments.memory or ["4GiB"]:
        scratch = folder / "scratch"
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        command = [
            *PROGRAM, "evaluate", *variants.all, "--text", text, "--chunk", str(CHUNK),
            "--chunks", str(arguments.chunks), "--memory", limit, "--spool", arguments.spool,
            "--device", arguments.device, "--threads", str(arguments.threads),
            "-o", scratch / "found.json",
        ]  # fmt: skip
        found = run(command, folder, scratch, folder / "log", on_gpu)
        limited = found.gpu if on_gpu else found.memory
        print(
            f"| {limit} | {found.memory / MIB:,.0f} MiB | {found.gpu / MIB:,.0f} MiB | "
            f"{limited / read_size(limit):.2f} | {found.files / MIB:,.0f} MiB | "
            f"{found.seconds:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
