"""Hashes that are made while files are written."""

from __future__ import annotations

import hashlib
import os
import random
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from reap2gguf.atomic import open_file, part_of, rename
from reap2gguf.disk import hashing
from reap2gguf.disk.hashing import Hashes
from reap2gguf.errors import OutputError
from reap2gguf.files import file_sha256

DATA = random.Random(7).randbytes(300_007)


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(hashing, "_BLOCK_BYTES", 4096)
    before = threading.active_count()
    yield
    assert threading.active_count() == before


def ranges(step: int) -> list[tuple[int, int]]:
    return [(first, min(first + step, len(DATA))) for first in range(0, len(DATA), step)]


def write(path: Path, hashes: Hashes, order: list[tuple[int, int]]) -> None:
    with open_file(part_of(path), path) as opened:
        opened.reserve(len(DATA))
        file = opened.hashed_by(hashes, len(DATA))
        for first, last in order:
            file.write_at(DATA[first:last], first)
        file.finish()
    rename(part_of(path), path)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("step", [1009, 4096, 10**6])
def test_ranges_in_any_order(seed: int, step: int, tmp_path: Path) -> None:
    order = ranges(step)
    random.Random(seed).shuffle(order)
    path = tmp_path / "file"
    with Hashes() as hashes:
        write(path, hashes, order)
        found = hashes.found()[path]
    stat = path.stat()
    assert found.sha256 == hashlib.sha256(DATA).hexdigest() == file_sha256(path)
    assert (found.n_bytes, found.changed_ns) == (stat.st_size, stat.st_mtime_ns)


def test_several_files_at_once_and_one_that_was_there(tmp_path: Path) -> None:
    old = tmp_path / "old"
    old.write_bytes(DATA[:100_000])
    with Hashes() as hashes:
        hashes.read(old)
        for name in "ab":
            write(tmp_path / name, hashes, ranges(5000))
        found = hashes.found()
    assert {path.name: one.sha256 for path, one in found.items()} == {
        name: file_sha256(tmp_path / name) for name in ("old", "a", "b")
    }


@pytest.mark.parametrize("change", ["written to", "replaced", "cut", "removed"])
def test_no_hash_of_a_file_that_changed_after_its_last_byte(change: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    with Hashes() as hashes:
        write(path, hashes, ranges(5000))
        hashes._files[path]._thread.join()  # it has read the last byte
        stat = path.stat()
        if change == "replaced":
            other = tmp_path / "other"
            other.write_bytes(DATA)
            os.utime(other, ns=(stat.st_atime_ns, stat.st_mtime_ns))
            other.replace(path)
        elif change == "removed":
            path.unlink()
        else:
            with path.open("r+b") as file:
                if change == "cut":
                    file.truncate(1000)
                else:
                    file.write(b"x")
            os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
        assert hashes.found() == {}


def test_an_unfinished_file_has_none_and_its_thread_ends(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with Hashes() as hashes, open_file(path, path) as opened:
        file = opened.hashed_by(hashes, len(DATA))
        file.write_at(DATA[5000:], 5000)  # the beginning is missing


def test_a_file_that_cannot_be_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", fail)
    with Hashes() as hashes:
        write(tmp_path / "file", hashes, ranges(10**6))
        with pytest.raises(OutputError, match=r"file: cannot be read back \(Input/output error\)"):
            hashes.found()


def test_a_file_that_is_cut_while_it_is_written(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with Hashes() as hashes, open_file(path, path) as opened:
        file = opened.hashed_by(hashes, len(DATA))
        file.write_at(DATA[:1000], 0)
        os.truncate(path, 500)
        assert file.hashed is not None
        file.hashed.wrote(1000, len(DATA))
        file.finish()
        with pytest.raises(OutputError, match="it ends after 500 of 300,007 bytes"):
            hashes.found()


def test_an_empty_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"")
    with Hashes() as hashes:
        hashes.read(path)
        assert hashes.found()[path].sha256 == hashlib.sha256().hexdigest()


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with Hashes() as hashes, pytest.raises(OutputError, match="none: cannot be read"):
        hashes.read(tmp_path / "none")
