"""Compares `plan` with reality: builds of several shapes, each with what was predicted for it.

    python bench/plan.py FOLDER [NAME ...]
    python bench/plan.py /dev/shm/model full-size --device cuda --output build

Each build runs as a user runs it, in a process of its own, after `plan --json` with the same
options. A thread samples the process's resident memory and the bytes of its output, work folder
included, twenty times a second. A row per build: what was planned, what was measured, and the ratio
of the two, for time (from the start of the program to its end), peak memory and peak disk. A row
per stage follows, with its processor seconds: on a machine with other work, the clock's seconds say
little. FOLDER keeps the checkpoints for the next run, and `results.jsonl` all figures.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from reap2gguf.resources import example_checkpoint, shipped_folder

SAMPLE_SECONDS = 0.05
TICKS = os.sysconf("SC_CLK_TCK")
QWEN3, QWEN35 = "qwen3-30b-a3b", "qwen3.5-35b-a3b"
SMALL = ("--max-length", "512", "--samples")


@dataclass(frozen=True)
class Case:
    """A build: its model, the example or a shape with layers and experts, and its options."""

    name: str
    model: str | tuple[str, int, int]
    options: tuple[str, ...]


def typed(name: str, file_type: str) -> tuple[str, str]:
    """A recipe of one of llama.cpp's file types, as a TOML file."""
    text = f'title = "{file_type}"\nlabel = "{file_type}"\nfile_type = "{file_type}"\n'
    return name, text


RECIPES = dict([typed("iq4_xs.toml", "IQ4_XS"), typed("iq3_xxs.toml", "IQ3_XXS")])
CASES = (
    Case("example", "example", ("--recipe", "q4km")),
    Case("example-short", "example", ("--recipe", "q8_0", "--compression", "0.5", *SMALL, "16")),
    Case("qwen3.5-2-layers", (QWEN35, 2, 16), ("--recipe", "unsloth-iq4km,q8_0", *SMALL, "8")),
    Case("2-layers-q4km", (QWEN3, 2, 32), ("--recipe", "q4km", *SMALL, "16")),
    Case(
        "4-layers-mixed",
        (QWEN3, 4, 64),
        ("--recipe", "unsloth-iq4km", "--recipe", "q8_0", "--compression", "0.5", *SMALL, "16"),
    ),
    Case("2-layers-iq4_xs", (QWEN3, 2, 32), ("--recipe", "iq4_xs.toml", *SMALL, "32")),
    Case(
        "2-layers-iq3_xxs",
        (QWEN3, 2, 32),
        ("--recipe", "iq3_xxs.toml", "--compression", "0.5", *SMALL, "8"),
    ),
    Case(
        "qwen3.5-4-layers",
        (QWEN35, 4, 32),
        ("--recipe", "q4km", "--recipe", "q8_0", "--spool", "disk", *SMALL, "16"),
    ),
)


# Not run by default: 57 GB of weights, for a machine with a GPU. 2.1 M tokens of text.
FULL_SIZE = Case(
    "full-size",
    (QWEN3, 48, 128),
    (
        *("--recipe", "unsloth-iq4km,unsloth-iq4ks,q4km", "--compression", "0.5"),
        *("--calibration", "long.txt", "--samples", "1024", "--max-length", "2048"),
    ),
)
TEXT_BYTES = 10_000_000


@dataclass
class Sampler:
    """Watches a process and a folder until the process ends."""

    process: subprocess.Popen[bytes]
    output: Path
    memory: int = 0
    disk: int = 0
    last_cpu: float = 0.0
    ended: dict[str, tuple[float, float]] = field(default_factory=dict)  # wall, processor

    def run(self) -> None:
        while self.process.poll() is None:
            self.sample()
            time.sleep(SAMPLE_SECONDS)

    def sample(self) -> None:
        """One look; a process that ends meanwhile has no files any more."""
        folder = Path("/proc") / str(self.process.pid)
        try:
            words = (folder / "stat").read_text().rpartition(")")[2].split()
            status = (folder / "status").read_text()
        except (FileNotFoundError, ProcessLookupError):
            return
        cpu = (int(words[11]) + int(words[12]) + int(words[13]) + int(words[14])) / TICKS
        peak = [line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")]
        self.memory = max(self.memory, *(1024 * int(number) for number in peak), 0)
        self.disk = max(self.disk, folder_bytes(self.output) + unnamed_bytes(folder))
        for marks in self.output.glob(".work/*/stages.json"):
            try:
                done = [k for k, v in json.loads(marks.read_text()).items() if v["is_done"]]
            except (OSError, ValueError):
                continue  # replaced just now; the next look finds it whole
            for name in done:
                self.ended.setdefault(name, (time.monotonic(), cpu))
        self.last_cpu = cpu


def folder_bytes(folder: Path) -> int:
    """What the files of a folder take on the disk."""
    total = 0
    for root, _, files in os.walk(folder):
        for name in files:
            try:
                total += 512 * os.lstat(os.path.join(root, name)).st_blocks
            except FileNotFoundError:
                continue  # removed or renamed just now
    return total


def unnamed_bytes(process: Path) -> int:
    """What a process's unnamed files take, such as a spool."""
    total = 0
    with suppress(OSError):  # the process has ended
        for link in (process / "fd").iterdir():
            with suppress(FileNotFoundError):  # closed just now
                if "(deleted)" in os.readlink(link):
                    total += 512 * os.stat(link).st_blocks
    return total


def measure(case: Case, folder: Path, output: Path, device: str) -> dict[str, Any]:
    """Plan and build a case."""
    shutil.rmtree(output, ignore_errors=True)
    model = model_folder(case, folder)
    files = (".toml", ".txt")
    options = [str(folder / word) if word.endswith(files) else word for word in case.options]
    arguments = [str(model), *options, "--device", device, "--output", str(output)]
    program = [sys.executable, "-m", "reap2gguf"]
    said = subprocess.run([*program, "plan", "--json", *arguments], check=True, stdout=-1)
    planned = json.loads(said.stdout)["estimate"]
    begun = time.monotonic()
    command = [*program, "build", "--name", "measured", *arguments]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        sampler = Sampler(process, output)
        thread = threading.Thread(target=sampler.run)
        thread.start()
        if process.wait():
            raise SystemExit(f"{case.name}: {(folder / 'log').read_text()[-2000:]}")
    seconds = time.monotonic() - begun
    thread.join()
    record = json.loads((output / ".work/.measured.finished.json").read_text())
    final = folder_bytes(output)
    shutil.rmtree(output)
    stages, before = {}, 0.0
    walls = {stage["name"]: stage["seconds"] for stage in record["stages"]}
    for name, (_, cpu) in sorted(sampler.ended.items(), key=lambda item: item[1]):
        stages[name] = (walls[name], cpu - before)
        before = cpu
    for name, wall in walls.items():
        stages.setdefault(name, (wall, 0.0))
    return {
        "case": case.name,
        "planned": planned,
        "seconds": seconds,
        "cpu": sampler.last_cpu,
        "memory": sampler.memory,
        "disk": max(sampler.disk, final),
        "final": final,
        "stages": stages,
        "load": os.getloadavg()[0],
    }


def model_folder(case: Case, folder: Path) -> Path:
    """The model of a case; a synthetic one is written once."""
    if case.model == "example":
        return example_checkpoint()
    assert not isinstance(case.model, str)
    shape, layers, experts = case.model
    path = folder / f"{shape}-{layers}-{experts}"
    if not path.is_dir():
        from synthetic import write_checkpoint

        made = path.with_name("being-made")
        shutil.rmtree(made, ignore_errors=True)
        made.mkdir()
        write_checkpoint(shape, layers, made, num_experts=experts)
        made.rename(path)
    return path


def long_text() -> str:
    """The texts of the default calibration again and again, each time with another number."""
    texts = [path.read_text() for path in sorted(shipped_folder("calibration").glob("*.txt"))]
    pieces: list[str] = []
    n_bytes = 0
    while n_bytes < TEXT_BYTES:
        piece = f"Part {len(pieces)}\n\n{texts[len(pieces) % len(texts)]}\n\n"
        pieces.append(piece)
        n_bytes += len(piece.encode())
    return "".join(pieces)


def rows(found: dict[str, Any]) -> Iterator[str]:
    """A measured case as rows of a Markdown table."""
    planned, stages = found["planned"], found["stages"]
    figures = (
        ("seconds", planned["seconds"], found["seconds"], "s", 1),
        ("memory", planned["memory_bytes"], found["memory"], "GiB", 2**30),
        ("disk", planned["disk_peak_bytes"], found["disk"], "GiB", 2**30),
    )
    cells = [
        f"{before / scale:.2f} {unit} / {after / scale:.2f} {unit} = **{before / after:.2f}**"
        for _, before, after, unit, scale in figures
    ]
    yield f"| {found['case']} | {' | '.join(cells)} | {found['cpu']:.0f} | {found['load']:.1f} |"
    each = (
        f"{name} {planned['stages'][name]:.1f} / {wall:.1f} ({cpu:.1f})"
        for name, (wall, cpu) in stages.items()
    )
    yield f"| | {', '.join(each)} | | | | |"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("cases", nargs="*", help="names of builds; all but full-size by default")
    parser.add_argument("--output", type=Path, help="where to build; in FOLDER by default")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    arguments = parser.parse_args()
    arguments.folder.mkdir(exist_ok=True)
    output = arguments.output or arguments.folder / "build"
    if FULL_SIZE.name in arguments.cases:
        (arguments.folder / "long.txt").write_text(long_text())
    for name, text in RECIPES.items():
        (arguments.folder / name).write_text(text)
    print("| build | time: planned / measured | peak memory | peak disk | cpu s | load |")
    print("|---|---|---|---|---|---|")
    for case in (*CASES, FULL_SIZE):
        if case.name not in (arguments.cases or [one.name for one in CASES]):
            continue
        found = measure(case, arguments.folder, output, arguments.device)
        with (arguments.folder / "results.jsonl").open("a") as file:
            file.write(json.dumps(found) + "\n")
        print("\n".join(rows(found)), flush=True)


if __name__ == "__main__":
    main()
