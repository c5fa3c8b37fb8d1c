"""Turns panics of the tokenizers library, which is written in Rust, into our errors."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from reap2gguf.errors import Reap2ggufError


@contextmanager
def panics_as(error_class: type[Reap2ggufError], where: str) -> Iterator[None]:
    """Raise `error_class` for any error in the block, panics too.

    A panic is a BaseException, which `except Exception` does not catch, and Rust writes its
    backtrace to stderr by itself. Nothing that the library writes to stderr meanwhile is shown.
    """
    try:
        with _silent_stderr():
            yield
    except (Reap2ggufError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        reason = " ".join(str(error).split()) or repr(error)
        raise error_class(f"{where} ({reason})") from error


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """Redirect the descriptor of stderr: Rust does not write through `sys.stderr`."""
    sys.stderr.flush()
    saved, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        sys.stderr.flush()
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nowhere)
