"""A Hub on the loopback interface that speaks what huggingface_hub asks, and fails when told to.

Downloads are answered here: repositories of models and datasets, their trees, HEAD and ranged GET
of files. Anything else is handed to `writes`, which takes uploads.
"""

from __future__ import annotations

import os
import socket
import struct
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import huggingface_hub
import pytest
from huggingface_hub import constants
from huggingface_hub.utils import disable_progress_bars

from tests.loopback_hub.repository import (
    Answer,
    Content,
    Headers,
    Repository,
    Request,
    read,
    size_of,
)

_BLOCK = 2**20


@dataclass
class Fault:
    """What happens to the next `times` requests of a method whose path has `where` in it.

    An answer with `status`, or with as many bytes of the real body as `after` says, upon which the
    connection ends: in order, by a reset, or with the whole Hub. With `held` it does not end, and
    nothing comes, not even a status where `after` is 0, until that is set.
    """

    status: int = 0
    where: str = "/api/models/"
    method: str = "GET"
    times: int = 1
    headers: Headers = field(default_factory=dict)
    body: bytes = b""
    after: int | None = None
    reset: bool = False
    ends_all: bool = False
    held: threading.Event | None = None
    range_end: str = ""  # only requests whose range ends so: "-" is the rest of a file
    reached: threading.Event = field(default_factory=threading.Event)


class Hub:
    """Repositories, and what was asked for. Use as a context.

    `requests` are "METHOD path [range]"; `bytes_sent` counts the bodies of answers.
    """

    def __init__(
        self, files: dict[str, Content] | None = None, repositories: Iterable[Repository] = ()
    ) -> None:
        first = [Repository("owner/name", files)] if files is not None else []
        self.repositories = [*first, *repositories]
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self.bytes_sent = 0
        self.writes: Callable[[Hub, Request], Answer | None] | None = None
        self._port = 0

    @property
    def name(self) -> str:
        return self.repositories[0].name

    @property
    def files(self) -> dict[str, Content]:
        return self.repositories[0].files

    def __enter__(self) -> Hub:
        self.come()
        return self

    def __exit__(self, *error: object) -> None:
        self.leave()

    def come(self) -> None:
        """Be there; after `leave`, at the same address as before."""
        self._server = _Server(("127.0.0.1", self._port), _Handler)
        self._server.hub = self
        self._port = self._server.server_address[1]
        self.endpoint = f"http://127.0.0.1:{self._port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()

    def leave(self, gone: threading.Event | None = None) -> None:
        """Be gone: connections are refused from now on, and `gone` is set."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
        if gone is not None:
            gone.set()

    def serve(self, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
        """Make huggingface_hub talk to this Hub, with a cache of its own, for one test."""
        template = self.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", self.endpoint)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        disable_progress_bars()
        huggingface_hub.close_session()

    def environment(self, home: Path) -> dict[str, str]:
        """Variables for a process of its own that talks to this Hub."""
        return {
            **os.environ,
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1",
        }

    def asked(self, text: str) -> list[str]:
        """The requests so far that have `text` in them."""
        return [request for request in self.requests if text in request]

    def fault(self, method: str, path: str, wanted: str = "") -> Fault | None:
        """What is to go wrong with a request, used up."""
        for fault in self.faults:
            is_meant = not wanted or wanted.endswith(fault.range_end)
            if fault.times and is_meant and fault.method == method and fault.where in path:
                fault.times -= 1
                return fault
        return None

    def find(self, path: str) -> Repository | None:
        """The repository that a path of the API or of a file is about."""
        for repository in self.repositories:
            if path == repository.api or path.startswith(
                (f"{repository.api}/", f"{repository.home}/", f"{repository.home}.git/")
            ):
                return repository
        return None

    def answer(self, request: Request) -> Answer:
        """What a request is answered, all being well."""
        if self.writes and (found := self.writes(self, request)):
            return found
        repository = self.find(request.path)
        if request.method in ("GET", "HEAD") or "/paths-info/" in request.path:
            if repository is None:
                code = "RepoNotFound" if request.path.count("/") > 2 else "EntryNotFound"
                return Answer(404, {"X-Error-Code": code})
            return read(repository, request)
        return Answer(404, {"X-Error-Code": "RepoNotFound"})


class _Server(ThreadingHTTPServer):
    hub: Hub
    daemon_threads = True

    def shutdown_request(self, request: Any) -> None:
        # without the farewell of the base class, so that a reset is one
        self.close_request(request)


class _Handler(BaseHTTPRequestHandler):
    server: _Server

    def do_GET(self) -> None:
        self._respond()

    def do_HEAD(self) -> None:
        self._respond()

    def do_POST(self) -> None:
        self._respond()

    def do_PUT(self) -> None:
        self._respond()

    def do_DELETE(self) -> None:
        self._respond()

    def log_message(self, *args: object) -> None:
        """Nobody reads."""

    def _respond(self) -> None:
        hub, url = self.server.hub, urlsplit(self.path)
        body = self._body()
        request = Request(
            self.command, unquote(url.path), parse_qs(url.query), dict(self.headers), body
        )
        wanted = self.headers.get("Range", "")
        hub.requests.append(f"{self.command} {request.path} {wanted}".strip())
        fault = hub.fault(self.command, request.path, wanted)
        if fault is not None and fault.held and not fault.after:
            fault.reached.set()
            fault.held.wait(600)  # only guards against hanging
        if fault is not None and fault.after is None and not fault.ends_all:
            return self._send(Answer(fault.status, dict(fault.headers), fault.body), None)
        return self._send(_part(hub.answer(request), wanted), fault)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        pieces = []
        while length := int(self.rfile.readline().split(b";")[0], 16):
            pieces.append(self.rfile.read(length))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(pieces)

    def _send(self, answer: Answer, fault: Fault | None) -> None:
        left = answer.length if fault is None else min(answer.length, fault.after or 0)
        try:
            self.send_response(answer.status)
            for name, value in answer.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(answer.length))
            self.end_headers()
            if self.command != "HEAD":
                for block in _blocks(answer, left):
                    self.wfile.write(block)
                    self.server.hub.bytes_sent += len(block)
        except (BrokenPipeError, ConnectionResetError):
            return  # the client has what it wanted
        if fault and fault.held:
            fault.reached.set()
            fault.held.wait(600)  # only guards against hanging
        if fault and fault.reset:
            now = struct.pack("ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, now)
        if fault and fault.ends_all:
            # beside this thread, which the end of the server waits for
            threading.Thread(target=self.server.hub.leave, args=(fault.reached,)).start()


def _part(answer: Answer, wanted: str) -> Answer:
    """The range of a whole answer that was asked for."""
    if not wanted or answer.status != 200:
        return answer
    size = size_of(answer.body)
    begin, _, end = wanted.removeprefix("bytes=").partition("-")
    first, last = int(begin), min(int(end) if end else size - 1, size - 1)
    if first > last:
        return Answer(416, {"Content-Range": f"bytes */{size}"})
    headers = {**answer.headers, "Content-Range": f"bytes {first}-{last}/{size}"}
    return Answer(206, headers, answer.body, first, last - first + 1)


def _blocks(answer: Answer, count: int) -> Iterator[bytes]:
    if isinstance(answer.body, bytes):
        yield answer.body[answer.first : answer.first + count]
        return
    with answer.body.path.open("rb") as file:
        file.seek(answer.first)
        while count and (block := file.read(min(count, _BLOCK))):
            count -= len(block)
            yield block
