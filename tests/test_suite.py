"""The test suite itself: a test that leaves a file open fails, and nothing follows the summary."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.child import MOST_SECONDS, Child
from tests.tiny import REPOSITORY, child_environment

SOUND = """
def test(tmp_path):
    with open(tmp_path / "file", "w"):
        pass
"""
IN_A_CYCLE = """
def test(tmp_path):
    opened = [open(tmp_path / "file", "w")]
    opened.append(opened)
"""
FOR_EVER = """
opened = []
def test(tmp_path):
    opened.append(open(tmp_path / "file", "w"))
"""


def run(test: str, folder: Path) -> list[str]:
    """The lines that pytest prints for a file of tests, with this suite's settings."""
    (folder / "test_it.py").write_text(test)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-n", "0", "-p", "tests.conftest"),
            *("-c", REPOSITORY / "pyproject.toml", folder),
        ],
        env=child_environment({}),
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=MOST_SECONDS,
        check=False,
    )
    return done.stdout.splitlines()


def test_nothing_is_printed_after_the_summary(tmp_path: Path) -> None:
    assert re.fullmatch("=+ 1 passed in .* =+", run(SOUND, tmp_path)[-1])


@pytest.mark.parametrize(
    "test",
    [
        pytest.param(IN_A_CYCLE, id="in a cycle"),
        pytest.param(FOR_EVER, id="for ever", marks=pytest.mark.slow),
    ],
)
def test_a_file_that_is_left_open_is_an_error(test: str, tmp_path: Path) -> None:
    lines = run(test, tmp_path)
    assert any(re.fullmatch("=+ 1 passed, 1 error in .* =+", line) for line in lines), lines
    assert any("test0/file" in line for line in lines), lines


def test_a_child_that_hangs_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.child.MOST_SECONDS", 0.1)
    waits = ("timeit", "-n", "1", "import time; time.sleep(600)")
    child = Child(*waits, environment=child_environment({}))
    with pytest.raises(AssertionError, match="ended without an answer"):
        child.receive()
    child.close()
