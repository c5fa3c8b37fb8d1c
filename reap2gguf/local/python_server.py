"""The process of `serve` without llama-server: llama-cpp-python's server behind a guard.

llama-cpp-python's server answers whoever asks, and renders chat templates in its own process,
without a limit. The guard refuses requests that a web page of another site may have made, and
renders the prompt of each chat before the server sees the request: a template that fails, never
ends or fills the memory is an answer with status 400.
"""

from __future__ import annotations

import asyncio
import json
import sys
from argparse import ArgumentParser
from collections.abc import Awaitable, Callable, MutableMapping
from contextvars import ContextVar
from importlib import import_module
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from reap2gguf.errors import Reap2ggufError, UsageError
from reap2gguf.gguf_files.reader import read_gguf_header
from reap2gguf.local.engine_process import use_rendered_prompts
from reap2gguf.local.prompts import Prompts

_CHAT = "/v1/chat/completions"
_FORMAT = "rendered"  # the name under which llama-cpp-python finds the prompt of a request
_MAX_BODY_BYTES = 2**26
_PROMPT: ContextVar[str] = ContextVar("prompt")
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


class _RefusedError(Exception):
    """A request is refused, with an HTTP status."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


def is_loopback(host: str) -> bool:
    """Whether a host name or address means this machine alone."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


class Guard:
    """An ASGI application before another: refuses, renders, and passes on the rest."""

    def __init__(self, app: App, prompts: Prompts, host: str) -> None:
        self._app, self._prompts, self._host = app, prompts, host.lower()
        self._rendering = asyncio.Lock()  # there is one process that renders

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            try:
                self._check_origin(scope)
                if scope["method"] == "POST":
                    receive = await self._checked_body(scope, receive)
            except _RefusedError as refused:
                await _refuse(send, refused)
                return
        await self._app(scope, receive, send)

    def _check_origin(self, scope: Scope) -> None:
        """Raise _RefusedError for what a web page of another site may send.

        A name that such a page points to this machine (DNS rebinding) is in the Host header.
        """
        headers = _headers(scope)
        host = _name(f"//{headers.get('host', '')}")
        if is_loopback(self._host) and not is_loopback(host) and host != self._host:
            raise _RefusedError(
                403, f"Host is {host!r}, expected localhost; pass --host to serve other machines"
            )
        origin = headers.get("origin")
        if origin is not None and _name(origin) != host and not is_loopback(_name(origin)):
            raise _RefusedError(403, f"Origin is {origin!r}, expected a page of this machine")
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if scope["method"] == "POST" and kind != "application/json":
            raise _RefusedError(415, f"Content-Type is {kind!r}, expected 'application/json'")

    async def _checked_body(self, scope: Scope, receive: Receive) -> Receive:
        """The messages of the request once more; of a chat, its prompt is rendered before."""
        body = await _read(receive)
        if scope["path"].rstrip("/") == _CHAT and self._prompts.has_template:
            request = _json(body)
            if isinstance(request.get("messages"), list):
                async with self._rendering:
                    _PROMPT.set(await asyncio.to_thread(self._render, request))
        is_sent = False

        async def receive_again() -> MutableMapping[str, Any]:
            nonlocal is_sent
            if is_sent:
                return await receive()
            is_sent = True
            return {"type": "http.request", "body": body, "more_body": False}

        return receive_again

    def _render(self, request: dict[str, Any]) -> str:
        messages, tools = request["messages"], request.get("tools")
        variables = request.get("chat_template_kwargs")
        if not all(isinstance(message, dict) for message in messages):
            raise _RefusedError(400, "messages is not a list of objects")
        if not isinstance(tools, list | None) or not isinstance(variables, dict | None):
            raise _RefusedError(400, "expected tools as a list, chat_template_kwargs as an object")
        try:
            return self._prompts.render(messages, tools or None, variables)
        except Reap2ggufError as error:
            raise _RefusedError(400, str(error)) from error


def _headers(scope: Scope) -> dict[str, str]:
    return {name.decode("latin-1").lower(): v.decode("latin-1") for name, v in scope["headers"]}


def _name(url: str) -> str:
    """The host name in a URL, in small letters; empty if there is none."""
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


def _json(body: bytes) -> dict[str, Any]:
    """The object in a body; an empty one for any other text, which the server refuses itself."""
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


async def _read(receive: Receive) -> bytes:
    """The body of a request. Raises _RefusedError if it is too large."""
    body = bytearray()
    while True:
        message = await receive()
        body += message.get("body", b"")
        if len(body) > _MAX_BODY_BYTES:
            raise _RefusedError(413, f"over {_MAX_BODY_BYTES:,} bytes")
        if not message.get("more_body"):
            return bytes(body)


async def _refuse(send: Send, refused: _RefusedError) -> None:
    error = {"message": str(refused), "type": "invalid_request_error", "param": None, "code": None}
    body = json.dumps({"error": error}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": refused.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def main() -> None:
    """Run the server with the settings in the arguments, in the form of llama_cpp.server."""
    # none of these has types that can be checked
    uvicorn, app, cli, settings = (
        import_module(name)
        for name in (
            "uvicorn",
            *(f"llama_cpp.server.{part}" for part in ("app", "cli", "settings")),
        )
    )
    parser = ArgumentParser()
    cli.add_args_from_model(parser, settings.Settings)
    arguments = parser.parse_args()
    listening = cli.parse_model_from_args(settings.ServerSettings, arguments)
    model = cli.parse_model_from_args(settings.ModelSettings, arguments)
    path = Path(model.model)
    try:
        prompts = Prompts(path, read_gguf_header(path))
    except UsageError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    if prompts.has_template:
        use_rendered_prompts(_FORMAT, _PROMPT.get, lambda: prompts.stop)
        model.chat_format = _FORMAT
    guarded = Guard(
        app.create_app(server_settings=listening, model_settings=[model]), prompts, listening.host
    )
    uvicorn.run(guarded, host=listening.host, port=listening.port)
