"""A loopback Hub that takes uploads, and pushes to it in this process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from reap2gguf.errors import Reap2ggufError
from reap2gguf.progress import Silent
from reap2gguf.publishing.push import Published, PushOptions, push
from reap2gguf.verifying.bundle import check_bundle
from tests.loopback_hub.server import Hub
from tests.loopback_hub.uploads import TOKEN, Uploads

REPO, GGUF_REPO = "me/thing", "me/thing-GGUF"


class Told(Silent):
    """A Progress that keeps what the user is told."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


class Room:
    """A Hub, what was written to it, and pushes."""

    def __init__(self, hub: Hub, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
        self.hub = hub
        hub.writes = self.uploads = Uploads()
        hub.serve(monkeypatch, cache)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
        self.told = Told()
        self.waits: list[float] = []
        self.waiting: Callable[[], None] = lambda: None
        self.check_bundle: Callable[..., None] = check_bundle

    def push(self, bundle: Path, repo: str = REPO, **options: Any) -> Published:
        def sleep(seconds: float) -> None:
            self.waits.append(seconds)
            self.waiting()

        return push(PushOptions(bundle, repo, **options), self.check_bundle, self.told, sleep)

    def refused(self, kind: type[Reap2ggufError], *arguments: Any, **options: Any) -> str:
        with pytest.raises(kind) as caught:
            self.push(*arguments, **options)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    def files(self, repo: str = REPO) -> dict[str, Any]:
        (found,) = (r for r in self.hub.repositories if r.name == repo)
        return found.files

    def wrote(self) -> list[str]:
        """The requests that put or change something."""
        return [
            request for request in self.hub.requests
            if request.startswith(("PUT", "POST", "DELETE")) and "paths-info" not in request
        ]  # fmt: skip

    def check(self, bundle: Path) -> None:
        """Both repositories hold the bundle: what stays as it is byte for byte, nothing twice."""
        for folder, repo in ((bundle, REPO), (bundle.with_name(bundle.name + "-GGUF"), GGUF_REPO)):
            names = {file.name for file in folder.iterdir()}
            found = self.files(repo)
            assert found.keys() == names | {".gitattributes"}
            for name in names - {"README.md", "reap2gguf.json", "SHA256SUMS"}:
                assert found[name] == (folder / name).read_bytes()
            assert self.uploads.added_twice(repo) == []
        assert self.uploads.put_twice() == []


def close() -> None:
    huggingface_hub.close_session()
