"""A process gives up its rights for good, and tries whether it has: limits, files, network.

Standard library alone: the processes that run programs of models begin with this.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import resource
import signal
import socket
import sys
from collections.abc import Callable, Mapping
from typing import Any

from reap2gguf.evaluating.generation.sandbox.landlock import restrict_files
from reap2gguf.evaluating.generation.sandbox.system_calls import install_filter

NETWORK, FILES, PROCESSES, SIGNALS = "network", "files", "processes", "signals"
GUARDS = (NETWORK, FILES, PROCESSES, SIGNALS)
_DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE = 1, 4
_CAPABILITY_VERSION = 0x20080522
# Why a try may fail that shows a guard at work: other errors, such as too many open files, do not.
_REFUSED = (errno.EPERM, errno.EACCES)
_NO_SUCH_NETWORK = (errno.EAFNOSUPPORT, errno.EPROTONOSUPPORT)
_NO_SUCH_FILE = (errno.ENOENT, errno.ENOTDIR, errno.EROFS)


def enter(setup: Mapping[str, Any]) -> list[str]:
    """Enter the jail that `setup` describes, and return which of GUARDS hold, as tried.

    `setup` has the numbers of `Limits`, `folder` (the only one to write to), `readable` (paths) and
    `parent` (its process id). Standard input and outputs are as before.
    """
    os.chdir(setup["folder"])
    _set_limits(setup)
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != setup["parent"]:  # it has ended meanwhile
            os._exit(1)
        libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)  # no other process reads its memory
        _drop_capabilities(libc)
        restrict_files(libc, setup["readable"], [setup["folder"], *_DEVICES])
        install_filter(libc)
    tried: dict[str, Callable[[], bool]] = {
        NETWORK: _has_no_network,
        FILES: lambda: _has_no_files(setup["folder"]),
        PROCESSES: _cannot_fork,
        SIGNALS: lambda: _cannot_signal(setup["parent"]),
    }
    return [name for name in GUARDS if tried[name]()]


def _set_limits(setup: Mapping[str, Any]) -> None:
    """Limits that this process cannot raise again. macOS has no limit of address space."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    seconds = int(used.ru_utime + used.ru_stime + setup["cpu_seconds"]) + 1
    for which, limit in (
        (resource.RLIMIT_AS, setup["memory_bytes"]),
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_FSIZE, setup["file_bytes"]),
        (resource.RLIMIT_NOFILE, setup["open_files"]),
        (resource.RLIMIT_CORE, 0),
    ):
        _, most = resource.getrlimit(which)
        bounded = limit if most == resource.RLIM_INFINITY else min(limit, most)
        if which == resource.RLIMIT_AS and sys.platform != "linux":
            continue
        resource.setrlimit(which, (bounded, bounded))
    # a system may not have this limit; whether a process can be made is tried below
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))


def _drop_capabilities(libc: ctypes.CDLL) -> None:
    """Root without root's rights."""
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION, 0)
    libc.capset(header, (ctypes.c_uint32 * 6)())


def _has_no_network() -> bool:
    for family in (socket.AF_INET, socket.AF_UNIX):
        try:
            socket.socket(family, socket.SOCK_DGRAM).close()
        except OSError as error:
            if error.errno in (*_REFUSED, *_NO_SUCH_NETWORK):
                continue
        return False
    return True


def _has_no_files(folder: str) -> bool:
    """Nothing outside the folder can be listed, read or made."""
    for path, flags in (
        ("/", os.O_RDONLY),
        ("/etc/passwd", os.O_RDONLY),
        (os.path.join(folder, os.pardir, f".{os.getpid()}.tried"), os.O_WRONLY | os.O_CREAT),
    ):
        try:
            os.close(os.open(path, flags, 0o600))
        except OSError as error:
            if error.errno in (*_REFUSED, *_NO_SUCH_FILE):
                continue
            return False
        if flags & os.O_CREAT:
            os.unlink(path)
        return False
    return True


def _cannot_fork() -> bool:
    try:
        child = os.fork()
    except OSError as error:
        # the filter says EPERM, and the limit of processes EAGAIN
        return error.errno in (*_REFUSED, errno.EAGAIN)
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    return False


def _cannot_signal(parent: int) -> bool:
    try:
        os.kill(parent, 0)
    except OSError as error:
        return error.errno in _REFUSED
    return False
