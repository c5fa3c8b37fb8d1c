"""An OpenAI-style server over one model in this process, for trying a bundle.

One request is answered at a time, others wait; a client that does not send, read or stay loses its
turn. The paths are OpenAI's: /v1/models, /v1/chat/completions, /v1/completions; /health says
whether it is up. Answers that are streamed are server-sent events: `data: {...}` for each chunk,
`data: [DONE]` at the end.
"""

from __future__ import annotations

import json
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from reap2gguf import __version__
from reap2gguf.errors import Reap2ggufError, UsageError
from reap2gguf.local.address import address_of, bound_socket
from reap2gguf.local.engine import Engine
from reap2gguf.local.requests import (
    MAX_BODY_BYTES,
    RequestError,
    messages_of,
    prompt_of,
    read_body,
    settings_of,
    wants_stream,
    wants_usage,
)
from reap2gguf.messages import one_line

_MAX_CLIENTS = 64  # that are connected at a time
_ARRIVAL_SECONDS = 60.0  # that a client may take to send its request
_STALL_SECONDS = 30.0  # that a client in all may keep an answer waiting
_CLOSING_SECONDS = 5.0  # that an answer under way may take to end
_GET = ("/health", "/v1/health", "/v1/models")
_POST = ("/v1/chat/completions", "/v1/completions")


class ModelServer(ThreadingHTTPServer):
    """A listening server; `serve` answers once there is a model."""

    daemon_threads = True
    engine: Engine | None = None

    def __init__(self, host: str, port: int, name: str, note: Callable[[str], None]) -> None:
        """Take the port; UsageError if it is taken, or the host is none of this machine."""
        self.model_name = name
        self.note = note
        self.begun = int(time.time())
        self.turn = threading.Lock()
        self.is_ending = False
        self.arriving: dict[socket.socket, float] = {}  # since when a request is being sent
        self._seats = threading.Semaphore(_MAX_CLIENTS)
        listening = bound_socket(host, port)
        super().__init__((host, port), _Handler, bind_and_activate=False)
        self.socket.close()  # of IPv4, whatever the host is
        self.socket = listening
        self.server_address = listening.getsockname()

    @property
    def address(self) -> str:
        """Where it can be reached, for people and for OpenAI clients."""
        host, port = self.server_address[:2]
        return address_of(str(host), int(port))

    def serve(self, engine: Engine) -> None:
        """Answer until a signal interrupts; an answer under way is ended."""
        self.engine = engine
        try:
            self.serve_forever(poll_interval=0.1)
        finally:
            self.is_ending = True
            # the model must not be closed under an answer
            if self.turn.acquire(timeout=_CLOSING_SECONDS):
                engine.close()

    def service_actions(self) -> None:
        """Called many times a second: hear no more of clients that send for ever."""
        latest = time.monotonic() - _ARRIVAL_SECONDS
        for connection, since in list(self.arriving.items()):
            if since < latest:
                with suppress(OSError):  # gone
                    connection.shutdown(socket.SHUT_RD)

    def process_request(self, request: Any, client_address: Any) -> None:
        """A thread for each client, of which there may be so many."""
        if not self._seats.acquire(blocking=False):
            with suppress(OSError):
                request.sendall(b"HTTP/1.1 503 Service Unavailable\r\nConnection: close\r\n\r\n")
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """As the base class, and the seat is free afterwards."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._seats.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that is gone is no error of ours; anything else is said in one line."""
        import sys

        error = sys.exc_info()[1]
        if not isinstance(error, ConnectionError | TimeoutError):
            self.note(f"a request failed: {type(error).__name__}: {error}")


class _Handler(BaseHTTPRequestHandler):
    server: ModelServer
    server_version = f"reap2gguf/{__version__}"
    protocol_version = "HTTP/1.1"
    timeout = _ARRIVAL_SECONDS
    stalled = 0.0

    def setup(self) -> None:
        super().setup()
        self.server.arriving[self.connection] = time.monotonic()

    def finish(self) -> None:
        self.server.arriving.pop(self.connection, None)
        super().finish()

    def do_GET(self) -> None:
        with self._errors_told():
            path = self._path(_GET, _POST)
            self._send(200, self._models() if path == "/v1/models" else {"status": "ok"})

    def do_POST(self) -> None:
        with self._errors_told():
            path = self._path(_POST, _GET)
            values = read_body(self._body())
            settings, streams = settings_of(values), wants_stream(values)
            with_usage = wants_usage(values)
            answer: Callable[[bool], Any]
            if path == "/v1/completions":
                settings.pop("response_format", None)
                answer = _completing(self.server, prompt_of(values), settings)
            else:
                answer = _chatting(self.server, messages_of(values), settings)
            with self.server.turn, _engine(self.server).watched_by(self._stay):
                self._stay()
                if streams:
                    self._stream(answer(True), with_usage)
                    return
                whole = answer(False)
            self._send(200, whole)

    def do_PUT(self) -> None:
        with self._errors_told():
            self._path((), (*_GET, *_POST))

    do_DELETE = do_PATCH = do_HEAD = do_OPTIONS = do_PUT

    def _path(self, allowed: tuple[str, ...], others: tuple[str, ...]) -> str:
        path = self.path.split("?", 1)[0].rstrip("/")
        if path in others:
            raise RequestError(405, f"{path} takes no {self.command}", "method_not_allowed")
        if path not in allowed:
            known = ", ".join((*_GET[:1], *_GET[2:], *_POST))
            raise RequestError(404, f"there is nothing here; the paths are {known}", "not_found")
        return path

    def _body(self) -> bytes:
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdecimal()):
            raise RequestError(411, "a request needs a Content-Length")
        if len(length) > 18 or int(length) > MAX_BODY_BYTES:
            raise RequestError(413, f"a request has at most {MAX_BODY_BYTES:,} bytes")
        body = self.rfile.read(int(length))
        self.server.arriving.pop(self.connection, None)
        if len(body) < int(length):
            raise RequestError(400, f"the body ends after {len(body):,} of {int(length):,} bytes")
        return body

    def _stay(self) -> None:
        """Go on only while somebody waits for the answer; asked before each token."""
        if self.server.is_ending:
            raise RequestError(503, "the server is ending")
        readable = select.select([self.connection], [], [], 0)[0]
        if readable and not self.connection.recv(1, socket.MSG_PEEK):
            raise ConnectionAbortedError("the client is gone")

    def _models(self) -> dict[str, Any]:
        entry = {"id": self.server.model_name, "object": "model", "created": self.server.begun}
        return {"object": "list", "data": [{**entry, "owned_by": "reap2gguf"}]}

    def _send(self, status: int, values: Mapping[str, Any]) -> None:
        body = json.dumps(values).encode()
        self._head(status, "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _stream(self, chunks: Iterator[Any], with_usage: bool) -> None:
        first = next(chunks, None)  # what is refused is refused before the answer begins
        n_read = _engine(self.server).n_tokens  # those of the prompt
        self._head(200, "text/event-stream")
        self.send_header("Cache-Control", "no-cache")
        self.end_headers()
        # closed early where the client is gone: llama.cpp stops at that token
        with closing(chunks):  # type: ignore[type-var]
            if first is not None:
                self._event(json.dumps(first))
            for chunk in chunks:
                self._event(json.dumps(chunk))
        if with_usage and first is not None:
            self._event(json.dumps(self._usage(first, n_read)))
        self._event("[DONE]")

    def _usage(self, chunk: Mapping[str, Any], n_read: int) -> dict[str, Any]:
        """The chunk after an answer that has no choices, and its numbers of tokens."""
        total = _engine(self.server).n_tokens + 1  # the last token is chosen and not read
        usage = {
            "prompt_tokens": n_read,
            "completion_tokens": total - n_read,
            "total_tokens": total,
        }
        return {**chunk, "choices": [], "usage": usage}

    def _event(self, text: str) -> None:
        begun = time.monotonic()
        self.connection.settimeout(max(_STALL_SECONDS - self.stalled, 0.01))
        self.wfile.write(f"data: {text}\n\n".encode())
        self.stalled += time.monotonic() - begun

    def _head(self, status: int, kind: str) -> None:
        self.close_connection = True
        self.has_begun = True
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Connection", "close")

    has_begun = False

    @contextmanager
    def _errors_told(self) -> Iterator[None]:
        """Errors in OpenAI's form; of an answer that has begun, as its last event."""
        try:
            yield
        except RequestError as error:
            self._fail(error.status, str(error), error.code)
        except UsageError as error:
            full = "context window" in str(error)
            self._fail(400, str(error), "context_length_exceeded" if full else None)
        except Reap2ggufError as error:
            self._fail(500, str(error), None)

    def _fail(self, status: int, message: str, code: str | None) -> None:
        kind = "invalid_request_error" if status < 500 else "server_error"
        values = {"error": {"message": one_line(message), "type": kind, "code": code}}
        if self.has_begun:
            self._event(json.dumps(values))
        else:
            self._send(status, values)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Requests that are no HTTP, in the same form as every error."""
        self._fail(int(code), message or explain or "a bad request", None)

    def log_message(self, format: str, *arguments: Any) -> None:
        """A line for each request."""
        self.server.note(one_line(f"{self.address_string()} {format % arguments}"))


def _engine(server: ModelServer) -> Engine:
    if server.engine is None:
        raise RequestError(503, "the model is being loaded")
    return server.engine


def _chatting(
    server: ModelServer, messages: list[dict[str, str]], settings: dict[str, Any]
) -> Callable[[bool], Any]:
    engine = _engine(server)
    if not engine.has_template:
        raise RequestError(400, "the model has no chat template; use /v1/completions", "no_chat")
    return lambda streams: engine.chat(
        messages, stream=streams, model=server.model_name, **settings
    )


def _completing(
    server: ModelServer, prompt: str, settings: dict[str, Any]
) -> Callable[[bool], Any]:
    engine = _engine(server)
    return lambda streams: engine.complete(
        prompt, stream=streams, model=server.model_name, **settings
    )
