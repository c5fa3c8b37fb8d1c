"""The log of a build: `OUTPUT/.work/NAME.log`, kept after the build; the next one adds to it."""

from __future__ import annotations

import os
import platform
import re
import shlex
import stat
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from reap2gguf import __version__
from reap2gguf.atomic import rename
from reap2gguf.errors import VerificationError
from reap2gguf.messages import one_line, quantity, without_password
from reap2gguf.terminal.meter import exact_duration

if TYPE_CHECKING:
    from reap2gguf.progress import Progress, Task

MOST_BYTES = 2**20  # a longer log is renamed to NAME.log.1 before the next build begins
_MOST_BYTES_NOW = 4 * 2**20  # that one build writes
_LIBRARIES = ("torch", "transformers", "tokenizers", "huggingface_hub", "gguf", "numpy")
_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{8,}")


class BuildLog:
    """Lines with date and time, written as they come; threads may share it.

    They wait until the build has made its work folder: a build that is refused leaves nothing
    behind. A log that cannot be written is given up, and the build continues.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._waiting: list[str] = []
        self._file: int | None = None
        self._n_bytes = 0
        self._writing = threading.Lock()
        self.problem = ""  # why it was given up

    def write(self, text: str) -> None:
        """Add a line, without passwords and tokens."""
        safe = _TOKEN.sub("hf_...", one_line(without_password(text)))
        with self._writing:
            if not self.problem:
                self._add(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {safe}\n")

    def _add(self, line: str) -> None:
        self._waiting.append(line)
        try:
            if self._file is None:
                if not self.path.parent.is_dir() or self.path.parent.is_symlink():
                    return
                self._file = self._open()
            data = "".join(self._waiting).encode("utf-8", "backslashreplace")
            self._waiting.clear()
            self._n_bytes += len(data)
            if self._n_bytes > _MOST_BYTES_NOW:
                data = b"the log ends here: this build has written too much\n"
                self.problem = "too long"
            os.write(self._file, data)
        except OSError as error:
            self.problem = error.strerror or str(error)

    def begin(self) -> None:
        """The command line, and the versions of what does the work."""
        self.write(f"begin: {shlex.join(['reap2gguf', *sys.argv[1:]])}")
        found = [f"reap2gguf {__version__}", f"python {platform.python_version()}"]
        for library in _LIBRARIES:
            with suppress(PackageNotFoundError):  # named by the error that follows
                found.append(f"{library} {version(library)}")
        self.write(f"{', '.join(found)}, {platform.platform()}")

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Log how the work inside ends, and close the file."""
        try:
            yield
        except VerificationError as error:
            for violation in error.violations:
                self.write(f"violation: {violation}")
            self.write(f"error: {error}")
            raise
        except KeyboardInterrupt:
            self.write("interrupted")
            raise
        except Exception as error:
            self.write(f"error: {type(error).__name__}: {error}")
            raise
        else:
            self.write("end")
        finally:
            if self._file is not None:
                with suppress(OSError):  # its lines are written
                    os.close(self._file)
                self._file = None

    def _open(self) -> int:
        with suppress(FileNotFoundError):  # the first build of this name
            if self.path.lstat().st_size > MOST_BYTES:
                rename(self.path, self.path.with_name(f"{self.path.name}.1"))
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
        file = os.open(self.path, flags | os.O_CLOEXEC, 0o666)
        if not stat.S_ISREG(os.fstat(file).st_mode):
            os.close(file)
            raise OSError("not a file")
        return file


class LoggedProgress:
    """A Progress that also writes to a log when tasks begin and end, and every note."""

    def __init__(self, progress: Progress, log: BuildLog) -> None:
        self._progress = progress
        self._log = log

    @contextmanager
    def task(self, title: str, total: float, unit: str) -> Iterator[Task]:
        amount = f": {quantity(total, unit)}" if total else ""
        begun = time.monotonic()
        self._log.write(f"{title}{amount}")
        with self._progress.task(title, total, unit) as task:
            yield task
        self._log.write(f"{title}: done in {exact_duration(time.monotonic() - begun)}")

    def note(self, text: str) -> None:
        self._log.write(f"note: {text}")
        self._progress.note(text)
