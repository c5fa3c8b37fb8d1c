"""The weights of a repository on the Hub: headers by ranged reads, whole files when needed.

huggingface_hub downloads a file into the Hub's cache when a tensor of it is first read, or earlier
where it is prefetched, at most four files at once. Each file is compared with the Hub's own hash.
Memory: a header, and what huggingface_hub buffers.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from reap2gguf.checkpoint.safetensors_header import MAX_HEADER_BYTES
from reap2gguf.hub.download import (
    AbandonedError,
    DownloadProgress,
    cached_blobs,
    download_file,
    remove_partial_files,
    run_in_threads,
)
from reap2gguf.hub.ranges import HubRanges
from reap2gguf.progress import Progress, Silent, Task

if TYPE_CHECKING:
    from reap2gguf.hub.retry import Note, Sleep
    from reap2gguf.hub.snapshot import HubFile, Snapshot

_MAX_DOWNLOADS = 4  # at once
_MAX_HEADERS = 8  # at once
_FIRST_BYTES = 2**16  # holds the header of most files


class HubShards:
    """The safetensors of a snapshot of which some are not in the cache yet."""

    def __init__(self, snapshot: Snapshot, note: Note, sleep: Sleep | None = None) -> None:
        self._snapshot = snapshot
        self._files: Mapping[str, HubFile] = snapshot.weights
        self._note = note
        self._sleep = sleep
        self._lock = threading.Lock()
        self._slots = threading.Semaphore(_MAX_DOWNLOADS)
        self._downloads: dict[str, Future[None]] = {}
        self._abandoned = threading.Event()  # of the downloads under way; later ones get another
        self._progress: Progress = Silent()
        self._bar = ExitStack()
        self._task: Task | None = None
        self._n_missing = 0  # bytes that the bar still waits for
        self._is_closed = False
        self._wanted: Sequence[str] = ()  # files of the checkpoint; a repository may have more

    def __contains__(self, name: object) -> bool:
        """Whether the Hub has a file of that name."""
        return name in self._files

    def size(self, name: str) -> int:
        """Bytes of a file."""
        return self._files[name].n_bytes

    def blob(self, name: str) -> str:
        """The hash of a file on the Hub: other contents have another."""
        return self._files[name].blob

    def missing(self, names: Iterable[str]) -> list[str]:
        """Which of these files are not in the cache."""
        return [name for name in names if not (self._snapshot.folder / name).is_file()]

    def headers(self, names: Iterable[str]) -> dict[str, bytes]:
        """The first bytes of files, with the whole header in them.

        Raises SourceError if they cannot be read. A header of an impossible length is cut off.
        """
        self._wanted = list(names)
        actions = [partial(self._header, name) for name in self._wanted]
        return dict(zip(self._wanted, run_in_threads(actions, _MAX_HEADERS), strict=True))

    def report_to(self, progress: Progress) -> None:
        """Show later downloads in `progress`."""
        self._progress = progress
        self._note = progress.note

    def expect(self, paths: Iterable[Path]) -> None:
        """Prefetch files that will be read soon; returns at once."""
        for path in paths:
            if path.name in self._files and not path.is_file():
                self._start(path.name)

    def wait_for(self, path: Path) -> None:
        """Return when a file is in the cache.

        Raises SourceError if it cannot be fetched, OutputError if the cache cannot be written,
        CheckpointError if its bytes do not have the Hub's hash, CancelledError if the download is
        abandoned meanwhile.
        """
        if path.name in self._files and not path.is_file():
            self._start(path.name).result()

    def close(self) -> None:
        """Abandon all downloads: `wait_for` raises CancelledError. Later reads restart them."""
        with self.closed():
            pass

    @contextmanager
    def closed(self) -> Iterator[None]:
        """In the block nothing is fetched: `wait_for` raises CancelledError."""
        with self._lock:
            self._is_closed = True
            self._abandoned.set()
            for download in self._downloads.values():
                download.cancel()
            was_fetching = any(download.cancelled() for download in self._downloads.values())
            self._downloads.clear()
            self._end_bar()
        if was_fetching:
            remove_partial_files(cached_blobs(self._snapshot.name))
        try:
            yield
        finally:
            with self._lock:
                self._is_closed = False
                self._abandoned = threading.Event()

    def _end_bar(self) -> None:
        bar, self._bar = self._bar, ExitStack()
        self._task = None
        if self._n_missing > 0:
            # an incomplete download must not be reported as done
            bar.__exit__(AbandonedError, AbandonedError(), None)
        else:
            bar.close()

    def _start(self, name: str) -> Future[None]:
        with self._lock:
            if self._is_closed:
                raise CancelledError
            if name not in self._downloads:
                download: Future[None] = Future()
                # a daemon: the end of the program does not wait for the network
                work = (self._files[name], download, self._abandoned)
                threading.Thread(target=self._run, args=work, daemon=True).start()
                self._downloads[name] = download
            return self._downloads[name]

    def _run(self, file: HubFile, download: Future[None], abandoned: threading.Event) -> None:
        error: Exception | None = None
        try:
            with self._slots:
                self._fetch(file, abandoned)
        except AbandonedError:
            return
        except Exception as raised:  # noqa: BLE001 - whatever it is, `wait_for` raises it
            error = raised
        with self._lock:
            if not download.cancelled():
                download.set_result(None) if error is None else download.set_exception(error)

    def _fetch(self, file: HubFile, abandoned: threading.Event) -> None:
        """One file into the cache, complete and with the Hub's hash."""
        progress = DownloadProgress(self._advance, abandoned)
        progress.check()
        self._show()
        snapshot = self._snapshot
        download_file(snapshot.name, snapshot.commit, file, progress, self._note, self._sleep)

    def _show(self) -> None:
        """Open the bar, for all files that are not in the cache yet."""
        with self._lock:
            if self._task is None:
                self._n_missing = sum(map(self.size, self.missing(self._wanted)))
                task = self._progress.task(
                    f"Fetching {self._snapshot.name}", self._n_missing, "bytes"
                )
                self._task = self._bar.enter_context(task)

    def _advance(self, n_bytes: int) -> None:
        with self._lock:
            if self._task is not None:
                self._n_missing -= n_bytes
                self._task.advance(n_bytes)

    def _header(self, name: str) -> bytes:
        size = self._files[name].n_bytes
        first = self._range(name, 0, min(_FIRST_BYTES, size))
        end = min(8 + int.from_bytes(first[:8], "little"), size, 8 + MAX_HEADER_BYTES)
        return first if end <= len(first) else first + self._range(name, len(first), end)

    def _range(self, name: str, begin: int, end: int) -> bytes:
        """Bytes from `begin` up to `end` of a file."""
        snapshot = self._snapshot
        ranges = HubRanges(snapshot.name, snapshot.commit, self._note, self._sleep or time.sleep)
        return ranges.read(name, begin, end)
