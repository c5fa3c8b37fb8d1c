"""Shards that several threads write: the same bytes, whole or not at all."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from reap2gguf.checkpoint import shard_writer
from reap2gguf.checkpoint.checkpoint import Checkpoint
from reap2gguf.checkpoint.safetensors_header import StoredTensor
from reap2gguf.checkpoint.writer import write_checkpoint
from reap2gguf.disk.hashing import Hashes
from reap2gguf.errors import CheckpointError, OutputError
from reap2gguf.files import file_sha256
from tests.tiny import TinyQwen3Moe

SHARD_BYTES = 100_000


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_writer, "_PIECE_BYTES", 50_000)
    monkeypatch.setattr(shard_writer, "_BUFFER_BYTES", 10_000)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return TinyQwen3Moe().write(tmp_path / "source")


def write(source: Path, folder: Path, n_threads: int, hashes: Hashes | None = None) -> int:
    """Write the source in shards; how many bytes were reported."""
    folder.mkdir(exist_ok=True)
    wrote: list[int] = []
    with Checkpoint.open(source) as weights:
        tensors = list(weights.tensors.values())
        write_checkpoint(folder, tensors, weights, SHARD_BYTES, wrote.append, n_threads, hashes)
        assert sum(wrote) == weights.n_bytes
    return sum(wrote)


def files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_the_bytes_do_not_depend_on_threads_or_ways(source: Path, tmp_path: Path) -> None:
    for n_threads in (1, 3, 8):
        write(source, tmp_path / str(n_threads), n_threads)
    with Checkpoint.open(source) as weights:

        def whole(tensor: StoredTensor) -> list[memoryview]:
            buffer = np.empty(tensor.n_bytes, dtype=np.uint8)
            weights.read_bytes(tensor.name, 0, buffer)
            return [buffer.data[: buffer.size // 2], buffer.data[buffer.size // 2 :]]

        tensors = list(weights.tensors.values())
        for n_threads in (1, 4):
            folder = tmp_path / f"contents {n_threads}"
            folder.mkdir()
            write_checkpoint(folder, tensors, whole, SHARD_BYTES, n_threads=n_threads)
    expected = files(tmp_path / "1")
    assert len(expected) > 4
    for name in ("3", "8", "contents 1", "contents 4"):
        assert files(tmp_path / name) == expected


@pytest.mark.parametrize("n_threads", [1, 8])
def test_every_shard_is_hashed(n_threads: int, source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    with Hashes() as hashes:
        write(source, folder, n_threads, hashes)
        found = hashes.found()
    shards = sorted(folder.glob("*.safetensors"))
    assert {path: one.sha256 for path, one in found.items()} == {
        path: file_sha256(path) for path in shards
    }


def test_tensors_without_bytes(tmp_path: Path) -> None:
    tensors = [StoredTensor("a", "F32", (0, 3)), StoredTensor("b", "F32", (0,))]
    write_checkpoint(tmp_path, tensors, lambda tensor: [], 100, n_threads=2)
    (path,) = tmp_path.iterdir()
    assert int.from_bytes(path.read_bytes()[:8], "little") == path.stat().st_size - 8


def failing_write(patch: pytest.MonkeyPatch, after: int, error: BaseException) -> None:
    """Let the n-th positioned write fail, and all that follow."""
    pwrite, count, lock = os.pwrite, [0], threading.Lock()

    def write_or_fail(descriptor: int, data: Any, position: int) -> int:
        with lock:
            count[0] += 1
            if count[0] > after:
                raise error
        return pwrite(descriptor, data, position)

    patch.setattr(os, "pwrite", write_or_fail)


@pytest.mark.parametrize("n_threads", [1, 8])
@pytest.mark.parametrize("after", [0, 3, 60])
def test_a_full_disk_leaves_no_half_shard_and_is_resumed(
    after: int, n_threads: int, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "out"
    with monkeypatch.context() as patch:
        failing_write(patch, after, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
        with pytest.raises(OutputError, match="No space left on device"):
            write(source, folder, n_threads)
    assert not list(folder.glob("*.part"))
    finished = {path.name: path.stat().st_ino for path in folder.iterdir()}
    with Hashes() as hashes:
        write(source, folder, n_threads, hashes)
        found = hashes.found()
    write(source, tmp_path / "whole", 1)
    assert files(folder) == files(tmp_path / "whole")
    assert finished.items() <= {path.name: path.stat().st_ino for path in folder.iterdir()}.items()
    assert {path.name: one.sha256 for path, one in found.items()} == {
        path.name: file_sha256(path) for path in folder.glob("*.safetensors")
    }


@pytest.mark.parametrize("n_threads", [1, 8])
def test_no_room_is_found_before_anything_is_written(
    n_threads: int, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OutputError, match="no room for"):
        write(source, tmp_path / "out", n_threads)
    assert not list((tmp_path / "out").iterdir())


def test_an_interrupt_leaves_no_half_shard(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing_write(monkeypatch, 20, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        write(source, tmp_path / "out", 4)
    assert not list((tmp_path / "out").glob("*.part"))


def test_a_source_that_is_cut_is_an_error_of_the_source(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with Checkpoint.open(source) as weights:
        os.truncate(source / "model.safetensors", 100_000)
        with pytest.raises(CheckpointError, match="the file was cut while it was in use"):
            write_checkpoint(tmp_path / "out", list(weights.tensors.values()), weights, n_threads=8)
    assert not list((tmp_path / "out").iterdir())


def test_what_a_killed_call_left_is_written_again(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "model-00001-of-00009.safetensors.part").write_bytes(b"half")
    write(source, folder, 4)
    write(source, tmp_path / "whole", 1)
    found, expected = files(folder), files(tmp_path / "whole")
    assert {name: found[name] for name in expected} == expected
    first = min(expected)
    (folder / first).unlink()
    (folder / f"{first}.part").write_bytes(b"x" * 10**6)
    write(source, folder, 4)
    assert (folder / first).read_bytes() == expected[first]
    assert not (folder / f"{first}.part").exists()


def test_a_folder_in_the_place_of_a_shard_is_kept(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out" / "model.safetensors").mkdir(parents=True)
    with Checkpoint.open(source) as weights, pytest.raises(OutputError, match="a folder"):
        write_checkpoint(tmp_path / "out", list(weights.tensors.values()), weights, n_threads=2)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model.safetensors"]
