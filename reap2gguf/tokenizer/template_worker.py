"""The process that renders an untrusted chat template; `templates.py` starts it.

It imports the standard library and Jinja2 and nothing else, so it starts in a fifth of a second and
holds no secrets. Before it reads a template it gives up what a template does not need: more memory,
open files, other processes. Each rendering has a limit of processor time, at which the system ends
the process, whatever the code is doing.

Requests and answers are frames: one byte for the kind, four for the length, then the body. The
first request holds the templates and the limits, each later one a conversation.
"""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import struct
import sys
from datetime import datetime
from enum import IntEnum
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import jinja2.constants
import jinja2.debug
import jinja2.nodes
import jinja2.parser
from jinja2.exceptions import SecurityError, TemplateError, TemplateSyntaxError
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

HEADER = struct.Struct(">BI")  # kind, bytes of the body
MAX_REASON_BYTES = 2048
# Python and Jinja2 import these at their first use, when no file can be opened any more
_USED_LATER = ("encodings.ascii", "encodings.unicode_escape", "html", "pprint", "textwrap")
# A bundle must not depend on the day it is built: for it, templates get this date.
TODAY = datetime(2025, 1, 1)


class Answer(IntEnum):
    """The kind of an answer."""

    READY = 0
    TEXT = 1  # rendered; the body is the text
    REFUSED = 2  # the template raised an error; the body is its message, as in FORBIDDEN
    FORBIDDEN = 3
    OUT_OF_MEMORY = 4
    TOO_LONG = 5


class _Generation(Extension):
    """`{% generation %}`, which marks the assistant's text; the marks are not needed here."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


class _Dict:
    """`dict` without the attributes of a class."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(Namespace):
    """`namespace` that refuses names with a leading underscore, such as Python's own."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # a template may set `self`
        values = dict(*args[1:], **kwargs)
        for name in values:
            _refuse_private(name)
        Namespace.__init__(args[0], values)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_private(name)
        super().__setitem__(name, value)


def _refuse_private(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace cannot hold {name!r}: it begins with an underscore")


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def environment(now: datetime = TODAY) -> ImmutableSandboxedEnvironment:
    """Jinja2 as transformers sets it up for chat templates, at a given time."""
    result = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    result.filters["tojson"] = _tojson
    result.globals.update(
        raise_exception=_raise_exception,
        strftime_now=now.strftime,
        dict=_Dict(),
        namespace=_Namespace,
    )
    return result


class _Worker:
    """Answers requests with the templates and limits of the first one."""

    def __init__(self, setup: dict[str, Any]) -> None:
        self._templates: dict[str, str] = setup["templates"]
        self._special_tokens: dict[str, str] = setup["special_tokens"]
        self._seconds: float = setup["cpu_seconds"]
        self._max_bytes: int = setup["output_bytes"]
        self._environment = environment(datetime.fromisoformat(setup["now"]))
        self._compiled = cache(lambda name: self._environment.from_string(self._templates[name]))
        _drop_rights(setup["memory_bytes"])

    def answer(self, body: bytes) -> tuple[Answer, bytes]:
        """One conversation, rendered in bounded time."""
        signal.setitimer(signal.ITIMER_PROF, self._seconds)
        try:
            return self._render(json.loads(body.decode("utf-8", "surrogatepass")))
        except MemoryError:
            return Answer.OUT_OF_MEMORY, b""
        except SecurityError as error:
            return Answer.FORBIDDEN, _reason(error)
        except Exception as error:  # noqa: BLE001 - a template can raise any error
            return Answer.REFUSED, _reason(error)
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)

    def _render(self, request: dict[str, Any]) -> tuple[Answer, bytes]:
        template = self._compiled(request["template"])
        if request["messages"] is None:  # whether it is a template is all that is asked
            return Answer.TEXT, b""
        # filters that use random numbers must give the same in each build
        random.seed(0)
        variables = {
            **self._special_tokens,
            **request["variables"],
            "messages": request["messages"],
            "tools": request["tools"],
            "documents": None,
        }
        pieces, length = [], 0
        for piece in template.generate(variables):
            pieces.append(piece)
            length += len(piece)
            if length > self._max_bytes:
                return Answer.TOO_LONG, b""
        text = "".join(pieces).encode("utf-8", "surrogatepass")
        return (Answer.TOO_LONG, b"") if len(text) > self._max_bytes else (Answer.TEXT, text)


def _reason(error: Exception) -> bytes:
    if isinstance(error, TemplateSyntaxError):
        text = f"line {error.lineno}: {error.message}"
    else:
        text = str(error) or type(error).__name__
    return text[: MAX_REASON_BYTES // 4].encode("utf-8", "replace")


def _drop_rights(memory_bytes: int) -> None:
    """Set limits that this process cannot raise again."""
    for name in _USED_LATER:
        __import__(name)
    limits = [(resource.RLIMIT_CORE, 0), (resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_NPROC, 0)]
    limits.append((resource.RLIMIT_NOFILE, 0))
    statm = Path("/proc/self/statm")
    # other systems ignore a limit of address space; there, the limit of time bounds the memory
    if statm.is_file():
        in_use = int(statm.read_text().split()[0]) * resource.getpagesize()
        limits.insert(0, (resource.RLIMIT_AS, in_use + memory_bytes))
    for which, limit in limits:
        _, most = resource.getrlimit(which)
        bounded = limit if most == resource.RLIM_INFINITY else min(limit, most)
        resource.setrlimit(which, (bounded, bounded))


def _read(source: BinaryIO) -> bytes | None:
    """The body of the next request; None at the end."""
    header = source.read(HEADER.size)
    if len(header) < HEADER.size:
        return None
    length = HEADER.unpack(header)[1]
    body = source.read(length)
    return body if len(body) == length else None


def _write(target: BinaryIO, kind: Answer, body: bytes) -> None:
    target.write(HEADER.pack(kind, len(body)))
    target.write(body)
    target.flush()


def main() -> None:
    """Serve requests from standard input until it ends."""
    source, target = sys.stdin.buffer, sys.stdout.buffer
    # a parent that ignores the signal would pass this on to its child
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    setup = _read(source)
    if setup is None:
        return
    worker = _Worker(json.loads(setup.decode("utf-8", "surrogatepass")))
    _write(target, Answer.READY, b"")
    while (body := _read(source)) is not None:
        _write(target, *worker.answer(body))
        del body
    # nothing is left to clean up, and without files Python could not report an error
    os._exit(0)
