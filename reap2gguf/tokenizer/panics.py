"""Panics of the tokenizers library, which is Rust, as errors of ours."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from reap2gguf.errors import Reap2ggufError


@contextmanager
def panics_as(kind: type[Reap2ggufError], where: str) -> Iterator[None]:
    """Raise `kind` for whatever goes wrong inside, panics among it.

    A panic is a BaseException, which `except Exception` lets through, and Rust writes its backtrace
    to stderr on its own. What else the library says on stderr meanwhile is not shown either.
    """
    try:
        with _silent_stderr():
            yield
    except (Reap2ggufError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        reason = " ".join(str(error).split()) or repr(error)
        raise kind(f"{where} ({reason})") from error


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """Point the descriptor of stderr elsewhere: Rust does not write through `sys.stderr`."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        sys.stderr.flush()
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
