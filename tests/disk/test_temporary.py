"""Temporary folders: those of the dead go, those of the living stay."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from reap2gguf.disk import temporary
from reap2gguf.disk.temporary import TemporaryFolder, temporary_folder
from reap2gguf.errors import OutputError

MAKER = """
import os, time
from reap2gguf.disk.temporary import TemporaryFolder
folder = TemporaryFolder()
(folder.path / "inside").mkdir()
(folder.path / "inside" / "file").write_text("x")
print(folder.path, flush=True)
time.sleep(60)
"""


@pytest.fixture
def parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return tmp_path


@contextmanager
def another() -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """Another process with a folder."""
    words = [sys.executable, "-c", MAKER]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process, Path(process.stdout.readline().strip())
        finally:
            process.kill()


def test_a_killed_process_leaves_nothing_for_long(parent: Path) -> None:
    with another() as (process, folder):
        assert folder.parent == parent
        with temporary_folder() as mine:
            assert mine != folder
            assert (folder / "inside" / "file").exists()  # it lives
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert folder.exists()
    with temporary_folder() as mine:
        assert list(parent.iterdir()) == [mine]
    assert not list(parent.iterdir())


def test_it_goes_with_its_object(parent: Path) -> None:
    one, other = TemporaryFolder(), TemporaryFolder()
    first, second = one.path, other.path
    del one
    assert [first.exists(), second.exists()] == [False, True]
    other.remove()
    other.remove()
    assert not second.exists()


def test_what_is_not_ours_stays(parent: Path, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    (kept / "file").parent.mkdir()
    (kept / "file").write_text("mine")
    (parent / "reap2gguf-work-link").symlink_to(kept)
    (parent / "reap2gguf-work-file").write_text("mine")
    (parent / "reap2gguf-abcdefgh").mkdir()  # of an earlier version, which does not lock
    with temporary_folder():
        pass
    assert (kept / "file").read_text() == "mine"
    assert {one.name for one in parent.iterdir()} == {
        *("kept", "reap2gguf-work-link", "reap2gguf-work-file", "reap2gguf-abcdefgh")
    }


def test_no_folder_is_removed_where_nothing_can_be_locked(
    parent: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(temporary, "take", lambda descriptor, where_unable: where_unable)
    with temporary_folder() as one, temporary_folder() as other:
        assert one.exists()
        assert other.exists()
    assert not list(parent.iterdir())


def test_a_folder_that_was_taken_for_one_of_the_dead(
    parent: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between its making and its lock another process has looked at it."""
    answers = iter([False, True])
    monkeypatch.setattr(temporary, "take", lambda descriptor, where_unable: next(answers, False))
    folder = TemporaryFolder()
    assert len(list(parent.iterdir())) == 2
    folder.remove()


def test_deep_and_locked_contents(parent: Path) -> None:
    folder = TemporaryFolder()
    inside = folder.path / "a" / "b"
    inside.mkdir(parents=True)
    (inside / "c").write_text("x")
    os.chmod(inside, 0)
    folder.remove()
    assert not list(parent.iterdir())


def test_where_none_can_be_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/nowhere")
    with pytest.raises(OutputError, match="no temporary folder can be made"):
        TemporaryFolder()
