"""`build` for programs, as a dry run, and in a terminal; and the two ways to name a model."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from reap2gguf.building.needs.speed import Speed
from tests.building.needs.machines import LAPTOP
from tests.conftest import CALIBRATION
from tests.terminal.screen import Screen
from tests.test_cli import one_line, run
from tests.tiny import TinyQwen35Moe

SMALL = ("--recipe", "q8_0", "--device", "cpu", "--samples", 4, "--max-length", 32, "--chunk", 16)


@pytest.fixture
def build(tmp_path: Path) -> tuple[object, ...]:
    """The options of a small build."""
    text = CALIBRATION / "prose.txt"
    return (*SMALL, "--calibration", text, "-o", tmp_path / "out")


def test_json_and_the_log(tiny: Path, tmp_path: Path, build: tuple[object, ...]) -> None:
    result = run("build", tiny, *build, "--json")
    assert result.exit_code == 0, result.output
    values = json.loads(result.stdout)
    (file,) = values["files"]
    assert Path(file["path"]).stat().st_size == file["bytes"]
    assert (file["recipe"], file["file_type"]) == ("q8_0", "Q8_0")
    names = [stage["name"] for stage in values["stages"]]
    assert names == ["texts", "observe", "prune", "imatrix", "export", "verify"]
    assert not values["up_to_date"]
    assert len(values["verified"]) == 2
    log = Path(values["log"])
    assert log == tmp_path / "out" / ".work" / f"{values['name']}.log"
    lines = [line[20:] for line in log.read_text().splitlines()]
    assert lines[0].startswith("begin: reap2gguf")
    assert "torch " in lines[1]
    (quantizing,) = (n for n, line in enumerate(lines) if line.startswith("note: quantizing: "))
    assert quantizing < next(n for n, line in enumerate(lines) if "/7: texts" in line)
    for stage in names:
        of_stage = [n for n, line in enumerate(lines) if f"/7: {stage}" in line]
        begin, end = of_stage
        assert ": done in " in lines[end]
        assert ": done in " not in lines[begin]
    assert lines[-1] == "end"

    again = run("build", "--model", tiny, *build, "--json")
    assert json.loads(again.stdout) == values | {"up_to_date": True, "stages": []}
    assert len(log.read_text().splitlines()) > len(lines), "it is added to"


def test_a_log_that_cannot_be_written_does_not_stop_a_build(
    tiny: Path, tmp_path: Path, build: tuple[object, ...]
) -> None:
    (tmp_path / "out" / ".work" / "name.log").mkdir(parents=True)
    result = run("build", tiny, *build, "--name", "name")
    assert result.exit_code == 0, result.output
    assert "name.log: the log could not be written (Is a directory)" in result.stderr


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that has as much memory and disk left each time it is asked."""
    needs = "reap2gguf.building.needs.estimate"
    monkeypatch.setattr(f"{needs}.this_machine", lambda *arguments: LAPTOP)
    monkeypatch.setattr(f"{needs}.machine_speed", Speed)


def test_a_dry_run_is_a_plan(tiny: Path, tmp_path: Path, build: tuple[object, ...]) -> None:
    for flags in ((), ("--json",)):
        dry = run("build", tiny, *build, "--dry-run", *flags)
        assert dry.exit_code == 0, dry.output
        assert dry.stdout == run("plan", tiny, *build, *flags).stdout
    assert not (tmp_path / "out").exists()


def test_a_model_is_an_argument_or_an_option(tiny: Path, build: tuple[object, ...]) -> None:
    named = run("plan", tiny, *build).stdout
    for flag in ("--model", "-m"):
        assert run("plan", flag, tiny, *build).stdout == named
    one_line(run("plan", tiny, "--model", tiny, *build), "MODEL was given twice")
    one_line(run("observe", "-o", "x"), "Missing argument 'MODEL'")
    one_line(run("imatrix", "--text", "x", "-o", "x"), "Missing argument 'HF_DIR'")
    one_line(run("chat", "--model", "nowhere"), "nowhere: no such file or folder")


@pytest.mark.slow
def test_a_build_in_a_terminal_is_clean(tmp_path: Path, build: tuple[object, ...]) -> None:
    model = TinyQwen35Moe().write(tmp_path / "model")
    read, write = pty.openpty()
    words = [str(word) for word in ("build", model, *build)]
    process = subprocess.Popen(
        [sys.executable, "-m", "reap2gguf", *words],
        stdin=subprocess.DEVNULL,
        stdout=write,
        stderr=write,
        env=os.environ | {"TERM": "xterm", "COLUMNS": "80", "LINES": "24"},
    )
    os.close(write)
    screen = Screen()
    with suppress(OSError):  # the terminal is closed at the end
        while data := os.read(read, 65536):
            screen.feed(data)
    os.close(read)
    assert process.wait() == 0, screen.lines
    text = "\n".join(screen.lines)
    for unwanted in ("falling back", "transformers]", "\N{BOX DRAWINGS HEAVY HORIZONTAL}", " ..."):
        assert unwanted not in text
    assert "Try it:  reap2gguf chat" in text
