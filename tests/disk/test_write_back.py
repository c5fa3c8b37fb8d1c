"""Written bytes go to the disk while more are written."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from reap2gguf.atomic import open_file, whole_file
from reap2gguf.disk import write_back
from reap2gguf.errors import OutputError


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    calls: list[tuple[int, ...]] = []

    def begin(*arguments: int) -> int:
        calls.append(arguments)
        return -1  # which is no error: the flush at the end tells

    monkeypatch.setattr(write_back, "sync_file_range", lambda: begin)
    monkeypatch.setattr(write_back, "STEP_BYTES", 1000)
    return calls


def test_the_disk_begins_after_every_step(begun: list[tuple[int, ...]], tmp_path: Path) -> None:
    with whole_file(tmp_path / "file") as file:
        for _ in range(7):
            file.write(bytes(400))
        for position in range(0, 2800, 700):
            file.write_at(bytes(700), position)
    assert [arguments[1:] for arguments in begun] == [(0, 0, 2)] * 4
    assert (tmp_path / "file").read_bytes() == bytes(2800)


def test_the_real_function_takes_these_arguments(tmp_path: Path) -> None:
    begin = write_back.sync_file_range()
    if begin is None:
        pytest.skip("this system has no sync_file_range")
    with open_file(tmp_path / "file", tmp_path / "file") as file:
        file.write(bytes(10_000))
        assert begin(file.descriptor, 0, 0, 2) == 0
        assert begin(file.descriptor, -1, 0, 2) == -1


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write_back, "sync_file_range", lambda: None)
    monkeypatch.setattr(write_back, "FLUSH_BYTES", 1000)


@pytest.mark.usefixtures("without")
def test_elsewhere_the_file_is_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[int] = []
    monkeypatch.setattr(os, "fsync", flushed.append)
    with open_file(tmp_path / "file", tmp_path / "file") as file:
        for _ in range(5):
            file.write(bytes(600))
    assert len(flushed) == 2


@pytest.mark.usefixtures("without")
def test_a_loss_is_reported_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk reports it once, so a second flush that succeeds would hide it."""
    with open_file(tmp_path / "file", tmp_path / "file") as file:
        with monkeypatch.context() as patch:

            def fail(_: int) -> None:
                raise OSError(errno.EIO, os.strerror(errno.EIO))

            patch.setattr(os, "fsync", fail)
            with pytest.raises(OutputError, match="Input/output error"):
                file.write(bytes(2000))
        with pytest.raises(OutputError, match="Input/output error"):
            file.sync()
