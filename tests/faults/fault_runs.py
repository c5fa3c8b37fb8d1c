"""Builds that are killed, or whose disk fails, at one point, and are then resumed.

Run as a script to do so everywhere, from the repository's root:

    python -m tests.faults.fault_runs kill --points 120

kill        the process is killed
cut         killed, and what was not flushed to the disk by then is lost
time        killed by the clock
interrupt   interrupted, by SIGINT or SIGTERM
fail        a write, rename or flush fails with ENOSPC or EIO
read        a read fails with EIO
"""

from __future__ import annotations

import argparse
import errno
import json
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reap2gguf.bundle.manifest import Manifest
from reap2gguf.progress import Silent
from reap2gguf.verifying.bundle import verify_bundle
from tests.faults.fault_layer import KINDS, tree
from tests.faults.fault_zygote import Outcome, Zygote
from tests.tiny import TinyQwen3Moe, TinyQwen35Moe

NAME = "model"
MODELS = {"qwen3": TinyQwen3Moe(n_shards=2), "qwen3.5": TinyQwen35Moe(n_shards=2)}
STAGES = ("texts", "observe", "prune", "imatrix", "export", "verify")
TEXT = "".join(f"Line {i} says that {i} times {i} is {i * i}, and no more.\n" for i in range(60))


@dataclass
class Rig:
    """A tiny checkpoint, a text, and a process that builds."""

    folder: Path
    zygote: Zygote
    threads: int = 1  # with more, stages overlap, and operations come in another order each time
    model: str = "qwen3"

    def __post_init__(self) -> None:
        self.source = MODELS[self.model].write(self.folder / "source")
        self.text = self.folder / "text.txt"
        self.text.write_text(TEXT)
        self.output = self.folder / "out"

    def build(
        self, fault: dict[str, Any] | None = None, more: Sequence[str] = (), **named: Any
    ) -> Outcome:
        """Run `build` into the output folder, with more arguments."""
        if fault is not None:
            fault = {"folder": str(self.output), **fault}
        return self.zygote.run(
            "build", self.source, "--recipe", "q4km", "--recipe", "q8_0", "--name", NAME,
            "--output", self.output, "--calibration", self.text, "--samples", 4,
            "--max-length", 64, "--chunk", 64, "--device", "cpu", "--threads", self.threads, *more,
            fault=fault, **named,
        )  # fmt: skip

    def reference(self, kinds: tuple[str, ...]) -> tuple[dict[str, bytes], list[str]]:
        """The bundle of a build that nothing interrupts, and its operations in order."""
        outcome = self.build({"kinds": kinds})
        assert outcome.code == 0, outcome.errors
        bundle = tree(self.output)
        shutil.rmtree(self.output)
        return bundle, outcome.log

    def finished_stages(self) -> set[str]:
        """The stages whose marks or artefacts say that they are done."""
        work = self.output / ".work"
        done = {
            stage
            for stage, folder in (("texts", "texts"), ("observe", "observations"))
            if list((work / folder).glob("*.safetensors"))
        }
        marks = work / NAME / "stages.json"
        if marks.is_file():
            done |= {
                name for name, mark in json.loads(marks.read_text()).items() if mark["is_done"]
            }
        return done

    def check_finals(self) -> None:
        """Whatever has a final name is whole: its files are those that its manifest lists."""
        for folder in (self.output / NAME, self.output / f"{NAME}-GGUF"):
            if folder.is_dir():
                manifest = Manifest.load(folder)
                assert manifest.name == NAME
                present = {file.name for file in folder.iterdir()}
                assert not {name for name in present if name.endswith(".part")}
        both = self.output / f"{NAME}-GGUF"
        if both.is_dir():
            assert verify_bundle(both, 1, Silent()).violations == ()

    def resume(self, bundle: dict[str, bytes]) -> Counter[str]:
        """Resume, compare and clear away; which finished stages were done again."""
        done = self.finished_stages()
        self.check_finals()
        outcome = self.build()
        assert outcome.code == 0, outcome.errors
        made = tree(self.output)
        assert made.keys() == bundle.keys()
        for name in bundle:
            assert made[name] == bundle[name], f"{name} differs"
        is_finished = f"{NAME}: up to date;" in outcome.errors
        again = {stage for stage in done if f"{stage}: up to date, reused" not in outcome.errors}
        shutil.rmtree(self.output)
        return Counter() if is_finished else Counter(again)


def points(total: int, wanted: int) -> list[int]:
    """`wanted` numbers below `total`, evenly spread; all of them for 0 or too many."""
    if not 0 < wanted < total:
        return list(range(total))
    if wanted == 1:
        return [total // 2]
    return [round(i * (total - 1) / (wanted - 1)) for i in range(wanted)]


def is_one_line(outcome: Outcome) -> bool:
    """Whether a failure is reported as it should be: in one line, the last one."""
    lines = outcome.errors.splitlines()
    return len(outcome.error_lines) == 1 and lines[-1] in outcome.error_lines


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("what", choices=("kill", "cut", "time", "interrupt", "fail", "read"))
    parser.add_argument("--points", type=int, default=0, help="how many; 0: all")
    parser.add_argument("--threads", type=int, default=1, help="with 2, stages overlap")
    parser.add_argument("--model", choices=tuple(MODELS), default="qwen3")
    arguments = parser.parse_args()
    kinds = {"fail": ("write", "rename", "fsync"), "read": ("read",)}.get(arguments.what, KINDS)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch, Zygote(Path(scratch)) as zygote:
        rig = Rig(Path(scratch), zygote, arguments.threads, arguments.model)
        bundle, log = rig.reference(kinds)
        seconds = rig.build().seconds
        shutil.rmtree(rig.output)
        chosen = points(1000 if arguments.what == "time" else len(log), arguments.points)
        print(f"{len(log)} operations, a build takes {seconds:.1f} s, {len(chosen)} points")
        again: Counter[str] = Counter()
        stopped: Counter[str] = Counter()
        for at in chosen:
            outcome = _stop(rig, arguments.what, kinds, at, seconds)
            reached = rig.finished_stages()
            stopped[next((stage for stage in STAGES if stage not in reached), "publish")] += 1
            # what cannot be read back has failed its check
            codes = {"fail": (2,), "read": (1, 2), "interrupt": (130,)}.get(arguments.what, ())
            if codes:
                assert outcome.code in codes, (at, log[at], outcome.code, outcome.errors)
                assert is_one_line(outcome), (at, log[at], outcome.errors)
            again += rig.resume(bundle)
        print(f"stopped in {dict(stopped)}")
        print(f"finished stages that were done again: {sum(again.values())} {dict(again)}")
        print(f"every bundle byte-identical, {time.monotonic() - began:.0f} s")


def _stop(rig: Rig, what: str, kinds: tuple[str, ...], at: int, seconds: float) -> Outcome:
    if what == "time":
        return rig.build(after=seconds * (at + 1) / 1000)
    if what in ("fail", "read"):
        error = (errno.ENOSPC, errno.EIO)[at % 2] if what == "fail" else errno.EIO
        return rig.build({"kinds": kinds, "at": at, "error": error})
    if what == "interrupt":
        return rig.build({"kinds": kinds, "at": at, "signal": (2, 15)[at % 2]})
    return rig.build({"kinds": kinds, "at": at, "power_cut": what == "cut"})


if __name__ == "__main__":
    main()
