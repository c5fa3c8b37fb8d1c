"""A Hub on the loopback interface, as far as downloads need it, that fails when it is told to."""

from __future__ import annotations

import hashlib
import json
import socket
import struct
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import huggingface_hub
import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Fault:
    """What happens to the next `times` requests of a method whose path has `where` in it.

    An answer with `status`, or with as many bytes of the real body as `after` says, upon which the
    connection ends: in order, or by a reset.
    """

    status: int = 0
    where: str = "/api/models/"
    method: str = "GET"
    times: int = 1
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    after: int | None = None
    reset: bool = False


@dataclass
class Hub:
    """One repository of one commit. Use as a context; `requests` are "METHOD path [range]"."""

    files: dict[str, bytes]
    name: str = "owner/name"
    faults: list[Fault] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def __enter__(self) -> Hub:
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.hub = self
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.leave()

    def leave(self) -> None:
        """Be gone: connections are refused from now on."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def serve(self, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
        """Make huggingface_hub talk to this Hub, with a cache of its own, for one test."""
        constants = huggingface_hub.constants
        template = self.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", self.endpoint)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        huggingface_hub.utils.disable_progress_bars()
        huggingface_hub.close_session()

    def asked(self, text: str) -> list[str]:
        """The requests so far that have `text` in them."""
        return [request for request in self.requests if text in request]

    def fault(self, method: str, path: str) -> Fault | None:
        """What is to go wrong with a request, used up."""
        for fault in self.faults:
            if fault.times and fault.method == method and fault.where in path:
                fault.times -= 1
                return fault
        return None

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of a request for `path`."""
        api, resolve = f"/api/models/{self.name}", f"/{self.name}/resolve/{COMMIT}/"
        if path in (api, f"{api}/revision/main", f"{api}/revision/{COMMIT}"):
            siblings = [{"rfilename": name} for name in self.files]
            return _json({"id": self.name, "sha": COMMIT, "siblings": siblings})
        if path.startswith(f"{api}/revision/"):
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        if path == f"{api}/tree/{COMMIT}":
            return _json([_entry(name, content) for name, content in self.files.items()])
        content = self.files.get(path.removeprefix(resolve))
        if path.startswith(resolve) and content is not None:
            return 200, {"X-Repo-Commit": COMMIT, "ETag": f'"{_hash(content)}"'}, content
        known = path.startswith((f"{api}/", f"/{self.name}/"))
        return 404, {"X-Error-Code": "EntryNotFound" if known else "RepoNotFound"}, b""


class _Server(ThreadingHTTPServer):
    hub: Hub

    def shutdown_request(self, request: Any) -> None:
        # without the farewell of the base class, so that a reset is one
        self.close_request(request)


class _Handler(BaseHTTPRequestHandler):
    server: _Server

    def do_GET(self) -> None:
        self._respond()

    def do_HEAD(self) -> None:
        self._respond()

    def log_message(self, *args: object) -> None:
        """Nobody reads."""

    def _respond(self) -> None:
        hub, path = self.server.hub, unquote(urlsplit(self.path).path)
        wanted = self.headers.get("Range", "")
        hub.requests.append(f"{self.command} {path} {wanted}".strip())
        fault = hub.fault(self.command, path)
        if fault is not None and fault.after is None:
            return self._send(fault.status, fault.headers, fault.body)
        status, headers, body = hub.answer(path)
        if wanted and status == 200:
            first = int(wanted.removeprefix("bytes=").partition("-")[0])
            headers["Content-Range"] = f"bytes {first}-{len(body) - 1}/{len(body)}"
            status, body = 206, body[first:]
        return self._send(status, headers, body, fault)

    def _send(
        self, status: int, headers: dict[str, str], body: bytes, fault: Fault | None = None
    ) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: fault.after] if fault else body)
        if fault and fault.reset:
            now = struct.pack("ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, now)


def _entry(name: str, content: bytes) -> dict[str, Any]:
    return {"type": "file", "path": name, "size": len(content), "oid": _hash(content)}


def _json(value: Any) -> tuple[int, dict[str, str], bytes]:
    return 200, {"Content-Type": "application/json"}, json.dumps(value).encode()


def _hash(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()
