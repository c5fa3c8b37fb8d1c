"""Malformed inputs through the real command line: one line each, in little time and memory."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.child import Child
from tests.hostile.cases import CASES, SOUND
from tests.hostile.room import Case, Room, Sound
from tests.tiny import child_environment

# Processor time, so that a busy machine fails nothing; ten times what any case takes on a slow one.
CPU_SECONDS = 20
PEAK_BYTES = 500 * 10**6
LETTERS = 1800  # of a line
PLAIN = 3  # one of as many neighbours, which are alike, is in the plain run
MARKED = [
    case if number % PLAIN == 0 else pytest.param(case, marks=pytest.mark.slow)
    for number, case in enumerate(CASES)
]
# the lines that a stage prints when it begins and when it ends, and those of slow work
_PROGRESS = re.compile(
    r"(\d\d:\d\d:\d\d )?"
    r"((Verifying|Writing) [^:]*: (done in )?[0-9.]+ [a-zA-Z ]+|(Reading|Stage) .* \.\.\.)"
)


@dataclass(frozen=True)
class Outcome:
    """How a command ended, and what it printed on stderr besides its progress."""

    code: int
    cpu_seconds: float
    peak_bytes: int
    lines: list[str]


class Program:
    """The command line, in a fork for each call."""

    def __init__(self, child: Child) -> None:
        self._child = child

    def run(self, arguments: list[Any], folder: Path) -> Outcome:
        self._child.send({"arguments": [str(a) for a in arguments], "folder": str(folder)})
        answer = json.loads(self._child.receive())
        errors = (folder / "stderr").read_text(encoding="utf-8")
        lines = [line for line in errors.split("\n") if not _PROGRESS.fullmatch(line)]
        assert lines.pop() == "", "stderr does not end with a line"
        return Outcome(**answer, lines=lines)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Sound:
    return Sound.make(tmp_path_factory.mktemp("sound"))


@pytest.fixture(scope="module")
def program() -> Iterator[Program]:
    environment = child_environment({"HF_HUB_OFFLINE": "1", "OPENBLAS_NUM_THREADS": "1"})
    with Child("tests.hostile.zygote", environment=environment) as child:
        yield Program(child)


def test_there_are_enough_cases() -> None:
    names = [case.name for case in CASES]
    assert len(names) == len(set(names))
    assert len(names) >= 200


@pytest.mark.parametrize("case", SOUND, ids=lambda case: case.name)
def test_what_is_sound_is_taken(case: Case, sound: Sound, program: Program, tmp_path: Path) -> None:
    arguments = case.build(Room(sound, tmp_path))
    outcome = program.run(arguments, tmp_path)
    assert outcome.code == 0, outcome.lines
    assert case.words in (tmp_path / "stdout").read_text()


@pytest.mark.parametrize("case", MARKED, ids=lambda case: case.name)
def test_what_is_broken_is_one_line(
    case: Case, sound: Sound, program: Program, tmp_path: Path
) -> None:
    arguments = case.build(Room(sound, tmp_path))
    outcome = program.run(arguments, tmp_path)
    text = "\n".join(outcome.lines)
    assert "Traceback" not in text, text
    assert outcome.code == case.code, text
    last = outcome.lines[-1]
    if case.code == 2:
        assert len(outcome.lines) == 1, text
    else:
        # one line for each violation, then their number
        count = len(outcome.lines) - 1
        assert last == f"Error: verification found {count} violation{'s' if count != 1 else ''}"
    assert last.startswith("Error: ")
    assert case.words in text
    assert all(line.isprintable() and len(line) <= LETTERS for line in outcome.lines)
    assert outcome.cpu_seconds < CPU_SECONDS
    assert outcome.peak_bytes < PEAK_BYTES
