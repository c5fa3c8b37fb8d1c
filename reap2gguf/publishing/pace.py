"""How far files that are being uploaded have been read, which is what is known of their progress.

huggingface_hub draws bars of its own and tells nobody; hf_xet reads files in Rust. What both have
in common is an open file, whose position Linux shows. Elsewhere a file counts when it is done.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from reap2gguf.progress import Task

_SECONDS = 0.5
_OPEN, _FACTS = Path("/proc/self/fd"), Path("/proc/self/fdinfo")


@contextmanager
def paced(files: Mapping[Path, int], n_bytes: int, task: Task) -> Iterator[None]:
    """Tell `task` of what is read of `files` (by size) while the context is open.

    In all it is told of `n_bytes`, of which what no file showed comes at the end, if that is well.
    """
    ended = threading.Event()
    seen = dict.fromkeys(files, 0)

    def watch() -> None:
        while not ended.wait(_SECONDS):
            for path, position in _positions(files):
                # a part that is sent again is behind what was told
                further = min(position, files[path]) - seen[path]
                if further > 0:
                    seen[path] += further
                    task.advance(further)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()
    task.advance(n_bytes - sum(seen.values()))


def _positions(files: Mapping[Path, int]) -> Iterator[tuple[Path, int]]:
    """Where the open files among `files` are being read."""
    names = {os.path.realpath(path): path for path in files}
    with suppress(OSError):  # not Linux
        for descriptor in os.listdir(_OPEN):
            with suppress(OSError, ValueError, IndexError):  # closed by now
                path = names.get(os.readlink(_OPEN / descriptor))
                if path is not None:
                    facts = (_FACTS / descriptor).read_text(encoding="ascii")
                    yield path, int(facts.split("pos:")[1].split()[0])
