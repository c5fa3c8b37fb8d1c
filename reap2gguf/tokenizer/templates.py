"""Renders conversations through a checkpoint's chat template, which is an untrusted program.

Jinja2's sandbox limits what a template can reach, but not its time or memory: one line of template
can fill the memory or never end. So templates run in `template_worker.py`, a process of its own
with hard limits, which is killed here if it does not answer. The text is that of transformers'
`apply_chat_template`, with two exceptions: for calibration the date that a template may ask for is
always 1 January 2025, and its random numbers are always the same, since a bundle must have the same
bytes on whatever day it is built.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import markupsafe

import reap2gguf
from reap2gguf.errors import BadSampleError, CalibrationError, DependencyError
from reap2gguf.tokenizer.template_worker import HEADER, TODAY, Answer
from reap2gguf.tokenizer.tokenizer_files import MAX_TEMPLATE_BYTES

_MAX_REQUEST_BYTES = 2**26
_START_SECONDS = 60.0  # for our own code alone, from a disk that may be slow
_SHOWN_LETTERS = 200
_PROBE = "reap2gguf"  # a text without letters that a template would escape
_ADVICE = 'pass samples of plain text (a "text" field each), or another --calibration'
# The fields in which datasets store a model's reasoning; the one that templates read comes first.
_REASONING = ("reasoning_content", "thinking", "reasoning")
_BOOT = (
    "import sys; sys.path += sys.argv[1:]; "
    "from reap2gguf.tokenizer.template_worker import main; main()"
)


@dataclass(frozen=True)
class Limits:
    """The limits of one rendering; a normal one takes milliseconds and a few megabytes."""

    cpu_seconds: float = 3.0
    wall_seconds: float = 10.0  # in addition, for a process that is stopped or gets no processor
    memory_bytes: int = 512 * 2**20  # in addition to what the process has at its start
    output_bytes: int = 64 * 2**20


class ChatTemplate:
    """A checkpoint's template, or templates by name, with a process that starts when it is needed.

    Use it as a context manager, or `close` it; a later rendering starts a new process.
    """

    def __init__(
        self,
        templates: str | Mapping[str, str],
        special_tokens: Mapping[str, str],
        limits: Limits | None = None,
        now: datetime = TODAY,
        advice: str = _ADVICE,
    ) -> None:
        self._templates = {"default": templates} if isinstance(templates, str) else dict(templates)
        self._special_tokens = dict(special_tokens)
        self._limits = limits or Limits()
        self._now = now
        self._advice = advice
        self._process: _Process | None = None
        self._reads_parts: bool | None = None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        add_generation_prompt: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """A conversation as text; `tools` are JSON schemas.

        `add_generation_prompt` adds the beginning of an answer; `variables` are others that the
        template may read, such as `enable_thinking`.
        Raises BadSampleError if the template refuses the conversation, and CalibrationError if it
        exceeds a limit or does something forbidden.
        """
        name = self._choose(tools is not None)
        more = {**(variables or {}), "add_generation_prompt": add_generation_prompt}
        return self._answer(_encoded(name, messages, tools, more))

    def check(self) -> None:
        """Compile all templates.

        Raises CalibrationError for one that is not a template, or exceeds a limit: Jinja2 computes
        constant expressions when it compiles.
        """
        for name in self._templates:
            self._check_size(name)
            self._answer(json.dumps({"template": name, "messages": None}).encode())

    def _answer(self, request: bytes) -> str:
        if self._process is None:
            self._process = self._start()
        try:
            return self._process.render(request)
        except _EndedError as ended:
            self.close()
            raise CalibrationError(f"{ended}; {self._advice}") from ended
        except _RefusedError as refused:
            raise BadSampleError(f"{refused}; {self._advice}") from refused

    def reads_parts(self) -> bool:
        """Whether the template reads content that is a list of parts, and not only text.

        Tried once, with a text, the same text as a list, and the same list with an image.
        """
        if self._reads_parts is None:
            text = [{"type": "text", "text": _PROBE}]
            image = [*text, {"type": "image"}]
            as_text, as_list, with_image = map(self._probed, (_PROBE, text, image))
            self._reads_parts = as_text is not None and as_text == as_list and bool(with_image)
        return self._reads_parts

    def _probed(self, content: Any) -> str | None:
        """A message as the template writes it; None if it refuses it or leaves it out."""
        try:
            rendered = self.render([{"role": "user", "content": content}])
        except CalibrationError:
            return None
        return rendered if _PROBE in rendered else None

    def names_role(self, role: str) -> bool:
        """Whether the name of a role is in the template."""
        return any(f"'{role}'" in t or f'"{role}"' in t for t in self._templates.values())

    def close(self) -> None:
        """End the process, if there is one."""
        if self._process is not None:
            self._process.close()
            self._process = None

    def __enter__(self) -> ChatTemplate:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _choose(self, has_tools: bool) -> str:
        """The name of the template for a conversation, chosen as transformers does."""
        name = "tool_use" if has_tools and "tool_use" in self._templates else "default"
        if name not in self._templates:
            raise CalibrationError(
                f"the model has chat templates named {', '.join(map(repr, self._templates))} and "
                f"none named 'default'; {self._advice}"
            )
        self._check_size(name)
        return name

    def _check_size(self, name: str) -> None:
        if (size := _size(self._templates[name])) > MAX_TEMPLATE_BYTES:
            raise CalibrationError(
                f"the chat template has {size:,} bytes, expected at most {MAX_TEMPLATE_BYTES:,}; "
                f"{self._advice}"
            )

    def _start(self) -> _Process:
        setup = {
            "templates": {
                name: t for name, t in self._templates.items() if _size(t) <= MAX_TEMPLATE_BYTES
            },
            "special_tokens": self._special_tokens,
            "now": self._now.isoformat(),
            **asdict(self._limits),
        }
        process = _Process(self._limits)
        try:
            process.exchange(json.dumps(setup).encode(), _START_SECONDS)
        except _EndedError as ended:
            process.close()
            raise DependencyError(
                f"the process that renders chat templates does not start ({ended}); reinstall "
                "reap2gguf and jinja2"
            ) from ended
        return process


class _RefusedError(Exception):
    """The template refuses a conversation, and why; the process can be used further."""


class _EndedError(Exception):
    """A rendering has failed, and why; the process cannot be used any more."""


class _Process:
    """A running worker and the socket to it."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._socket, theirs = socket.socketpair()
        # isolated: no environment, no current folder and only the packages that it needs; and a
        # session of its own, so that Ctrl-C reaches only this process
        keep = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _BOOT, *_folders()],
                stdin=theirs.fileno(),
                stdout=theirs.fileno(),
                stderr=subprocess.DEVNULL,
                env={name: os.environ[name] for name in keep if name in os.environ},
                start_new_session=True,
            )
        self.close = weakref.finalize(self, _end, self._process, self._socket)

    def render(self, request: bytes) -> str:
        """The text of a conversation. Raises _RefusedError or _EndedError if there is none."""
        kind, body = self.exchange(request, self._limits.wall_seconds)
        message = _shown(body)
        memory = f"{self._limits.memory_bytes / 2**20:,.0f} MiB of memory"
        output = f"{self._limits.output_bytes / 2**20:,.0f} MiB of text"
        if kind == Answer.TEXT:
            with contextlib.suppress(UnicodeDecodeError):  # a broken answer, as said below
                return body.decode("utf-8", "surrogatepass")
        if kind == Answer.REFUSED:  # the process answers the next request as before
            raise _RefusedError(f"the chat template refuses it ({message})")
        reasons = {
            int(Answer.FORBIDDEN): f"the chat template does something forbidden ({message})",
            int(Answer.OUT_OF_MEMORY): f"the chat template used more than {memory}",
            int(Answer.TOO_LONG): f"the chat template wrote more than {output}",
        }
        raise _EndedError(reasons.get(kind, "the chat template's process gave a broken answer"))

    def exchange(self, request: bytes, seconds: float) -> tuple[int, bytes]:
        """Send a request and return kind and body of the answer, all within `seconds`."""
        deadline = time.monotonic() + seconds
        try:
            self._socket.settimeout(seconds)
            self._socket.sendall(HEADER.pack(0, len(request)) + request)
            kind, length = HEADER.unpack(self._receive(HEADER.size, deadline))
            # never more than the limit, whatever the process has become
            if length > max(self._limits.output_bytes, 2**16):
                raise _EndedError("the chat template's process gave a broken answer")
            return kind, self._receive(length, deadline)
        except TimeoutError as error:
            raise _EndedError(f"the chat template took more than {seconds:g} s") from error
        except ConnectionError as error:
            raise _EndedError(self._end_reason()) from error

    def _receive(self, length: int, deadline: float) -> bytes:
        """Exactly `length` bytes."""
        received = bytearray()
        while len(received) < length:
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError
            self._socket.settimeout(left)
            piece = self._socket.recv(min(length - len(received), 2**20))
            if not piece:
                raise ConnectionResetError
            received += piece
        return bytes(received)

    def _end_reason(self) -> str:
        """Why the process has ended; it has closed its side of the socket."""
        try:
            status = self._process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            return "the chat template's process does not answer"
        if status == -signal.SIGPROF:
            return (
                f"the chat template used more than {self._limits.cpu_seconds:g} s of processor time"
            )
        if status < 0:
            return f"the chat template's process was killed ({signal.Signals(-status).name})"
        return f"the chat template's process has ended (exit {status})"


def _end(process: subprocess.Popen[bytes], connection: socket.socket) -> None:
    """End a worker, whatever its state."""
    connection.close()
    process.kill()
    process.wait()


def _size(template: str) -> int:
    return len(template.encode("utf-8", "surrogatepass"))


def _folders() -> list[str]:
    """The folders of this package and of the two that the worker needs."""
    files = [str(module.__file__) for module in (reap2gguf, jinja2, markupsafe)]
    return list(dict.fromkeys(str(Path(file).absolute().parents[1]) for file in files))


def _shown(raw: bytes) -> str:
    """An untrusted message, fit for one line of a terminal."""
    words = " ".join(raw[: 8 * _SHOWN_LETTERS].decode("utf-8", "replace").split())
    letters = "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode("ascii")
        for letter in words[: _SHOWN_LETTERS + 1]
    )
    return letters if len(letters) <= _SHOWN_LETTERS else letters[:_SHOWN_LETTERS] + "..."


def _encoded(
    name: str,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None,
    variables: Mapping[str, Any],
) -> bytes:
    """A request to render `messages`. Raises CalibrationError if they are too large."""
    try:
        prepared = [_prepared(message) for message in messages]
        request = {
            "template": name,
            "messages": prepared,
            "tools": _plain(tools),
            "variables": _plain(variables),
        }
        body = json.dumps(request, ensure_ascii=False).encode("utf-8", "surrogatepass")
    except RecursionError as error:
        raise CalibrationError("messages are nested too deeply; flatten them") from error
    if len(body) > _MAX_REQUEST_BYTES:
        raise CalibrationError(
            f"{len(body):,} bytes of messages, expected at most {_MAX_REQUEST_BYTES:,}; cut them"
        )
    return body


def _prepared(message: Mapping[str, Any]) -> Any:
    """A message as templates expect it: no empty fields, and reasoning under each of its names."""
    plain = {key: value for key, value in _plain(message).items() if value is not None}
    reasoning = next((plain[key] for key in _REASONING if key in plain), None)
    if reasoning is None:
        return plain
    return {"thinking": reasoning, **plain, "reasoning_content": reasoning}


def _plain(value: Any) -> Any:
    """A value of JSON's types; any other, such as a date, becomes the name of its type."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, str | bool | int | float):
        return value
    return f"<{type(value).__name__}>"
