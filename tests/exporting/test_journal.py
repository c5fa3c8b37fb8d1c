from __future__ import annotations

import json
from pathlib import Path

import pytest

from reap2gguf.atomic import OutputFile, open_file
from reap2gguf.errors import OutputError
from reap2gguf.exporting import journal as journal_module
from reap2gguf.exporting.journal import ExportJournal


@pytest.fixture(autouse=True)
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor is worth keeping."""
    monkeypatch.setattr(journal_module, "SAVE_SECONDS", 0)
    monkeypatch.setattr(journal_module, "MAX_TIME_SHARE", 1e9)


def test_what_is_kept_is_found_again(tmp_path: Path) -> None:
    journal = ExportJournal(tmp_path / "journal", "key")
    assert journal.is_empty
    journal.add("one", "", [])
    journal.add("two", "", [])
    again = ExportJournal(tmp_path / "journal", "key")
    assert "one" in again
    assert "two" in again
    assert "three" not in again
    again.clear()
    assert ExportJournal(tmp_path / "journal", "key").is_empty


def test_files_are_flushed_before_a_name_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[bool] = []
    path = tmp_path / "journal"
    sync = OutputFile.sync

    def watched(self: OutputFile) -> None:
        if self.path == tmp_path / "file":
            flushed.append(path.exists())
        sync(self)

    monkeypatch.setattr(OutputFile, "sync", watched)
    with open_file(tmp_path / "file", tmp_path / "file") as file:
        ExportJournal(path, "key").add("one", "", [file])
    assert flushed == [False]
    assert path.exists()


def test_a_disk_that_fails_to_flush(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(5, "Input/output error")

    with open_file(tmp_path / "file", tmp_path / "file") as file:
        monkeypatch.setattr("os.fsync", fail)
        with pytest.raises(OutputError, match="file: cannot be written"):
            ExportJournal(tmp_path / "journal", "key").add("one", "", [file])
    assert ExportJournal(tmp_path / "journal", "key").is_empty


def test_after_a_failed_flush_nothing_more_is_promised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Linux says once that pages were lost; the next flush of the same file goes well."""
    journal = ExportJournal(tmp_path / "journal", "key")
    with open_file(tmp_path / "file", tmp_path / "file") as file:
        journal.add("one", "", [file])
        with monkeypatch.context() as patch:
            patch.setattr("os.fsync", lambda descriptor: (_ for _ in ()).throw(OSError(5, "EIO")))
            with pytest.raises(OutputError):
                journal.add("two", "", [file])
        journal.save([file])
    again = ExportJournal(tmp_path / "journal", "key")
    assert "one" in again
    assert "two" not in again


def test_now_and_then_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal_module, "SAVE_SECONDS", 3600)
    journal = ExportJournal(tmp_path / "journal", "key")
    journal.add("one", "", [])
    assert not (tmp_path / "journal").exists()
    journal.save([])
    assert "one" in ExportJournal(tmp_path / "journal", "key")


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", "{", json.dumps({"key": "another", "done": {"one": ""}}),
        json.dumps({"key": "key", "done": "one"}), json.dumps({"key": "key", "done": ["one"]}),
    ],
)  # fmt: skip
def test_a_journal_that_says_nothing(tmp_path: Path, text: str) -> None:
    (tmp_path / "journal").write_text(text)
    assert ExportJournal(tmp_path / "journal", "key").is_empty
