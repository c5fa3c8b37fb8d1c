"""Landlock: a process gives up all files but those that it names. It needs no rights.

Source: https://docs.kernel.org/userspace-api/landlock.html; Linux 5.13 and later, where it is on.
"""

from __future__ import annotations

import ctypes
import os
import stat
import struct
from collections.abc import Iterable

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446  # on all architectures
_VERSION_FLAG, _PATH_BENEATH = 1, 1
_WRITE_FILE, _READ_FILE, _READ_DIR, _TRUNCATE, _REFER = 1 << 1, 1 << 2, 1 << 3, 1 << 14, 1 << 13
# what each version of the interface can forbid: rights of files, of TCP, and of other processes
_FILE_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}  # so many bits, from the lowest
_TCP, _SCOPES = 0b11, 0b11  # from versions 4 and 6
_PR_SET_NO_NEW_PRIVS = 38
_OF_SPECIAL_FILES = (1 << 6) | (1 << 9) | (1 << 11) | (1 << 0)  # devices, sockets, programs
_O_PATH = getattr(os, "O_PATH", 0)


def restrict_files(libc: ctypes.CDLL, readable: Iterable[str], writable: Iterable[str]) -> bool:
    """Forbid all files but these, folders with all they hold; whether the kernel does that.

    Paths that are not there are left out. TCP, and signals and abstract sockets to processes
    outside, are forbidden too where the kernel can.
    """
    version = libc.syscall(_CREATE_RULESET, None, 0, _VERSION_FLAG)
    if version < 1:
        return False
    handled = (1 << _FILE_RIGHTS[min(version, max(_FILE_RIGHTS))]) - 1
    attributes = struct.pack("=Q", handled)
    attributes += struct.pack("=Q", _TCP) if version >= 4 else b""
    attributes += struct.pack("=Q", _SCOPES) if version >= 6 else b""
    ruleset = libc.syscall(_CREATE_RULESET, attributes, len(attributes), 0)
    if ruleset < 0:
        return False
    try:
        for path in readable:
            _allow(libc, ruleset, path, _READ_FILE | _READ_DIR)
        for path in writable:
            _allow(libc, ruleset, path, handled & ~_OF_SPECIAL_FILES & ~_REFER)
        if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
            return False
        return bool(libc.syscall(_RESTRICT_SELF, ruleset, 0) == 0)
    finally:
        os.close(ruleset)


def _allow(libc: ctypes.CDLL, ruleset: int, path: str, rights: int) -> None:
    """Allow rights below a path. One that fails is not allowed, which is the safe side."""
    try:
        descriptor = os.open(path, _O_PATH | os.O_CLOEXEC)
    except OSError:
        return
    try:
        if not stat.S_ISDIR(os.fstat(descriptor).st_mode):
            rights &= _WRITE_FILE | _READ_FILE | _TRUNCATE
        rule = struct.pack("=Qi", rights, descriptor)
        libc.syscall(_ADD_RULE, ruleset, _PATH_BENEATH, rule, 0)
    finally:
        os.close(descriptor)
