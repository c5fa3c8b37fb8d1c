"""The log of a build: what it holds, how large it gets, and that it never stops a build."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from reap2gguf import __version__
from reap2gguf.errors import VerificationError
from reap2gguf.progress import Silent
from reap2gguf.terminal import build_log
from reap2gguf.terminal.build_log import BuildLog, LoggedProgress


def texts(path: Path) -> list[str]:
    """The lines of a log without date and time."""
    lines = path.read_text().splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ", line) for line in lines)
    return [line[20:] for line in lines]


def test_it_holds_notes_tasks_and_the_command_without_secrets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = "https://me:secret@example.org/x"
    monkeypatch.setattr("sys.argv", ["reap2gguf", "build", secret, "hf_abcdefghijkl"])
    log = BuildLog(tmp_path / "name.log")
    with log.kept():
        log.begin()
        progress = LoggedProgress(Silent(), log)
        with progress.task("Reading", 3, "rows") as task:
            task.advance()
            progress.note("a note\nof two lines")
        with progress.task("Loading", 0, ""):
            pass
    begin, versions, *rest = texts(log.path)
    assert begin == "begin: reap2gguf build https://...@example.org/x hf_..."
    assert versions.startswith(f"reap2gguf {__version__}, python 3.")
    assert ", torch " in versions
    assert rest[:2] == ["Reading: 3 rows", "note: a note\\nof two lines"]
    assert rest[2].startswith("Reading: done in ")
    assert rest[3] == "Loading"
    assert rest[-1] == "end"
    with pytest.raises(KeyboardInterrupt), BuildLog(log.path).kept():
        raise KeyboardInterrupt


def test_it_grows_and_says_how_a_build_ended(tmp_path: Path) -> None:
    path = tmp_path / "name.log"
    for error in (VerificationError(["one", "two"]), ValueError("broken"), KeyboardInterrupt()):
        log = BuildLog(path)
        with pytest.raises(type(error)), log.kept():
            raise error
    assert texts(path) == [
        "violation: one",
        "violation: two",
        "error: verification found 2 violations",
        "error: ValueError: broken",
        "interrupted",
    ]


def test_a_build_that_is_refused_leaves_no_log(tmp_path: Path) -> None:
    log = BuildLog(tmp_path / "build" / ".work" / "name.log")
    log.write("before the folder is there")
    with pytest.raises(ValueError, match="refused"), log.kept():
        raise ValueError("refused")
    assert list(tmp_path.iterdir()) == []
    assert not log.problem


def test_lines_wait_for_the_folder(tmp_path: Path) -> None:
    log = BuildLog(tmp_path / ".work" / "name.log")
    with log.kept():
        log.write("before")
        log.path.parent.mkdir()
        log.write("after")
    assert texts(log.path) == ["before", "after", "end"]


def test_a_long_log_is_put_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_log, "MOST_BYTES", 50)
    path = tmp_path / "name.log"
    for text in ("first" * 20, "second" * 20, "third"):
        log = BuildLog(path)
        with log.kept():
            log.write(text)
    assert texts(path) == ["third", "end"]
    assert texts(tmp_path / "name.log.1") == ["second" * 20, "end"]
    assert sorted(one.name for one in tmp_path.iterdir()) == ["name.log", "name.log.1"]


def test_one_build_does_not_write_without_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build_log, "_MOST_BYTES_NOW", 1000)
    log = BuildLog(tmp_path / "name.log")
    with log.kept():
        for _ in range(100):
            log.write("x" * 80)
    assert log.path.stat().st_size < 1200
    assert log.path.read_text().endswith("the log ends here: this build has written too much\n")


def test_a_log_that_cannot_be_written_is_given_up(tmp_path: Path) -> None:
    (tmp_path / "folder.log").mkdir()
    (tmp_path / "other").write_text("kept")
    (tmp_path / "link.log").symlink_to(tmp_path / "other")
    for name in ("folder.log", "link.log"):
        log = BuildLog(tmp_path / name)
        with log.kept():
            log.write("a line")
        assert log.problem
    assert (tmp_path / "other").read_text() == "kept"
