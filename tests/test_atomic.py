from __future__ import annotations

import errno
import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from reap2gguf import atomic
from reap2gguf.errors import OutputError


def failing(error: int) -> Callable[..., Any]:
    def fail(*arguments: Any, **named: Any) -> Any:
        raise OSError(error, os.strerror(error))

    return fail


def test_a_file_is_there_only_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with atomic.whole_file(path) as file:
        file.write(b"first ")
        file.write(memoryview(b"second"))
        assert [p.name for p in tmp_path.iterdir()] == ["file.part"]
    assert path.read_bytes() == b"first second"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_file_that_fails_leaves_the_one_before(tmp_path: Path) -> None:
    path = tmp_path / "file"
    atomic.write_whole(path, "before")

    def write_and_stop() -> None:
        with atomic.whole_file(path) as file:
            file.write(b"after")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_and_stop()
    assert path.read_text() == "before"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_what_is_written_is_flushed_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    fsync, replace = inspect.unwrap(os.fsync), os.replace

    def watched_fsync(descriptor: int) -> None:
        seen.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def watched_replace(old: Path, new: Path) -> None:
        seen.append(f"{old.name} to {new.name}")
        replace(old, new)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(os, "replace", watched_replace)
    atomic.write_whole(tmp_path / "file", b"data")
    assert seen == ["file.part", "file.part to file", tmp_path.name]


def test_short_writes_are_carried_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, pwrite = os.write, os.pwrite
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[:3]))
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: pwrite(fd, data[:2], at))
    with atomic.whole_file(tmp_path / "file") as file:
        file.write(b"0123456789")
        file.write_at(b"abcde", 4)
    assert (tmp_path / "file").read_bytes() == b"0123abcde9"


@pytest.mark.parametrize("function", ["open", "write", "fsync", "close", "replace"])
@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (errno.ENOSPC, "free some space there and run the command again"),
        (errno.EDQUOT, "free some space there and run the command again"),
        (errno.EIO, "check the disk and run the command again"),
        (errno.ENODEV, "check the disk and run the command again"),
        (errno.EROFS, "pass another output, or change its permissions"),
        (errno.EACCES, "pass another output, or change its permissions"),
    ],
)
def test_every_error_of_the_disk_says_what_to_do(
    tmp_path: Path, function: str, error: int, advice: str
) -> None:
    path, close = tmp_path / "file", os.close

    def fail(*arguments: Any, **named: Any) -> None:
        if function == "close":
            close(*arguments)  # which an error of the disk does not prevent
        raise OSError(error, os.strerror(error))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, function, fail)
        with pytest.raises(OutputError) as caught:
            atomic.write_whole(path, b"data")
    assert str(caught.value) == f"{path}: cannot be written ({os.strerror(error)}); {advice}"
    assert not path.exists()


def test_no_room_says_how_much_was_wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "posix_fallocate", failing(errno.ENOSPC))
    with (
        pytest.raises(OutputError, match=r"file: no room for 1,000,000 bytes \(No space left"),
        atomic.open_file(tmp_path / "file", tmp_path / "file") as file,
    ):
        file.reserve(10**6)


@pytest.mark.parametrize("error", [errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS])
def test_a_disk_that_cannot_reserve(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    monkeypatch.setattr(os, "posix_fallocate", failing(error))
    with atomic.open_file(tmp_path / "file", tmp_path / "file") as file:
        file.reserve(1000)
    assert (tmp_path / "file").stat().st_size == 1000


def test_a_source_that_cannot_be_read_is_not_the_outputs_fault(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"source: cannot be read \(No such file"):
        atomic.copy_whole(tmp_path / "source", tmp_path / "copy")
    assert not list(tmp_path.iterdir())


def test_removing(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    (folder / "inner").mkdir(parents=True)
    (folder / "inner" / "file").write_text("")
    (tmp_path / "link").symlink_to(folder)
    atomic.remove(tmp_path / "link")
    assert folder.is_dir()
    atomic.remove(folder)
    atomic.remove(folder)
    assert not list(tmp_path.iterdir())


def test_nothing_is_written_but_through_this_module() -> None:
    """A write that is not flushed and renamed would leave half a file under a final name."""
    package = Path(atomic.__file__).parent
    writers = (
        "write_text(", "write_bytes(", '"wb"', '"w"', "copyfile(", ".tofile(", "os.rename(",
        "os.replace(", "os.pwrite(", ".touch(", "save_file(", "NamedTemporaryFile(",
    )  # fmt: skip
    found = {
        f"{file.relative_to(package)}: {writer}"
        for file in package.rglob("*.py")
        if file.name != "atomic.py"
        for writer in writers
        if writer in file.read_text()
    }
    assert found == {
        '__main__.py: "w"',  # a standard stream that was closed is opened on /dev/null
        "disk/lock.py: os.pwrite(",  # the number of a process, in a file that is only locked
        'local/frames.py: "wb"',  # a process that runs llama.cpp answers through a pipe
        'quantizing/ik/worker.py: "wb"',  # a process that runs ik_llama.cpp's library, the same
        'quantizing/name_regex.py: "w"',  # a letter of a pattern, no mode
        # a mounted bucket has no renames: a saved state ends with its own hash
        'jobs/storage.py: "wb"',
    }


def test_links_are_replaced_and_never_followed(tmp_path: Path) -> None:
    victim, folder = tmp_path / "victim", tmp_path / "out"
    folder.mkdir()
    victim.write_text("mine")
    for name in ("file", "file.part"):
        (folder / name).symlink_to(victim)
    atomic.write_whole(folder / "file", "data")
    assert victim.read_text() == "mine"
    assert not (folder / "file").is_symlink()
    assert (folder / "file").read_text() == "data"
    assert not (folder / "file.part").exists()


def test_an_unfinished_file_with_a_second_name_is_not_written_to(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    os.link(victim, tmp_path / "file.part")
    atomic.write_whole(tmp_path / "file", "data")
    assert victim.read_text() == "mine"


@pytest.mark.parametrize("kind", ["link", "dangling link", "second name", "pipe", "folder"])
def test_only_a_file_of_its_own_is_resumed(tmp_path: Path, kind: str) -> None:
    victim, part = tmp_path / "victim", tmp_path / "file.part"
    victim.write_text("mine")
    if kind == "second name":
        os.link(victim, part)
    elif kind == "pipe":
        os.mkfifo(part)
    elif kind == "folder":
        part.mkdir()
    else:
        part.symlink_to(victim if kind == "link" else tmp_path / "gone")
    with (
        pytest.raises(OutputError, match="file: cannot be written"),
        atomic.open_file(part, tmp_path / "file", resume=True),
    ):
        pass
    assert victim.read_text() == "mine"
    assert not (tmp_path / "gone").exists()


def test_what_is_resumed_keeps_its_bytes(tmp_path: Path) -> None:
    (tmp_path / "file.part").write_bytes(b"abcd")
    with atomic.open_file(tmp_path / "file.part", tmp_path / "file", resume=True) as file:
        file.write_at(b"X", 1)
    assert (tmp_path / "file.part").read_bytes() == b"aXcd"


def test_a_folder_that_is_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "folder").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OutputError, match="folder: a link, which is not followed"):
        atomic.make_folder(tmp_path / "folder")


def test_a_deep_folder_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    atomic.make_folder(Path(*["a"] * 1500))
    assert Path(*["a"] * 1500).is_dir()
    with pytest.raises(OutputError, match="cannot be written"):
        atomic.make_folder(Path(*["a"] * 3000))
    for _ in range(1500):  # pytest removes folders by recursion
        os.chdir("a")
    for _ in range(1500):
        os.chdir("..")
        os.rmdir("a")


@pytest.mark.parametrize("kind", ["pipe", "folder"])
def test_only_files_and_links_are_replaced(tmp_path: Path, kind: str) -> None:
    output = tmp_path / "file"
    os.mkfifo(output) if kind == "pipe" else output.mkdir()
    with pytest.raises(OutputError, match=f"file: a {kind}, which is not replaced"):
        atomic.write_whole(output, "data")
    (tmp_path / "old").write_text("data")
    with pytest.raises(OutputError, match=f"file: a {kind}, which is not replaced"):
        atomic.rename(tmp_path / "old", output)
    assert not output.is_file()
