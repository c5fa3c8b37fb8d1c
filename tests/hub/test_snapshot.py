from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from reap2gguf.errors import OutputError, Reap2ggufError, SourceError
from reap2gguf.hub.retry import TRIES
from reap2gguf.hub.shards import HubShards
from reap2gguf.hub.snapshot import find
from tests.loopback_hub.repository import COMMIT
from tests.loopback_hub.server import Fault, Hub

FILES = {
    "config.json": b"{}",
    "model.safetensors": bytes(range(256)) * 2**12,
    "LICENSE": b"free",
    "chat_template.jinja": b"{{ messages }}",
    "pytorch_model.bin": b"pickled",
    "modeling_remote.py": b"raise SystemExit",
    "training/optimizer.pt": b"pickled",
}
WANTED = {"config.json", "model.safetensors", "LICENSE", "chat_template.jinja"}
WEIGHTS = "/resolve/" + COMMIT + "/model.safetensors"


class Fetching:
    """Fetches, and remembers what was said and how long it would have waited."""

    def __init__(self, hub: Hub) -> None:
        self.hub = hub
        self.notes: list[str] = []
        self.waits: list[float] = []

    def __call__(self, revision: str | None = None) -> Path:
        snapshot = find(self.hub.name, revision, self.notes.append, self.waits.append)
        snapshot.complete(self.notes.append, self.waits.append)
        shards = HubShards(snapshot, self.notes.append, self.waits.append)
        try:
            for name in snapshot.weights:
                shards.wait_for(snapshot.folder / name)
        finally:
            shards.close()
        return snapshot.folder

    def refused(self, kind: type[Reap2ggufError] = SourceError) -> str:
        with pytest.raises(kind) as caught:
            self()
        assert "\n" not in str(caught.value)
        return str(caught.value)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with Hub(dict(FILES)) as hub:
        hub.serve(monkeypatch, tmp_path / "cache")
        yield hub
    huggingface_hub.close_session()


@pytest.fixture
def fetching(hub: Hub) -> Fetching:
    return Fetching(hub)


def content(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


WHOLE = {name: FILES[name] for name in WANTED}


def test_what_a_build_reads_is_fetched(fetching: Fetching, hub: Hub) -> None:
    folder = fetching()
    assert folder.name == COMMIT
    assert content(folder) == WHOLE
    assert (fetching.notes, fetching.waits) == ([], [])
    assert not hub.asked(".bin")
    assert not hub.asked(".py")


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_a_busy_hub_is_tried_again(status: int, fetching: Fetching, hub: Hub) -> None:
    hub.faults = [Fault(status, times=2)]
    assert content(fetching()) == WHOLE
    assert len(fetching.waits) == 2
    assert 1 <= fetching.waits[0] <= 1.25
    assert 2 <= fetching.waits[1] <= 2.5
    assert fetching.notes == [
        f"owner/name: the Hub cannot be reached (HTTP {status}); try {number} of 5 in "
        f"{wait:.0f} s" for number, wait in zip((2, 3), fetching.waits, strict=True)
    ]  # fmt: skip


@pytest.mark.parametrize(("asked", "waited"), [("7", 7), ("86400", 60), ("tomorrow", 1)])
def test_a_busy_hub_says_how_long(
    asked: str, waited: int, fetching: Fetching, hub: Hub
) -> None:  # fmt: skip
    hub.faults = [Fault(429, headers={"Retry-After": asked})]
    fetching()
    assert [int(wait) for wait in fetching.waits] == [waited]


def test_a_file_that_fails_is_tried_again(fetching: Fetching, hub: Hub) -> None:
    # huggingface_hub repeats the HEAD by itself
    hub.faults = [Fault(503, WEIGHTS, "HEAD"), Fault(503, WEIGHTS)]
    assert content(fetching()) == WHOLE
    assert len(fetching.notes) == 1
    # what was whole is not fetched again
    assert len(hub.asked("GET /owner/name/resolve/main/config.json")) == 1


def test_a_cut_download_goes_on_where_it_was(
    fetching: Fetching, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    # what is resumed is whole chunks
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 100_000)
    hub.faults = [Fault(where=WEIGHTS, after=300_000)]
    assert content(fetching()) == WHOLE
    assert fetching.notes == []
    first, second = hub.asked(f"GET /owner/name{WEIGHTS}")
    assert (first.count(" "), second.rpartition(" ")[2]) == (1, "bytes=300000-")


def test_a_reset_download_is_tried_again(fetching: Fetching, hub: Hub) -> None:
    hub.faults = [Fault(where=WEIGHTS, after=300_000, reset=True, times=2)]
    folder = fetching()
    assert content(folder) == WHOLE
    assert len(fetching.notes) == 2
    assert "reset" in fetching.notes[0]
    assert len(hub.asked(f"GET /owner/name/resolve/{COMMIT}/LICENSE")) == 1
    blobs = [path.name for path in (folder.parents[1] / "blobs").iterdir()]
    assert not [name for name in blobs if "incomplete" in name]


def test_a_reset_before_any_answer_is_tried_again(fetching: Fetching, hub: Hub) -> None:
    hub.faults = [Fault(after=0, reset=True)]
    assert content(fetching()) == WHOLE
    assert len(fetching.notes) == 1


def test_a_hub_that_is_gone(fetching: Fetching, hub: Hub) -> None:
    hub.leave()
    message = fetching.refused()
    for base, wait in zip((1, 2, 4, 8), fetching.waits, strict=True):
        assert base <= wait <= 1.25 * base
    assert len(fetching.notes) == TRIES - 1
    assert "onnection refused" in message
    for advice in ("in 5 tries", "`hf download owner/name`", "pass the folder", "HF_HUB_OFFLINE=1"):
        assert advice in message


def test_a_hub_that_stays_busy(fetching: Fetching, hub: Hub) -> None:
    hub.faults = [Fault(503, times=99)]
    assert "cannot be reached in 5 tries (HTTP 503)" in fetching.refused()
    assert len(hub.requests) == TRIES


@pytest.mark.parametrize("gone", [True, False], ids=["gone", "busy"])
def test_the_cache_serves_without_the_hub(gone: bool, fetching: Fetching, hub: Hub) -> None:
    folder = fetching()
    if gone:
        hub.leave()
    else:
        hub.faults = [Fault(503, times=99)]
    assert fetching() == folder
    assert fetching(COMMIT) == folder
    assert len(fetching.notes) == 2
    assert f"using the cached copy, commit {COMMIT[:12]}" in fetching.notes[0]


def test_a_cache_that_is_not_whole_does_not_serve(fetching: Fetching, hub: Hub) -> None:
    folder = fetching()
    (folder / "model.safetensors").unlink()
    hub.leave()
    assert "cannot be reached in 5 tries" in fetching.refused()


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (Fault(401), "refuses it (HTTP 401)"),
        (Fault(401, headers={"X-Error-Code": "RepoNotFound"}), "no such repository"),
        (Fault(403), "refuses it (HTTP 403)"),
        (Fault(403, headers={"X-Error-Code": "GatedRepo"}), "accept its terms"),
        (Fault(404), "refuses it (HTTP 404)"),
        (Fault(404, headers={"X-Error-Code": "RepoNotFound"}), "no such repository"),
        (Fault(404, headers={"X-Error-Code": "RevisionNotFound"}), "no revision"),
        (Fault(400), "refuses it (HTTP 400)"),
        (Fault(200, body=b"<html>Please log in</html>"), "is not understood"),
        (Fault(200, body=b'{"id": 1'), "is not understood"),
        (Fault(200, body=b"[]"), "is not understood"),
        (Fault(200, body=b"[" * 100_000), "is not understood"),
        (Fault(200, body=b'{"id": "a", "siblings": 5}'), "is not understood"),
        (Fault(200, body=b'{"id": "a", "sha": "../.."}'), "it names no commit"),
        (Fault(403, WEIGHTS, "HEAD"), "refuses it (HTTP 403)"),
        (Fault(404, WEIGHTS, "HEAD", headers={"X-Error-Code": "EntryNotFound"}), "(HTTP 404)"),
        (Fault(200, WEIGHTS, "HEAD"), "is not understood"),
    ],
    ids=lambda value: str(value) if isinstance(value, str) else "",
)
def test_refusals_are_not_tried_again(
    fault: Fault, said: str, fetching: Fetching, hub: Hub
) -> None:  # fmt: skip
    fault.times = 99
    hub.faults = [fault]
    message = fetching.refused()
    assert message.startswith("owner/name: ")
    assert said in message
    assert fetching.waits == []
    assert len(hub.asked(fault.where)) <= 2


def test_a_missing_revision(fetching: Fetching) -> None:
    with pytest.raises(SourceError, match="no revision 'v9' on the Hub"):
        fetching("v9")
    assert fetching.waits == []


def test_offline_is_not_tried_again(
    fetching: Fetching, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set, and the cache has no complete copy" in fetching.refused()
    assert (fetching.waits, hub.requests) == ([], [])


def test_offline_uses_the_cache(fetching: Fetching, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = fetching()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert fetching() == folder


def test_a_full_disk_is_not_the_hubs_fault(
    fetching: Fetching, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(huggingface_hub.file_download, "http_get", full)
    message = fetching.refused(OutputError)
    assert message.startswith(f"{tmp_path / 'cache'}: the Hub's cache cannot be written (No space")
    assert "HF_HOME" in message
    assert fetching.waits == []


def test_a_full_disk_in_the_words_of_hf_xet(
    fetching: Fetching, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("I/O error: No space left on device (os error 28)\nand more")

    monkeypatch.setattr(huggingface_hub.file_download, "http_get", full)
    assert "No space left" in fetching.refused(OutputError)


def test_a_cache_that_is_no_folder(fetching: Fetching, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("")
    assert "cache cannot be written" in fetching.refused(OutputError)
    assert fetching.waits == []
