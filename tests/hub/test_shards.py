"""The weights of a repository on the Hub, in headers and whole files."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import CancelledError
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from safetensors.torch import save_file

from reap2gguf.checkpoint.checkpoint import Checkpoint
from reap2gguf.errors import CheckpointError, SourceError
from reap2gguf.hub import download, shards
from reap2gguf.hub.download import AbandonedError, DownloadProgress
from reap2gguf.hub.source import resolve_source
from reap2gguf.progress import Silent
from reap2gguf.terminal.console import say
from reap2gguf.terminal.lines import Lines
from tests.loopback_hub.model import ENDS, MODEL, layered_files, serving, whole
from tests.loopback_hub.server import Fault, Hub


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return layered_files(tmp_path_factory.mktemp("source") / "tiny")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, files: dict[str, bytes]) -> Iterator[Hub]:
    with serving(files, monkeypatch, tmp_path / "cache") as hub:
        yield hub


def opened() -> Checkpoint:
    return resolve_source("owner/name").open()


def test_a_header_longer_than_the_first_read(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = opened().tensors
    monkeypatch.setattr(shards, "_FIRST_BYTES", 100)
    found = opened().tensors
    assert found == expected
    assert len(hub.asked("bytes=100-")) == 5


def test_a_server_that_knows_no_ranges(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.loopback_hub.server._part", lambda answer, wanted: answer)
    assert len(opened().shards) == 5
    monkeypatch.setattr(shards, "_FIRST_BYTES", 100)
    with pytest.raises(SourceError, match="not understood"):
        opened()


@pytest.mark.parametrize(
    ("beginning", "said"),
    [
        (b"\xff" * 8, "claims a header of"),
        (b"\x40\0\0\0\0\0\0\0not json", "not valid JSON"),
        (b"", "too short"),
    ],
)
def test_a_header_that_cannot_be(hub: Hub, tmp_path: Path, beginning: bytes, said: str) -> None:
    hub.files[ENDS] = beginning + b" " * 100 if beginning else b""
    with pytest.raises(CheckpointError, match=said):
        opened()


def test_fetched_or_not_it_is_the_same_model(hub: Hub, tmp_path: Path) -> None:
    before = opened()
    prints = before.fingerprint(), before.stamps()
    source = resolve_source("owner/name")
    with source.open() as checkpoint:
        for shard in checkpoint.shards:
            checkpoint.read(next(n for n, t in checkpoint.tensors.items() if t.path == shard))
    assert (checkpoint.fingerprint(), checkpoint.stamps()) == prints
    # and in a process that is offline, or is given the folder
    again = Checkpoint.open(source.folder)
    assert (again.fingerprint(), again.stamps()) == prints
    assert not hub.asked("vocab.json")


def test_what_comes_damaged_is_fetched_again(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = resolve_source("owner/name")
    checkpoint = source.open()
    content = hub.files[ENDS]
    assert isinstance(content, bytes)
    real = download.file_sha256
    seen: list[Path] = []

    def once_wrong(path: Path) -> str:
        seen.append(path)
        return "0" * 64 if len(seen) == 1 else real(path)

    monkeypatch.setattr(download, "file_sha256", once_wrong)
    checkpoint.read("model.norm.weight")
    assert len(whole(hub, ENDS)) == 2
    monkeypatch.setattr(download, "file_sha256", lambda path: "0" * 64)
    with pytest.raises(CheckpointError, match="its hash differs from that of the file on the Hub"):
        checkpoint.read("model.layers.0.input_layernorm.weight")
    checkpoint.close()


def test_who_waits_is_let_go(hub: Hub, tmp_path: Path) -> None:
    checkpoint = resolve_source("owner/name").open()
    entered, release = threading.Event(), threading.Event()
    real = hub.answer

    def slow(request: Any) -> Any:
        if request.path.endswith(ENDS) and request.method == "GET":
            entered.set()
            release.wait(60)
        return real(request)

    hub.answer = slow  # type: ignore[method-assign]
    errors: list[BaseException] = []

    def read() -> None:
        try:
            checkpoint.read("model.norm.weight")
        except CancelledError as error:
            errors.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    assert entered.wait(60)
    checkpoint.close()
    reader.join(60)
    release.set()
    assert len(errors) == 1
    # and whoever reads later fetches it
    assert checkpoint.read("model.norm.weight").size == 32
    checkpoint.close()


def test_whatever_goes_wrong_reaches_who_waits(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: Any, **kwargs: Any) -> None:
        raise TypeError("something new")

    checkpoint = resolve_source("owner/name").open()
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fails)
    with pytest.raises(TypeError, match="something new"):
        checkpoint.read("model.norm.weight")
    checkpoint.close()


def test_bytes_count_once_however_often_a_download_begins() -> None:
    done: list[int] = []
    abandoned = threading.Event()
    progress = DownloadProgress(done.append, abandoned)
    with progress.bar_class()(total=100, desc="first", unit="B") as bar:
        bar.update(30)
        bar.update_transfer(99)
        bar.update(-30)  # the server sent the beginning once more
        bar.update(40)
    with progress.bar_class()(total=100, desc="second", initial=0) as bar:
        for _ in range(10):
            bar.update(10)
    assert (sum(done), done[0]) == (100, 30)
    abandoned.set()
    with pytest.raises(AbandonedError):
        progress.add(1)


def test_a_blob_that_was_removed_is_fetched_again(hub: Hub, tmp_path: Path) -> None:
    with opened() as checkpoint:
        weight = checkpoint.read("model.norm.weight")
    (checkpoint.folder / ENDS).resolve().unlink()
    with opened() as again:
        assert (again.read("model.norm.weight") == weight).all()
    assert len(whole(hub, ENDS)) == 2


def test_nothing_is_fetched_where_it_was_given_up(hub: Hub, tmp_path: Path) -> None:
    checkpoint = opened()
    with checkpoint.without_fetching():
        checkpoint.fetch_ahead([])
        with pytest.raises(CancelledError):
            checkpoint.read("model.norm.weight")
    assert whole(hub, ENDS) == []
    assert checkpoint.read("model.norm.weight").size == 32
    checkpoint.close()


class Seen(Silent):
    """What a bar was told."""

    def __init__(self) -> None:
        self.total = self.done = 0.0

    @contextmanager
    def task(self, title: str, total: float, unit: str) -> Iterator[Seen]:
        self.total = total
        yield self

    def advance(self, amount: float = 1) -> None:
        self.done += amount

    def at(self, place: str) -> None:
        """Nothing here has a place."""


def test_what_another_process_fetched_counts_too(hub: Hub, tmp_path: Path) -> None:
    checkpoint, seen = opened(), Seen()
    checkpoint.report_to(seen)
    names = {tensor.path.name for tensor in checkpoint.tensors.values()}
    checkpoint.read("model.norm.weight")
    # between our look at the cache and the fetch
    for name in sorted(names - {ENDS}):
        huggingface_hub.hf_hub_download("owner/name", name, revision=checkpoint.folder.name)
        (checkpoint.folder / name).rename(tmp_path / name)
    for name, tensor in sorted(checkpoint.tensors.items()):
        if tensor.path.name != ENDS:
            checkpoint.read(name, 0, 1)
    checkpoint.close()
    assert seen.total == seen.done == sum(map(len, weights_of(hub)))


def weights_of(hub: Hub) -> list[bytes]:
    return [
        content for name, content in hub.files.items()
        if name.endswith(".safetensors") and isinstance(content, bytes)
    ]  # fmt: skip


def test_what_was_given_up_is_not_said_to_be_done(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = opened()
    checkpoint.report_to(Lines(say))
    checkpoint.read("model.norm.weight")
    checkpoint.close()
    shown = capsys.readouterr().err
    assert "Fetching owner/name: " in shown
    assert "done" not in shown
    for shard in checkpoint.shards:
        checkpoint.read(next(n for n, t in checkpoint.tensors.items() if t.path == shard))
    checkpoint.close()
    assert "Fetching owner/name: done in" in capsys.readouterr().err


@pytest.mark.parametrize("where", ["/api/models/", ENDS])
def test_a_server_that_says_nothing_is_asked_again(
    where: str, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.3)
    held, told = threading.Event(), list[str]()
    hub.faults = [Fault(where=where, after=0, held=held)]
    try:
        resolve_source("owner/name", told.append).open(told.append)
    finally:
        held.set()
    assert len(told) == 1
    assert "try 2 of 5" in told[0]


def test_one_file_goes_before_an_index_on_the_hub_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, bytes]
) -> None:
    single = tmp_path / "model.safetensors"
    save_file(MODEL.tensors(), single, {"format": "pt"})
    more = {single.name: single.read_bytes(), "adapter_config.json": b"{}"}
    with serving(files | more, monkeypatch, tmp_path / "cache"), opened() as checkpoint:
        assert [shard.name for shard in checkpoint.shards] == [single.name]
        used, adapter = checkpoint.notes
    assert "model.safetensors is used, as in transformers" in used
    assert "an adapter (adapter_config.json) lies beside the weights" in adapter
