"""Hashes of large files: told as they are read, and left when nobody waits any more."""

from __future__ import annotations

import hashlib
import os
import signal
from pathlib import Path

import pytest

from reap2gguf.bundle.sums import check_sums

MIB = 2**20


def folder_of(tmp_path: Path, n_bytes: int) -> Path:
    with (tmp_path / "large.gguf").open("wb") as file:
        file.truncate(n_bytes)
    (tmp_path / "SHA256SUMS").write_text(f"{'0' * 64}  large.gguf\n")
    return tmp_path


def test_reading_is_told_piece_by_piece(tmp_path: Path) -> None:
    told: list[float] = []
    found = list(check_sums(folder_of(tmp_path, 20 * MIB), {"large.gguf"}, 1, advance=told.append))
    assert [line.rpartition(": ")[2] for line in found] == [
        "large.gguf has a different SHA-256 than the build recorded"
    ]
    assert sum(told) == 20 * MIB
    assert len(told) == 5


def test_an_interrupt_does_not_wait_for_the_end_of_a_file(tmp_path: Path) -> None:
    told: list[float] = []

    def advance(amount: float) -> None:
        told.append(amount)
        if len(told) == 2:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        list(check_sums(folder_of(tmp_path, 4096 * MIB), {"large.gguf"}, 1, advance=advance))
    assert sum(told) < 1024 * MIB


def test_a_link_in_a_bundle_is_not_read(tmp_path: Path) -> None:
    folder = tmp_path / "x-GGUF"
    folder.mkdir()
    (tmp_path / "secret").write_text("hf_token")
    (folder / "large.gguf").symlink_to(tmp_path / "secret")
    digest = hashlib.sha256(b"hf_token").hexdigest()
    (folder / "SHA256SUMS").write_text(f"{digest}  large.gguf\n")
    told: list[float] = []
    # `check_members` names it
    assert list(check_sums(folder, {"large.gguf"}, 1, advance=told.append)) == []
    assert told == []


def test_a_bundle_in_the_hubs_cache_consists_of_links(tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "m" / "snapshots" / "abc", tmp_path / "m" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    digest = hashlib.sha256(b"weights").hexdigest()
    (blobs / "1").write_bytes(b"weights")
    (blobs / "2").write_text(f"{digest}  large.gguf\n")
    (snapshot / "large.gguf").symlink_to("../../blobs/1")
    (snapshot / "SHA256SUMS").symlink_to("../../blobs/2")
    assert not list(check_sums(snapshot, {"large.gguf"}, 1))
