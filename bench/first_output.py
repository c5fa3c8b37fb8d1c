"""How long each command is silent: the time to its first output, its longest gap, and its total.

Runs every command that works on the bundled example, with its output in a pipe and in a terminal of
80x24, and prints one line for each. `--raw FOLDER` also keeps what was printed, byte for byte.

    python bench/first_output.py
    python bench/first_output.py --only build --raw raw
"""

from __future__ import annotations

import argparse
import errno
import fcntl
import os
import pty
import struct
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "examples" / "tiny-qwen3-moe"
SCREEN = (24, 80)  # lines, columns
LONG = 3.0  # seconds of silence that a user notices


@dataclass(frozen=True)
class Timing:
    """What one run of a command took, in seconds, and what it printed."""

    status: int
    first: float
    longest: float
    total: float
    printed: bytes


def commands(model: Path, folder: Path) -> dict[str, Sequence[str]]:
    """The commands in an order in which each finds what it needs."""
    m, seen, pruned = str(model), str(folder / "seen.safetensors"), str(folder / "pruned")
    small = ("--samples", "8", "--max-length", "64")
    build = ("build", m, "--recipe", "q8_0", "--output", str(folder / "build"), *small)
    bundle = str(folder / "build" / f"{model.name}-REAP-0.25-GGUF")
    return {
        "--help": ("--help",),
        "recipes list": ("recipes", "list"),
        "plan": ("plan", m, "--recipe", "q8_0"),
        "build": build,
        "build again": build,
        "verify": ("verify", bundle),
        "push --dry-run": ("push", bundle, "owner/name", "--dry-run"),
        "observe": ("observe", m, *small, "-o", seen),
        "prune": ("prune", m, "--observations", seen, "-o", pruned),
        "imatrix": (
            *("imatrix", pruned, "--text", str(ROOT / "README.md"), "--chunk", "64"),
            *("-o", str(folder / "imatrix.gguf")),
        ),
        "quantize": ("quantize", pruned, "--recipe", "q8_0", "-o", str(folder / "x.gguf")),
        "doctor": ("doctor",),
    }


def through_pipe(words: Sequence[str], environment: dict[str, str]) -> Timing:
    """Run a command with both outputs in one pipe."""
    read, write = os.pipe()
    return _timed(words, environment, read, write)


def through_terminal(words: Sequence[str], environment: dict[str, str]) -> Timing:
    """Run a command in a terminal."""
    read, write = pty.openpty()
    fcntl.ioctl(write, termios.TIOCSWINSZ, struct.pack("HHHH", *SCREEN, 0, 0))
    return _timed(words, environment, read, write)


def _timed(words: Sequence[str], environment: dict[str, str], read: int, write: int) -> Timing:
    begun = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "reap2gguf", *words],
        stdin=subprocess.DEVNULL,
        stdout=write,
        stderr=write,
        env=environment,
    )
    os.close(write)
    times, pieces = [begun], []
    for piece in _pieces(read):
        times.append(time.monotonic())
        pieces.append(piece)
    os.close(read)
    status = process.wait()
    times.append(time.monotonic())
    gaps = [after - before for before, after in pairwise(times)]
    return Timing(status, gaps[0], max(gaps), times[-1] - begun, b"".join(pieces))


def _pieces(file: int) -> Iterator[bytes]:
    while True:
        try:
            piece = os.read(file, 65536)
        except OSError as error:
            if error.errno != errno.EIO:  # a terminal that the last process has left
                raise
            return
        if not piece:
            return
        yield piece


def main() -> None:
    """Print one line per command and kind of output."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--only", help="run commands that begin with this word alone")
    parser.add_argument("--raw", type=Path, help="folder for what was printed")
    given = parser.parse_args()
    environment = os.environ | {"TERM": "xterm-256color", "HF_HUB_OFFLINE": "1"}
    ways: dict[str, Callable[[Sequence[str], dict[str, str]], Timing]] = {
        "pipe": through_pipe,
        "terminal": through_terminal,
    }
    print(f"{'command':<16} {'output':<9} {'first':>7} {'gap':>7} {'total':>7}")
    for way, run in ways.items():
        with tempfile.TemporaryDirectory() as folder:
            for name, words in commands(given.model, Path(folder)).items():
                if given.only and not name.startswith(given.only):
                    continue
                took = run(words, environment)
                remark = f"  exit code {took.status}" if took.status else ""
                remark += "  SILENT" if took.longest > LONG else ""
                seconds = f"{took.first:>6.1f}s {took.longest:>6.1f}s {took.total:>6.1f}s"
                print(f"{name:<16} {way:<9} {seconds}{remark}", flush=True)
                if given.raw:
                    given.raw.mkdir(parents=True, exist_ok=True)
                    (given.raw / f"{name.replace(' ', '-')}.{way}").write_bytes(took.printed)


if __name__ == "__main__":
    main()
