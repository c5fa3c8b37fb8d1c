"""How fast files are written, hashed, compared and read, against `dd` on the same disk.

    python bench/io.py FOLDER --gigabytes 1 --threads 8

Writes a checkpoint of random weights into FOLDER (on the disk in question), prunes it to three
quarters of its experts, and removes everything again. Each way is measured several times, in turn,
and the best is printed with all of them: other programs and the host of a virtual machine slow a
disk down, and nothing makes it faster than it is. "cold" is after `posix_fadvise(DONTNEED)`.
The ratio is to the faster of two `dd`: with the page cache and a flush at the end, and direct.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

from synthetic import write_checkpoint

from reap2gguf.bundle.sums import hash_files
from reap2gguf.checkpoint.checkpoint import Checkpoint
from reap2gguf.disk import write_back
from reap2gguf.disk.hashing import Hashes
from reap2gguf.machine import peak_bytes
from reap2gguf.models.table import describe
from reap2gguf.progress import Silent
from reap2gguf.pruning.view import PrunedView
from reap2gguf.pruning.write import write_pruned
from reap2gguf.verifying.hf_folder import check_pruned

EXPERT_BYTES = 3 * 768 * 2048 * 2  # of one expert of one layer
N_EXPERTS = 64
BLOCK = "bs=16M"


@dataclass
class Bench:
    folder: Path
    n_threads: int
    rates: dict[str, list[float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.source, self.target = self.folder / "source", self.folder / "target"
        self.raw = self.folder / "raw"

    def measure(self, title: str, n_bytes: int, work: Callable[[], object]) -> None:
        begun = time.perf_counter()
        work()
        self.rates.setdefault(title, []).append(n_bytes / (time.perf_counter() - begun) / 1e9)

    def drop(self, *folders: Path) -> None:
        """Forget files that are in the page cache."""
        for file in (file for folder in folders for file in folder.glob("*.safetensors")):
            drop_file(file)

    def one_round(self) -> None:
        checkpoint = Checkpoint.open(self.source)
        with checkpoint:
            model = describe(checkpoint)
            kept = tuple(range(0, N_EXPERTS, 4)) + tuple(range(1, N_EXPERTS, 4))
            kept = tuple(sorted(kept + tuple(range(2, N_EXPERTS, 4))))
            pruned = PrunedView(checkpoint, model, dict.fromkeys(model.facts.moe_layers, kept))
            size = pruned.n_bytes
            self._dd(size)
            for title, n_threads, early, hashed in (
                ("write, threads: 1, flushed only at the end", 1, False, False),
                ("write, threads: 1", 1, True, False),
                (f"write, threads: {self.n_threads}", self.n_threads, True, False),
                (f"write and hash, threads: {self.n_threads}", self.n_threads, True, True),
            ):
                self._write(pruned, title, n_threads, early, hashed)
            self.drop(self.source)
            self._write(pruned, "write and hash, source cold", self.n_threads, True, True)
            files = list(self.target.glob("*.safetensors"))
            for n_threads in (1, self.n_threads):
                self.measure(
                    f"compare with the source, threads: {n_threads}", size,
                    lambda n=n_threads: check(self.target, pruned, n),
                )  # fmt: skip
            self.measure("hash", size, lambda: hash_files(files, self.n_threads))
            self.drop(self.target)
            self.measure("hash, cold", size, lambda: hash_files(files, self.n_threads))
            self.drop(self.source, self.target)
            self.measure(
                "compare, both cold (bytes of both)", 2 * size,
                lambda: check(self.target, pruned, self.n_threads),
            )  # fmt: skip
        shutil.rmtree(self.target)

    def _dd(self, n_bytes: int) -> None:
        count = f"count={n_bytes // 2**24}"
        for title, flags in (("dd, flushed", ()), ("dd, direct", ("oflag=direct",))):
            self.raw.unlink(missing_ok=True)
            made = [f"of={self.raw}", "if=/dev/zero", BLOCK, count, "conv=fsync", *flags]
            self.measure(f"write: {title}", n_bytes, lambda made=made: dd(made))
        for title, flags in (("dd", ()), ("dd, direct", ("iflag=direct",))):
            drop_file(self.raw)
            read = ["of=/dev/null", f"if={self.raw}", BLOCK, *flags]
            self.measure(f"read: {title}", n_bytes, lambda read=read: dd(read))
        self.raw.unlink()

    def _write(
        self, pruned: PrunedView, title: str, n_threads: int, early: bool, hashed: bool
    ) -> None:
        shutil.rmtree(self.target, ignore_errors=True)
        self.target.mkdir()
        step = write_back.STEP_BYTES

        def work() -> None:
            with Hashes() if hashed else nullcontext() as hashes:
                write_pruned(
                    pruned, self.target, Silent(), 5 * 10**9 // 16,
                    n_threads=n_threads, hashes=hashes,
                )  # fmt: skip
                if hashes is not None:
                    hashes.found()

        write_back.STEP_BYTES = step if early else 2**60
        try:
            self.measure(title, pruned.n_bytes, work)
        finally:
            write_back.STEP_BYTES = step

    def table(self) -> str:
        best = {title: max(rates) for title, rates in self.rates.items()}
        floor = {
            kind: max(rate for title, rate in best.items() if title.startswith(f"{kind}: dd"))
            for kind in ("write", "read")
        }
        lines = ["| | GB/s, best | all | against dd |", "|---|---|---|---|"]
        for title, rate in best.items():
            kind = "write" if title.startswith("write") else "read"
            of_disk = kind == "write" or "cold" in title or title.startswith("read")
            ratio = f"{rate / floor[kind]:.2f}" if of_disk else "not of the disk"
            rates = ", ".join(f"{one:.2f}" for one in self.rates[title])
            lines.append(f"| {title} | {rate:.2f} | {rates} | {ratio} |")
        return "\n".join(lines)


def dd(arguments: list[str]) -> None:
    subprocess.run(["dd", "status=none", *arguments], check=True)


def drop_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def check(folder: Path, pruned: PrunedView, n_threads: int) -> None:
    # shards are smaller here than those of `build`, which is no difference in their values
    violations = check_pruned(folder, pruned, Silent(), n_threads)
    assert not violations, violations


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    layers = max(1, round(arguments.gigabytes * 1e9 / EXPERT_BYTES / N_EXPERTS))
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        bench = Bench(Path(name), arguments.threads)
        bench.source.mkdir()
        write_checkpoint("qwen3-30b-a3b", layers, bench.source, num_experts=N_EXPERTS)
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = peak_bytes()
        for _ in range(arguments.rounds):
            bench.one_round()
        print(bench.table())
    print(f"peak memory: {(peak_bytes() - before) / 2**20:.0f} MiB more than at the beginning")


if __name__ == "__main__":
    main()
