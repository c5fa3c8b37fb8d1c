"""Does each damage to a copy of a sound bundle, and says whether the program noticed.

Four ways to notice: BESIDE, `verify` with the safetensors beside the GGUF files; SOURCE, the same
with the model that was pruned; BUILD, the build itself, whose files are damaged after they were
written and before they are verified; PUBLISH, the same build when the damage is done after that.

`python -m tests.mutations.runs [--run NAME] [--group G] [--name TEXT] [MODEL ...]` prints a table
and what was missed. A model is one of FAMILIES or the folder of a checkpoint.
"""

from __future__ import annotations

import argparse
import filecmp
import os
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from inspect import signature
from pathlib import Path
from typing import Any
from unittest.mock import patch

from reap2gguf.api import builds
from reap2gguf.building import pipeline, verify_stage
from reap2gguf.building.workdir import Workdir
from reap2gguf.bundle.layout import gguf_name
from reap2gguf.errors import Reap2ggufError
from tests.mutations import (
    both_sides,
    bundle_files,
    gguf_keys,
    gguf_tensors,
    hf_config,
    hf_files,
    hf_tensors,
    manifest,
    projector,
    strays,
)
from tests.mutations.damage import Absent, Copy, Damage, Sight, same_file
from tests.mutations.models import FAMILIES, NAME, Sound, make, more_models

_GROUPS = (
    gguf_tensors, gguf_keys, hf_config, hf_files, strays, hf_tensors, projector, bundle_files,
    manifest, both_sides,
)  # fmt: skip

_OF_VALUES = frozenset("GSBI")
# what a user would see as a traceback
_CRASHES = (
    ArithmeticError,
    AttributeError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)


class Run(Enum):
    """Who has to notice."""

    BESIDE = "beside"
    SOURCE = "source"
    BUILD = "build"
    PUBLISH = "publish"

    def must_catch(self, damage: Damage) -> bool:
        """Whether it has what it needs to notice."""
        if damage.harmless or damage.sight is Sight.RECORD:
            return False
        return self is not Run.BESIDE or damage.sight is Sight.BESIDE


@dataclass(frozen=True)
class Outcome:
    """What came of a damage. `words` are the violations, or the error that ended the check."""

    damage: Damage
    words: tuple[str, ...]
    crashed: bool = False  # another error than the program's own: a user would see a traceback
    seconds: float = 0.0

    @property
    def caught(self) -> bool:
        return bool(self.words) and not self.crashed

    def __str__(self) -> str:
        if self.crashed:
            return f"{self.damage}: a traceback that ends in {self.words[0].splitlines()[-1]}"
        return f"{self.damage}: {self.words[0] if self.words else 'nothing was said'}"


@dataclass(frozen=True)
class Report:
    """All outcomes of a run over one model."""

    run: Run
    outcomes: Sequence[Outcome]

    @property
    def required(self) -> list[Outcome]:
        return [one for one in self.outcomes if self.run.must_catch(one.damage)]

    @property
    def missed(self) -> list[Outcome]:
        """What had to be caught and was not."""
        return [one for one in self.required if not one.caught]

    @property
    def false_alarms(self) -> list[Outcome]:
        """Harmless, and not passed."""
        return [one for one in self.outcomes if one.damage.harmless and one.words]

    @property
    def share(self) -> float:
        """Caught, of what had to be."""
        return 1 - len(self.missed) / len(self.required)


def catalog(sound: Sound) -> list[Damage]:
    """Every damage for a bundle; some turn out to be Absent when they are applied."""
    found = [damage for group in _GROUPS for damage in group.damages(sound)]
    names = [str(damage) for damage in found]
    assert len(set(names)) == len(names), sorted(n for n in names if names.count(n) > 1)
    return found


def run_all(run: Run, sound: Sound, damages: Iterable[Damage], scratch: Path) -> Report:
    """Apply each damage to its own copy; those that are Absent have no outcome.

    Before that, a copy without damage must pass: else everything would seem to be caught.
    """
    if run in (Run.BESIDE, Run.SOURCE):
        violations = _verify(run, sound, None, scratch / "copy")
        assert not violations, violations
    else:
        damages = [damage for damage in damages if damage.group != "M"]  # it is written last
    outcomes = (_apply(run, sound, damage, scratch / "copy") for damage in damages)
    return Report(run, [outcome for outcome in outcomes if outcome is not None])


def _apply(run: Run, sound: Sound, damage: Damage, folder: Path) -> Outcome | None:
    start = time.monotonic()
    try:
        if run in (Run.BUILD, Run.PUBLISH):
            words = _build(run, sound, damage, folder)
        else:
            words = _verify(run, sound, damage, folder)
    except Absent:
        return None
    except Reap2ggufError as error:
        words = (str(error),)
    except _CRASHES:
        return Outcome(damage, (traceback.format_exc(limit=-3),), True, time.monotonic() - start)
    return Outcome(damage, words, seconds=time.monotonic() - start)


def _link_tree(source: Path, target: Path) -> None:
    shutil.copytree(source, target, copy_function=os.link)


def _verify(run: Run, sound: Sound, damage: Damage | None, folder: Path) -> tuple[str, ...]:
    shutil.rmtree(folder, ignore_errors=True)
    _link_tree(sound.hf, folder / NAME)
    _link_tree(sound.gguf, folder / gguf_name(NAME))
    copy = Copy(folder / NAME, folder / gguf_name(NAME), sound)
    if damage is not None:
        damage.apply(copy)
        _check_changed(copy, sound.hf, sound.gguf, damage)
        copy.fix_hashes(damage.fix)
    more: dict[str, Any] = {}
    if run is Run.SOURCE:
        offered = signature(builds.verify).parameters
        # to quantize again takes the longest, and shows damage to values alone
        is_exact = damage is None or damage.group in _OF_VALUES
        wanted = {"source": sound.source, "exact": is_exact}
        more = {name: value for name, value in wanted.items() if name in offered}
    return builds.verify(copy.gguf, threads=1, **more).violations


def _check_changed(copy: Copy, hf: Path, gguf: Path, damage: Damage) -> None:
    """A damage that changes no byte would be one that nobody can find.

    The models here have no equal tensors; others may.
    """
    if _same(copy.hf, hf) and _same(copy.gguf, gguf):
        assert copy.sound.family not in FAMILIES, f"{damage} changes nothing"
        raise Absent("what it exchanges is equal")


def _same(folder: Path, other: Path) -> bool:
    """Whether two folders hold the same entries; links to one file are not read."""
    names = {entry.name for entry in folder.iterdir()}
    if names != {entry.name for entry in other.iterdir()}:
        return False
    return all(_same_entry(folder / name, other / name) for name in names)


def _same_entry(one: Path, other: Path) -> bool:
    if one.is_symlink() or not one.is_file() or not other.is_file():
        return False
    return same_file(one, other) or filecmp.cmp(one, other, shallow=False)


def _build(run: Run, sound: Sound, damage: Damage, folder: Path) -> tuple[str, ...]:
    """Finish the stopped build on damaged files; nothing if the bundle came out sound."""
    shutil.rmtree(folder, ignore_errors=True)
    _link_tree(sound.stopped, folder)
    for lock in (folder / ".work").glob(".*.lock"):
        lock.unlink()  # a build refuses one that has another name as well
    verify, write_record = verify_stage.Verify.compute, pipeline.write_record

    def do_damage(work: Workdir) -> None:
        copy = Copy(work.hf, work.gguf, sound)
        damage.apply(copy)
        before = sound.stopped / ".work" / NAME
        _check_changed(copy, before / NAME, before / gguf_name(NAME), damage)

    def damaged_before(stage: verify_stage.Verify) -> Any:
        do_damage(stage.run.work)
        return verify(stage)

    def damaged_after(plan: Any, work: Workdir, *more: Any) -> Any:
        do_damage(work)
        return write_record(plan, work, *more)

    hook = (
        patch.object(verify_stage.Verify, "compute", damaged_before)
        if run is Run.BUILD
        else patch.object(pipeline, "write_record", damaged_after)
    )
    with hook:
        result = sound.build(folder)
    same = _same(result.hf_folder, sound.hf) and _same(result.gguf_folder, sound.gguf)
    return ("the build undid it",) if same else ()


def _main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutations.runs")
    parser.add_argument("--run", choices=[run.value for run in Run], action="append")
    parser.add_argument("--group", action="append", help="such as G or K")
    parser.add_argument("--name", default="", help="only damages with this text in their name")
    parser.add_argument("--all", action="store_true", help="print what was caught, too")
    parser.add_argument("models", nargs="*", default=[*FAMILIES, *more_models()])
    asked = parser.parse_args(arguments)
    runs = [Run(name) for name in asked.run or ("beside", "source", "build")]
    n_missed = 0
    with tempfile.TemporaryDirectory() as folder:
        for number, model in enumerate(asked.models):
            place = Path(folder) / str(number)
            place.mkdir()
            sound = make(model, place)
            chosen = [
                damage
                for damage in catalog(sound)
                if asked.name in damage.name and (not asked.group or damage.group in asked.group)
            ]
            for run in runs:
                start = time.monotonic()
                report = run_all(run, sound, chosen, place)
                seconds = time.monotonic() - start
                print(f"\n{sound.family}, {run.value}: {seconds:.0f} s")
                print("\n".join(_table(report, asked.all)))
                n_missed += len(report.missed)
    return min(n_missed, 1)


def _table(report: Report, with_caught: bool) -> Iterator[str]:
    groups = list(dict.fromkeys(one.damage.group for one in report.outcomes))
    for group in groups:
        ours = Report(report.run, [one for one in report.outcomes if one.damage.group == group])
        caught = len(ours.required) - len(ours.missed)
        others = len(ours.outcomes) - len(ours.required)
        yield f"  {group}: {caught}/{len(ours.required)} caught, {others} not required"
    if report.required:
        yield f"  all: {report.share:.1%} of {len(report.required)}"
    for title, outcomes in (
        ("missed", report.missed),
        ("false alarm", report.false_alarms),
        ("crashed", [one for one in report.outcomes if one.crashed]),
        ("caught", [one for one in report.outcomes if one.caught and with_caught]),
    ):
        for outcome in outcomes:
            yield f"  {title}: {outcome}"


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1:]))
