"""Saved states: complete ones are restored, others are not, and files keep their times."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from reap2gguf.errors import OutputError
from reap2gguf.jobs import storage as module
from reap2gguf.jobs.storage import Storage

OLD = 1_700_000_000_123_456_789  # nanoseconds: quiet, and not whole seconds


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reap2gguf.jobs.storage.time.sleep", lambda seconds: None)


def write(path: Path, text: str, ns: int = OLD) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    os.utime(path, ns=(ns, ns))


def state(output: Path) -> dict[str, tuple[str, int]]:
    """What an output holds, with times of change."""
    return {
        path.relative_to(output).as_posix(): (path.read_text(), path.stat().st_mtime_ns)
        for path in sorted(output.rglob("*"))
        if path.is_file() and path.name != ".storage.json"
    }


@pytest.fixture
def notes() -> list[str]:
    return []


@pytest.fixture
def first(tmp_path: Path, notes: list[str]) -> Storage:
    """A machine that has saved once."""
    output = tmp_path / "first"
    write(output / ".work" / "n" / "stages.json", "{}")
    write(output / ".work" / "n" / "n" / "weights", "w" * 100, OLD + 1)
    write(output / ".work" / "n" / "half.gguf.part", "half")
    write(output / ".work" / ".n.lock", "1")
    found = Storage(tmp_path / "storage", output, notes.append)
    assert found.restore() == 0
    assert found.save()
    return found


def objects(storage: Storage) -> set[str]:
    return set(os.listdir(storage.folder / "objects"))


def indexes(storage: Storage) -> list[Path]:
    return sorted((storage.folder / "index").iterdir())


def test_another_machine_gets_the_same_files_with_their_times(
    first: Storage, tmp_path: Path
) -> None:
    second = Storage(first.folder, tmp_path / "second")
    assert second.restore() == 2
    expected = state(first.output)
    del expected[".work/n/half.gguf.part"], expected[".work/.n.lock"]
    assert state(second.output) == expected
    assert not second.save()  # nothing has changed


def test_only_changes_are_copied_and_renamed_files_are_not(first: Storage) -> None:
    before = objects(first)
    (first.output / ".work" / "n" / "n").rename(first.output / "n")
    write(first.output / ".work" / "n" / "stages.json", '{"a": 1}')
    assert first.save()
    assert len(objects(first) - before) == 1
    for _ in range(4):  # old states, and what only they hold, are dropped
        write(first.output / ".work" / "n" / "stages.json", "{}" + " " * len(objects(first)))
        os.utime(first.output / ".work" / "n" / "stages.json", ns=(OLD, OLD + len(objects(first))))
        first.save()
    assert len(indexes(first)) == 3
    assert len(objects(first)) <= 4


def test_what_was_just_written_is_copied_again(first: Storage) -> None:
    path = first.output / "new"
    write(path, "one")
    now = path.stat().st_ctime_ns
    os.utime(path, ns=(now, now))
    first.save()
    inode = path.stat().st_ino
    path.write_text("two")  # within the same tick of a coarse clock
    os.utime(path, ns=(now, now))
    assert path.stat().st_ino == inode
    assert first.save()
    second = Storage(first.folder, first.output.with_name("second"))
    second.restore()
    assert (second.output / "new").read_text() == "two"


def test_nothing_is_copied_of_a_file_that_changes_meanwhile(
    first: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = first.output / "log"
    write(path, "before")
    copy = Storage._copy
    n_written = 0

    def copy_late(self: Storage, name: str, stat: os.stat_result) -> module.Entry:
        nonlocal n_written
        entry = copy(self, name, stat)
        if name == "log" and not n_written:
            n_written += 1
            write(path, "after!", OLD + 5)
        return entry

    monkeypatch.setattr(Storage, "_copy", copy_late)
    first.save()
    second = Storage(first.folder, first.output.with_name("second"))
    second.restore()
    assert state(second.output)["log"] == ("after!", OLD + 5)


def test_a_state_is_taken_while_the_build_is_stopped(first: Storage) -> None:
    seen = []

    @contextmanager
    def pause() -> Iterator[None]:
        write(first.output / "late", "x")  # the last write before the stop
        seen.append(len(objects(first)))
        yield

    assert first.save(pause)
    assert seen
    assert "late" in indexes(first)[-1].read_text()


@pytest.mark.parametrize("damage", ["cut index", "no hash", "object gone", "object cut", "bit"])
def test_a_half_saved_state_is_not_used(
    first: Storage, notes: list[str], tmp_path: Path, damage: str
) -> None:
    whole = state(first.output)
    write(first.output / ".work" / "n" / "n" / "weights", "v" * 100, OLD + 9)
    assert first.save()
    newest = indexes(first)[-1]
    data = newest.read_bytes()
    (name,) = [
        entry["object"]
        for entry in json.loads(data.split(b"\n")[0])["files"]
        if entry["name"].endswith("weights")
    ]
    target = first.folder / "objects" / name
    if damage == "cut index":
        newest.write_bytes(data[:50])
    elif damage == "no hash":
        newest.write_bytes(data.split(b"\n")[0])
    elif damage == "object gone":
        target.unlink()
    elif damage == "object cut":
        target.write_bytes(target.read_bytes()[:-1])
    else:
        target.write_bytes(b"V" + target.read_bytes()[1:])
    second = Storage(first.folder, tmp_path / "second", notes.append)
    assert second.restore() == 2
    assert state(second.output).items() <= whole.items()
    assert f"the saved state {newest.name} is incomplete, and is not used" in notes[0]
    # and what it saves from here on is the newest
    write(second.output / "more", "m")
    assert second.save()
    third = Storage(first.folder, tmp_path / "third")
    assert third.restore() == 3


def test_nothing_whole_is_a_build_from_scratch(
    first: Storage, notes: list[str], tmp_path: Path
) -> None:
    for index in indexes(first):
        index.write_text("{}")
    second = Storage(first.folder, tmp_path / "second", notes.append)
    assert second.restore() == 0
    assert state(second.output) == {}
    assert len(notes) == 2


def test_the_newest_machine_wins(first: Storage, tmp_path: Path) -> None:
    assert not first.is_taken()
    second = Storage(first.folder, tmp_path / "second")
    second.restore()
    assert first.is_taken()
    assert not second.is_taken()


def test_the_same_disk_is_newer_than_the_storage(first: Storage) -> None:
    write(first.output / "unsaved", "u")
    again = Storage(first.folder, first.output)
    before = objects(first)
    again.restore()
    assert (first.output / "unsaved").read_text() == "u"
    assert again.save()
    assert len(objects(first) - before) == 1  # the others are known


@pytest.mark.parametrize("where", ["before the index", "in the index"])
def test_a_kill_while_saving_leaves_the_disk_the_newest(first: Storage, where: str) -> None:
    """What the folders hold after a kill between the marker and the end of the index."""
    write(first.output / "unsaved", "u")
    last = indexes(first)[-1]
    later = f"{int(last.name[:8]) + 1:08d}-00000000.json"
    marker = {"indexes": [last.name, later]}
    (first.output / ".storage.json").write_text(json.dumps(marker))
    if where == "in the index":
        (first.folder / "index" / later).write_text('{"format"')
    again = Storage(first.folder, first.output)
    again.restore()
    assert (first.output / "unsaved").exists()
    assert again.save()
    assert Storage(first.folder, first.output.with_name("second")).restore() == 3


def test_an_interrupted_restore_starts_again(first: Storage, tmp_path: Path) -> None:
    output = tmp_path / "second"
    write(output / "half", "h")
    (output / ".storage.json").write_text('{"restoring": true}')
    second = Storage(first.folder, output)
    assert second.restore() == 2
    assert "half" not in state(output)


def test_files_that_are_not_its_own_are_refused(first: Storage, tmp_path: Path) -> None:
    output = tmp_path / "second"
    write(output / "mine", "m")
    with pytest.raises(OutputError, match="holds files that are not those saved last"):
        Storage(first.folder, output).restore()
    assert (output / "mine").read_text() == "m"


@pytest.mark.parametrize("name", ["../out", "/etc/out", "a/../../out", "", "a\0b"])
def test_names_that_lead_elsewhere_are_refused(
    first: Storage, notes: list[str], tmp_path: Path, name: str
) -> None:
    entry = module.Entry(name, "0" * 32, 0, 0, "")
    (first.folder / "objects" / ("0" * 32)).write_bytes(b"")
    first._write_index([entry])
    second = Storage(first.folder, tmp_path / "second", notes.append)
    assert second.restore() == 2  # of the state before
    assert not (tmp_path / "out").exists()


def test_a_storage_that_cannot_delete_only_grows(
    first: Storage, notes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> None:
        raise OutputError(f"{path}: cannot be removed (read-only)")

    monkeypatch.setattr(module, "remove", refuse)
    write(first.output / "a", "b")
    assert first.save()
    for number in range(3):
        write(first.output / "a", "c" * number, OLD + number)
        assert first.save()
    assert "cannot be removed" in notes[-1]


def test_a_storage_that_cannot_be_written(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        Storage(blocked / "storage", tmp_path / "out").restore()


def test_links_and_pipes_are_left_out(first: Storage) -> None:
    (first.output / "link").symlink_to("/etc/hostname")
    os.mkfifo(first.output / "pipe")
    assert not first.save()


def test_part_of_the_files_can_be_kept(first: Storage) -> None:
    assert first.save(keep=lambda name: name.endswith("weights"))
    second = Storage(first.folder, first.output.with_name("second"))
    assert second.restore() == 1
