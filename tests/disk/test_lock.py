"""Locks between processes, which end with them."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from reap2gguf.atomic import locked, open_own
from reap2gguf.disk.lock import Held, hold
from reap2gguf.errors import OutputError

HOLDER = """
import sys, time
from pathlib import Path
from reap2gguf.atomic import locked
with locked(Path(sys.argv[1]), Path("x"), str):
    print("held", flush=True)
    time.sleep(60)
"""


@contextmanager
def holding(path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock."""
    words = [sys.executable, "-c", HOLDER, str(path)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.kill()


def test_the_second_is_told_who_holds_it(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with holding(path) as process:
        with pytest.raises(Held, match=f"^{process.pid}$"):
            hold(path, open_own)
        with pytest.raises(OutputError, match=f"^{process.pid}$"), locked(path, path, str):
            pass
        assert path.read_text() == str(process.pid)


def test_a_killed_process_holds_nothing(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with holding(path) as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert path.exists()
    with locked(path, path, str):
        assert path.read_text() == str(os.getpid())
    assert not path.exists()


def test_a_lock_in_the_same_process(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with locked(path, path, str):
        with pytest.raises(OutputError, match=str(os.getpid())), locked(path, path, str):
            pass
        assert path.exists()
    with locked(path, path, str, keeps_file=True):
        pass
    assert path.exists()


def test_a_file_that_is_removed_between_opening_and_locking(tmp_path: Path) -> None:
    """Two would hold two files of one name."""
    path, opened = tmp_path / "lock", []

    def slowly(place: Path) -> int:
        opened.append(place)
        descriptor = open_own(place)
        if len(opened) == 1:
            place.unlink()
        return descriptor

    descriptor = hold(path, slowly)
    assert len(opened) == 2
    with pytest.raises(Held):
        hold(path, open_own)
    os.close(descriptor)


def test_many_take_turns(tmp_path: Path) -> None:
    path, inside, most = tmp_path / "lock", [0], [0]

    def work() -> None:
        for _ in range(200):
            try:
                with locked(path, path, str):
                    inside[0] += 1
                    most[0] = max(most[0], inside[0])
                    inside[0] -= 1
            except OutputError:
                continue

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1]


def test_a_file_system_that_cannot_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "lock"

    def unable(*arguments: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", unable)
    number = errno.ENOLCK
    with locked(path, path, str):
        assert path.exists()
    number = errno.EIO
    with pytest.raises(OutputError, match="shown: cannot be written"):
        hold_shown(path)


def hold_shown(path: Path) -> None:
    with locked(path, path.with_name("shown"), str):
        pass


@pytest.mark.parametrize("kind", ["link", "second name", "folder"])
def test_another_file_is_not_written_to(tmp_path: Path, kind: str) -> None:
    victim, path = tmp_path / "victim", tmp_path / "lock"
    victim.write_text("mine")
    if kind == "link":
        path.symlink_to(victim)
    elif kind == "folder":
        path.mkdir()
    else:
        os.link(victim, path)
    with pytest.raises(OutputError, match="lock: cannot be written"):
        hold_shown(path)
    assert victim.read_text() == "mine"
