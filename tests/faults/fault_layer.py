"""Makes one operation on files fail, or the process die there, inside the process under test.

Every write, read, rename and flush of the files under one folder is counted, by wrapping the
functions of `os` that the program uses. At the n-th one the layer raises an OSError, or signals the
process, once or twice, or ends it as a power cut would: what was not flushed by then is lost. Or it
takes another file away.
"""

from __future__ import annotations

import builtins
import io
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

KINDS = ("write", "rename", "fsync", "read")
_BY_DESCRIPTOR = {
    "write": ("write", "pwrite", "pwritev", "ftruncate", "posix_fallocate"),
    "read": ("pread", "preadv", "read"),
    "fsync": ("fsync",),
}
_BY_NAME = {"rename": ("replace", "rename"), "write": ("mkdir", "unlink", "rmdir")}


@dataclass
class Fault:
    """What is to happen at which operation; `kinds` are those that are counted."""

    folder: str
    kinds: tuple[str, ...] = KINDS
    at: int = -1  # counted from zero; -1: never
    error: int | None = None  # errno; None: the process is killed
    signal: int = signal.SIGKILL
    again_after: int = 0  # operations until the same signal comes again; 0: never
    gone: str = ""  # a file that is renamed, and nothing else happens
    power_cut: bool = False  # when killed, what was not flushed is lost
    count: int = 0
    log: list[str] = field(default_factory=list)
    _pwrite: Callable[..., int] = os.pwrite  # that of the system
    # by inode: a descriptor, and where was written since the last flush
    _unflushed: dict[int, tuple[int, list[tuple[int, int]]]] = field(default_factory=dict)
    _changing: threading.RLock = field(default_factory=threading.RLock)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Wrap the functions while the context is open."""
        originals: list[tuple[Any, str, Any]] = []
        self._pwrite = os.pwrite
        for kind, names in _BY_DESCRIPTOR.items():
            for name in names:
                originals.append((os, name, getattr(os, name)))
                setattr(os, name, self._by_descriptor(kind, getattr(os, name)))
        for kind, names in _BY_NAME.items():
            for name in names:
                originals.append((os, name, getattr(os, name)))
                setattr(os, name, self._by_name(kind, getattr(os, name)))
        originals += [(os, "open", os.open), (io, "open", io.open), (builtins, "open", open)]
        os.open = self._opening(os.open)  # type: ignore[assignment]
        io.open = builtins.open = self._opening(io.open)  # type: ignore[assignment]
        try:
            yield
        finally:
            for module, name, original in originals:
                setattr(module, name, original)

    def _by_descriptor(self, kind: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(descriptor: int, *arguments: Any, **named: Any) -> Any:
            path = self._path(descriptor)
            if path is None:
                return function(descriptor, *arguments, **named)
            if (
                self.is_next(kind)
                and self.signal == signal.SIGKILL
                and not self.gone
                and function.__name__ in ("write", "pwrite")
            ):
                data, *rest = arguments
                function(descriptor, data[: len(data) // 2], *rest)  # cut off in the middle
            self._happens(kind, f"{function.__name__} {path}")
            begun = os.lseek(descriptor, 0, os.SEEK_CUR) if function.__name__ == "write" else 0
            n_before = self._n_unflushed(descriptor) if kind == "fsync" else 0
            # a flush is only noted: the power stays on, and disks take milliseconds for each
            result = None if kind == "fsync" else function(descriptor, *arguments, **named)
            if function.__name__ in ("write", "pwrite"):
                self._remember(descriptor, arguments[1] if len(arguments) > 1 else begun, result)
            elif kind == "fsync":
                self._forget(descriptor, n_before)
            return result

        return wrapped

    def _by_name(self, kind: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(path: Any, *arguments: Any, **named: Any) -> Any:
            whole = os.fspath(path)
            if (folder := named.get("dir_fd")) is not None:  # as shutil.rmtree does
                whole = f"{os.readlink(f'/proc/self/fd/{folder}')}/{whole}"
            if whole.startswith(self.folder):
                self._happens(kind, f"{function.__name__} {whole}")
            return function(path, *arguments, **named)

        return wrapped

    def _opening(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(path: Any, mode: Any = "r", *arguments: Any, **named: Any) -> Any:
            if isinstance(path, str | os.PathLike) and os.fspath(path).startswith(self.folder):
                makes = mode & os.O_CREAT if isinstance(mode, int) else mode[0] in "wax"
                self._happens("write" if makes else "read", f"open {path}")
            return function(path, mode, *arguments, **named)

        return wrapped

    def _path(self, descriptor: int) -> str | None:
        """The file of a descriptor, if it lies in the folder and still has a name."""
        with suppress(OSError):
            path = os.readlink(f"/proc/self/fd/{descriptor}")
            if path.startswith(self.folder) and not path.endswith("(deleted)"):
                return path
        return None

    def is_next(self, kind: str) -> bool:
        """Whether the operation that is about to be counted is the one."""
        return kind in self.kinds and self.count == self.at

    def _happens(self, kind: str, what: str) -> None:
        if kind not in self.kinds:
            return
        with self._changing:
            self.log.append(f"{kind}: {what.replace(self.folder, '')}")
            self.count += 1
            if self.count - 1 == self.at:
                self._strike()
            elif self.again_after and self.count - 1 == self.at + self.again_after:
                os.kill(os.getpid(), self.signal)

    def _strike(self) -> None:
        """Do what is to happen; no other thread counts meanwhile."""
        if self.gone:
            os.rename(self.gone, f"{self.gone}.gone")
            return
        if self.error is not None:
            raise OSError(self.error, os.strerror(self.error))
        if self.power_cut:
            for descriptor, places in self._unflushed.values():
                for position, n_bytes in places:
                    self._pwrite(descriptor, bytes(n_bytes), position)
        os.kill(os.getpid(), self.signal)

    def _remember(self, descriptor: int, position: int, n_bytes: int) -> None:
        """Keep in mind what a power cut would take."""
        inode = os.fstat(descriptor).st_ino
        with self._changing:
            if self.power_cut:
                if inode not in self._unflushed:
                    self._unflushed[inode] = (os.dup(descriptor), [])
                self._unflushed[inode][1].append((position, n_bytes))

    def _n_unflushed(self, descriptor: int) -> int:
        """How many writes a flush that begins now will bring to the disk."""
        with self._changing:
            return len(self._unflushed.get(os.fstat(descriptor).st_ino, (0, []))[1])

    def _forget(self, descriptor: int, n_written: int) -> None:
        """The first writes are on the disk; other threads may have written since."""
        inode = os.fstat(descriptor).st_ino
        with self._changing:
            held, places = self._unflushed.get(inode, (None, []))
            del places[:n_written]
            if held is not None and not places:
                del self._unflushed[inode]
                os.close(held)


def tree(folder: Path) -> dict[str, bytes]:
    """Every file of a bundle by name, with its bytes."""
    return {
        file.relative_to(folder).as_posix(): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and ".work" not in file.relative_to(folder).parts
    }
