"""A build on this machine that survives it: restored first, saved while it runs, pushed at the end.

The build is a process of its own, in a process group of its own. While its files are copied to the
storage, the group is stopped (SIGSTOP): so what is saved is what a kill would leave.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from reap2gguf.bundle.layout import BundleFolders
from reap2gguf.errors import JobError, OutputError
from reap2gguf.jobs.storage import Storage

if TYPE_CHECKING:
    from reap2gguf.hub.retry import Note

SAVE_SECONDS = 60  # between two saved states, at least
_POLL_SECONDS = 0.2
_GRACE_SECONDS = 20.0  # for a build to end in order before its machine is taken away
_PROGRAM = (sys.executable, "-m", "reap2gguf")
_SET_PDEATHSIG = 1  # of prctl(2)
SHARED = (".work/observations/", ".work/texts/")  # what builds of one output share


@dataclass(frozen=True)
class HereOptions:
    """The arguments of `jobs here`."""

    words: tuple[str, ...]  # the arguments of `build`, without --output
    output: Path
    storage: Path | None = None  # None: nothing is saved
    push: str | None = None  # None: nothing is pushed
    private: bool = True
    save_seconds: float = SAVE_SECONDS


def work_here(options: HereOptions, note: Note) -> int:
    """Restore, build and push; the exit code of the first command that fails, or 0.

    Raises OutputError if the output or the storage cannot be used, and JobError if the build's
    name is not known. On Ctrl-C or SIGTERM the build ends in order and its work is saved.
    """
    storage = None
    if options.storage is not None:
        storage = Storage(options.storage, options.output, note)
        if count := storage.restore():
            note(f"restored {count:,} files from {options.storage}")
    # before the work, so that a plan which cannot be built costs nothing
    name = None
    if options.push is not None:
        code, name = _bundle_name(options)
        if code:
            return code
    words = ["build", *options.words, "--output", str(options.output)]
    if code := _run_saving(words, storage, options.save_seconds, note):
        return code
    if options.push is None or name is None:
        return 0
    folder = BundleFolders(options.output, name).hf
    kind = ["--private"] if options.private else []
    words = ["push", str(folder), options.push, *kind]
    if code := _run_saving(words, storage, options.save_seconds, note):
        return code
    if storage is not None:
        _save(storage, None, note, keep_all=False)
        note(f"{options.storage}: keeps the observations and texts for other builds")
    return 0


def _bundle_name(options: HereOptions) -> tuple[int, str | None]:
    """The exit code of planning, and the name of the bundle that `build` will make."""
    # in a process of its own: what a plan loads is not needed again
    words = ["jobs", "needs", "--", "build", *options.words]
    found = subprocess.run([*_PROGRAM, *words], stdout=subprocess.PIPE, check=False)
    if found.returncode:
        return found.returncode, None
    try:
        name = json.loads(found.stdout)["name"]
    except (ValueError, KeyError, TypeError) as error:
        raise JobError("`jobs needs` did not print the bundle's name; this is a bug") from error
    return 0, str(name)


def _run_saving(
    words: Sequence[str], storage: Storage | None, save_seconds: float, note: Note
) -> int:
    """Run a command of this program, and save its work while it runs and when it ends."""
    # a session of its own: Ctrl-C reaches this process alone, and a stop only the build
    process = subprocess.Popen(
        [*_PROGRAM, *words],
        stdin=subprocess.DEVNULL,  # nobody is there to answer
        start_new_session=True,
        preexec_fn=_end_with(os.getpid()),
    )
    try:
        _watch(process, storage, save_seconds, note)
    except KeyboardInterrupt:
        note("interrupted; the build ends and its work is saved")
        _end(process)
        if storage is not None:
            _save(storage, None, note, settle=False)
        raise
    except BaseException:
        _end(process)
        raise
    if storage is not None:
        _save(storage, None, note)
    return process.returncode if process.returncode >= 0 else 128 - process.returncode


def _end_with(parent: int) -> Callable[[], None] | None:
    """What a new process calls so that it is killed with this one; None where that cannot be.

    A build that this process has stopped would otherwise wait, and keep its lock, for ever.
    """
    if not sys.platform.startswith("linux"):
        return None
    prctl = ctypes.CDLL(None).prctl

    def set_signal() -> None:
        prctl(_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(128 + signal.SIGKILL)

    return set_signal


def _watch(
    process: subprocess.Popen[bytes], storage: Storage | None, save_seconds: float, note: Note
) -> None:
    """Wait for the end of a process; save when its files have changed."""
    saved_at, saved = time.monotonic(), storage.signature() if storage else 0
    while process.poll() is None:
        time.sleep(_POLL_SECONDS)
        if storage is None or time.monotonic() - saved_at < save_seconds:
            continue
        if (found := storage.signature()) != saved:
            _save(storage, process, note)
            saved = found
        saved_at = time.monotonic()


def _save(
    storage: Storage,
    process: subprocess.Popen[bytes] | None,
    note: Note,
    *,
    settle: bool = True,
    keep_all: bool = True,
) -> None:
    """Save the work; a storage that cannot be written for a while does not end the build.

    Raises OutputError if another machine has taken the storage over.
    """
    pause = nullcontext if process is None else lambda: _stopped(process)
    keep = (lambda name: True) if keep_all else _is_shared
    try:
        is_taken = storage.is_taken()
        if not is_taken:
            storage.save(pause, settle=settle, keep=keep)
    except OutputError as error:
        note(f"the work is not saved this time ({error})")
        return
    if is_taken:
        raise OutputError(
            f"{storage.folder}: another machine resumed from it and saves its work there, so this "
            "build stops; give each build a --storage of its own"
        )


def _is_shared(name: str) -> bool:
    """Whether a file is kept for other builds once this one is published."""
    return name.startswith(SHARED)


@contextmanager
def _stopped(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Keep a process and its children stopped while the context is open; or it has ended."""
    _signal(process, signal.SIGSTOP)
    try:
        # a signal takes effect a little later; a zombie is left for `poll`
        os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        yield
    finally:
        _signal(process, signal.SIGCONT)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process in order, or after the grace time at once."""
    _signal(process, signal.SIGTERM)
    try:
        process.wait(_GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        _signal(process, signal.SIGKILL)
        process.wait()


def _signal(process: subprocess.Popen[bytes], number: int) -> None:
    """Send a signal to a process and its children; nothing if they have ended."""
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        return
