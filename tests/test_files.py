from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path

import pytest
from huggingface_hub.utils._shared_blobs import publish_blob_to_shared_store

from reap2gguf.files import (
    TooLargeError,
    cached_blob,
    expect_range,
    file_sha256,
    is_plain,
    is_plain_name,
    leads_away,
    open_entry,
    open_plain,
    plain_size,
    read_entry,
)


def pipe(path: Path) -> Path:
    os.mkfifo(path)
    return path


def test_a_plain_file(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"abc")
    assert plain_size(path) == 3
    assert is_plain(path)
    with open_plain(path) as file:
        assert file.read() == b"abc"


def test_what_is_no_plain_file(tmp_path: Path) -> None:
    for path, words in ((pipe(tmp_path / "p"), "a pipe"), (Path("/dev/zero"), "a device")):
        assert not is_plain(path)
        for look in (plain_size, open_plain):
            with pytest.raises(OSError, match=f"{words}, expected a file"):
                look(path)
    with pytest.raises(OSError, match="a folder, expected a file"):
        plain_size(tmp_path)


@pytest.mark.parametrize("name", ["gone", "a\0b", "n" * 5000, "half \ud800"])
def test_names_of_nothing(name: str, tmp_path: Path) -> None:
    assert not is_plain(tmp_path / name)
    with pytest.raises(OSError, match=r"No such file|not the name of a file|File name too long"):
        plain_size(tmp_path / name)


def test_plain_names() -> None:
    assert is_plain_name("model-00001-of-00002.safetensors")
    assert not any(map(is_plain_name, ("", ".", "..", "a/b", "/a", "a\\b", "a\0b")))


def test_links(tmp_path: Path) -> None:
    folder, other = tmp_path / "model", tmp_path / "other"
    folder.mkdir()
    other.write_text("")
    (folder / "own").write_text("")
    for name, target in {
        "in": "own", "out": "../other", "far": "/etc/passwd", "round": "round", "chain": "out",
    }.items():  # fmt: skip
        (folder / name).symlink_to(target)
    leading = {file.name for file in folder.iterdir() if leads_away(file)}
    assert leading == {"in", "out", "far", "round", "chain"}
    # a folder that is itself named through a link
    (tmp_path / "alias").symlink_to(folder)
    assert not leads_away(tmp_path / "alias" / "own")
    for name in leading:
        with pytest.raises(OSError, match="a link, which is not followed"):
            open_entry(folder / name)
    with open_entry(folder / "out", follow_links=True) as file:
        assert file.read() == b""


def test_the_hubs_cache(tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "m" / "snapshots" / "abc", tmp_path / "m" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "1").write_text("")
    (tmp_path / "m" / "refs").write_text("")
    (snapshot / "config.json").symlink_to("../../blobs/1")
    (snapshot / "stray.json").symlink_to("../../refs")
    assert not leads_away(snapshot / "config.json")
    assert leads_away(snapshot / "stray.json")
    # blobs that lie elsewhere are elsewhere
    (blobs / "2").symlink_to("../refs")
    (snapshot / "other.json").symlink_to("../../blobs/2")
    assert leads_away(snapshot / "other.json")
    # templates are in a folder of the snapshot
    (snapshot / "additional_chat_templates").mkdir()
    (snapshot / "additional_chat_templates" / "a.jinja").symlink_to("../../../blobs/1")
    assert not leads_away(snapshot / "additional_chat_templates" / "a.jinja")


def test_a_folder_of_blobs_that_is_a_link(tmp_path: Path) -> None:
    snapshot = tmp_path / "m" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "token").write_text("secret")
    (tmp_path / "m" / "blobs").symlink_to(tmp_path / "home")
    (snapshot / "config.json").symlink_to("../../blobs/token")
    assert leads_away(snapshot / "config.json")


def test_a_small_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"1234")
    assert read_entry(tmp_path / "a", 4) == b"1234"
    with pytest.raises(TooLargeError, match="4 bytes, expected at most 3"):
        read_entry(tmp_path / "a", 3)


def test_what_repositories_of_a_cache_share(tmp_path: Path) -> None:
    """As huggingface_hub itself lays it out, for files that came by hf_xet."""
    repository = tmp_path / "models--owner--name"
    snapshot, blobs = repository / "snapshots" / "abc", repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    blob = blobs / ("0" * 64)
    blob.write_bytes(b"weights")
    (snapshot / "model.safetensors").symlink_to(Path("../../blobs") / blob.name)
    assert publish_blob_to_shared_store(
        blob_path=str(blob), xet_hash="f" * 64, cache_dir=tmp_path, expected_size=7,
        replace_existing=False,
    )  # fmt: skip
    assert blob.is_symlink()
    assert not leads_away(snapshot / "model.safetensors")
    assert cached_blob(snapshot / "model.safetensors") == blob.name
    (tmp_path / "blobs" / ".huggingface-shared-blobs").unlink()
    assert leads_away(snapshot / "model.safetensors")


def advice(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The ranges that the system is asked to read from now on."""
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(
        os, "posix_fadvise", lambda _, *place_and_kind: asked.append(place_and_kind[:2])
    )
    return asked


def test_advice_is_given_in_steps_that_the_system_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Linux reads no more than the disk's readahead for one advice."""
    if not hasattr(os, "posix_fadvise"):
        pytest.skip("this system takes no advice on files")
    asked = advice(monkeypatch)

    def not_in_memory(*_: object) -> int:
        raise BlockingIOError

    monkeypatch.setattr("reap2gguf.files._peek", not_in_memory)
    expect_range(3, 1000, 300_000)
    assert all(count <= 2**17 for _, count in asked)
    ends = [first + count for first, count in asked]
    assert [first for first, _ in asked] == [1000, *ends[:-1]]
    assert ends[-1] == 301_000


def test_what_is_in_memory_is_not_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not hasattr(os, "RWF_NOWAIT"):
        pytest.skip("this system does not say what is in memory")
    asked = advice(monkeypatch)
    in_memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=in_memory if in_memory.is_dir() else tmp_path) as folder:
        for path in (tmp_path / "file", Path(folder) / "file"):
            path.write_bytes(bytes(2**20))
            with path.open("rb") as file:
                file.read()
                expect_range(file.fileno(), 5, 2**19)
                expect_range(file.fileno(), 5, 0)
    assert not asked


@pytest.mark.parametrize("n_bytes", [0, 1, 2**22 - 1, 2**22, 2**22 + 5])
def test_a_hash_is_of_every_byte(n_bytes: int, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(range(251)) * (n_bytes // 251) + bytes(n_bytes % 251))
    blocks: list[float] = []
    assert file_sha256(path, blocks.append) == hashlib.sha256(path.read_bytes()).hexdigest()
    assert sum(blocks) == n_bytes
