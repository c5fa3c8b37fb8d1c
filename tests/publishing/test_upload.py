"""Which commits an upload makes, and the progress that it reports."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reap2gguf.bundle.manifest import Manifest
from reap2gguf.publishing import upload
from reap2gguf.publishing.contents import PreparedFile, PreparedRepo
from reap2gguf.publishing.upload import LARGE_BYTES, LAST, plan_commits, report_reading


class Recorded:
    """A task that keeps every amount it was advanced by."""

    def __init__(self) -> None:
        self.amounts: list[float] = []

    def advance(self, amount: float = 1) -> None:
        self.amounts.append(amount)

    def wait(self, total: int) -> None:
        for _ in range(6000):
            if sum(self.amounts) == total:
                return
            time.sleep(0.01)
        raise AssertionError(self.amounts)


def file_of(path: Path, n_bytes: int) -> PreparedFile:
    path.write_bytes(bytes(n_bytes))
    return PreparedFile(path.name, path, n_bytes, "")


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_bytes_count_as_they_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upload, "_POLL_SECONDS", 0.01)
    path, task = tmp_path / "file", Recorded()
    files = [file_of(path, 1000), PreparedFile("text", bytes(200), 200, "")]
    with report_reading(files, task), path.open("rb", buffering=0) as file:
        file.read(400)
        task.wait(400)
        file.seek(100)  # a retry
        file.read(100)
        time.sleep(0.03)
        assert sum(task.amounts) == 400
        file.read(500)
        task.wait(700)
    assert sum(task.amounts) == 1200


def test_without_proc_a_file_counts_when_it_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upload, "_POLL_SECONDS", 0.01)
    monkeypatch.setattr(upload, "_OPEN_FILES", tmp_path / "missing")
    path, task = tmp_path / "file", Recorded()
    with report_reading([file_of(path, 1000)], task), path.open("rb", buffering=0) as file:
        file.read(400)
        time.sleep(0.03)
        assert task.amounts == []
    assert task.amounts == [1000]


def test_a_failed_upload_does_not_count_as_done() -> None:
    task = Recorded()
    files = [PreparedFile("text", bytes(1000), 1000, "")]
    with pytest.raises(ValueError, match="no"), report_reading(files, task):
        raise ValueError("no")
    assert task.amounts == []


sizes = st.one_of(st.integers(0, 1000), st.integers(LARGE_BYTES - 5, LARGE_BYTES + 5))


@given(st.lists(sizes, max_size=250))
def test_small_files_go_together_and_the_card_comes_last(found: list[int]) -> None:
    files = [PreparedFile(f"file-{n}", b"", size, "") for n, size in enumerate(found)]
    files[:0] = [PreparedFile(name, b"", 10, "") for name in LAST]
    manifest = Manifest.__new__(Manifest)
    *first, last = plan_commits(PreparedRepo("me/thing", tuple(files), manifest), ["old"])
    assert {file.name for file in last.files} == set(LAST)
    assert last.removes == ("old",)
    sent = [file for commit in first for file in commit.files]
    assert sorted(file.name for file in sent) == sorted(f"file-{n}" for n in range(len(found)))
    for commit in first:
        assert commit.removes == ()
        assert len(commit.files) <= 100
        total = sum(file.n_bytes for file in commit.files)
        assert total <= 2**25 or len(commit.files) == 1
        assert all(file.n_bytes <= LARGE_BYTES for file in commit.files) or len(commit.files) == 1
