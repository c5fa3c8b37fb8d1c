"""The weights of a repository on the Hub: headers by ranged reads, whole files as they are needed.

A file is fetched into the Hub's cache by huggingface_hub when a tensor of it is first read, or
before that when it is expected; threads of this module wait for the network, at most four at once.
What comes is compared with the Hub's own hash. Memory: a header, and what huggingface_hub buffers.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

from reap2gguf.checkpoint.safetensors_header import MAX_HEADER_BYTES
from reap2gguf.errors import CheckpointError, SourceError
from reap2gguf.files import file_sha256
from reap2gguf.hub.counted import Counted, LeavingError
from reap2gguf.hub.network_threads import drop_unfinished, side_by_side
from reap2gguf.hub.snapshot import HubFile, Note, Sleep, Snapshot, blobs_of, persist
from reap2gguf.progress import Progress, Silent, Task

_AT_ONCE = 4
_HEADERS_AT_ONCE = 8
_FIRST_BYTES = 2**16  # holds the header of most files
_TRIES = 8  # some minutes, since huggingface_hub tries each several times: hours are at stake


class HubShards:
    """The safetensors of a snapshot of which some are not in the cache yet."""

    def __init__(self, snapshot: Snapshot, note: Note, sleep: Sleep | None = None) -> None:
        self._snapshot = snapshot
        self._files: Mapping[str, HubFile] = snapshot.weights
        self._note = note
        self._sleep = sleep
        self._lock = threading.Lock()
        self._turns = threading.Semaphore(_AT_ONCE)
        self._coming: dict[str, Future[None]] = {}
        self._leaving = threading.Event()  # of those who fetch now; others get another
        self._progress: Progress = Silent()
        self._bar = ExitStack()
        self._task: Task | None = None
        self._n_left = 0  # bytes that the bar still waits for
        self._is_closed = False
        self._wanted: Sequence[str] = ()  # of the checkpoint; a repository may have more

    def __contains__(self, name: object) -> bool:
        """Whether the Hub has a file of that name."""
        return name in self._files

    def size(self, name: str) -> int:
        """Bytes of a file."""
        return self._files[name].n_bytes

    def blob(self, name: str) -> str:
        """What tells a file from others of its name: its hash on the Hub."""
        return self._files[name].blob

    def missing(self, names: Iterable[str]) -> list[str]:
        """Which of these files are not in the cache."""
        return [name for name in names if not (self._snapshot.folder / name).is_file()]

    def headers(self, names: Iterable[str]) -> dict[str, bytes]:
        """The first bytes of files, with the whole header in them.

        Raises SourceError if they cannot be read; a header of an impossible length comes cut.
        """
        self._wanted = list(names)
        actions = [partial(self._header, name) for name in self._wanted]
        return dict(zip(self._wanted, side_by_side(actions, _HEADERS_AT_ONCE), strict=True))

    def report_to(self, progress: Progress) -> None:
        """Where what is fetched from now on is shown."""
        self._progress = progress
        self._note = progress.note

    def expect(self, paths: Iterable[Path]) -> None:
        """Begin to fetch files that will be read soon; returns at once."""
        for path in paths:
            if path.name in self._files and not path.is_file():
                self._begin(path.name)

    def wait_for(self, path: Path) -> None:
        """Return when a file is there.

        Raises SourceError if it cannot be fetched, OutputError if the cache cannot be written,
        CheckpointError if what came is not what the Hub says it has, CancelledError if it is given
        up meanwhile.
        """
        if path.name in self._files and not path.is_file():
            self._begin(path.name).result()

    def close(self) -> None:
        """Give up what is being fetched; who waits for it is told so. Reading begins it anew."""
        with self.closed():
            pass

    @contextmanager
    def closed(self) -> Iterator[None]:
        """In the block nothing is fetched: who waits for a file, or comes to, is told so."""
        with self._lock:
            self._is_closed = True
            self._leaving.set()
            for coming in self._coming.values():
                coming.cancel()
            was_fetching = any(coming.cancelled() for coming in self._coming.values())
            self._coming.clear()
            self._end_bar()
        if was_fetching:
            drop_unfinished(blobs_of(self._snapshot.name))
        try:
            yield
        finally:
            with self._lock:
                self._is_closed = False
                self._leaving = threading.Event()

    def _end_bar(self) -> None:
        bar, self._bar = self._bar, ExitStack()
        self._task = None
        if self._n_left > 0:
            # what is not complete must not be said to be done
            bar.__exit__(LeavingError, LeavingError(), None)
        else:
            bar.close()

    def _begin(self, name: str) -> Future[None]:
        with self._lock:
            if self._is_closed:
                raise CancelledError
            if name not in self._coming:
                coming: Future[None] = Future()
                # a daemon: the end of the program does not wait for the network
                work = (self._files[name], coming, self._leaving)
                threading.Thread(target=self._bring, args=work, daemon=True).start()
                self._coming[name] = coming
            return self._coming[name]

    def _bring(self, file: HubFile, coming: Future[None], leaving: threading.Event) -> None:
        error: Exception | None = None
        try:
            with self._turns:
                self._fetch(file, leaving)
        except LeavingError:
            return
        except Exception as found:  # noqa: BLE001 - whatever it is, who waits is told
            error = found
        with self._lock:
            if not coming.cancelled():
                coming.set_result(None) if error is None else coming.set_exception(error)

    def _fetch(self, file: HubFile, leaving: threading.Event) -> None:
        """One file into the cache, whole and as the Hub has it."""
        counted = Counted(self._advance, leaving)
        counted.check()
        self._show()
        for is_again in (False, True):
            path = self._download(file, counted, is_again)
            counted.finish(file.n_bytes)
            if file.sha256 is None or file_sha256(path) == file.sha256:
                return
            self._note(f"{file.name}: came damaged and is fetched again")
        raise CheckpointError(
            f"{path}: its hash is not that of the file on the Hub, twice; the network or the disk "
            "changes what passes through it"
        )

    def _download(self, file: HubFile, counted: Counted, is_again: bool) -> Path:
        from huggingface_hub import hf_hub_download

        def download() -> Path:
            return Path(
                hf_hub_download(
                    self._snapshot.name, file.name, revision=self._snapshot.commit,
                    force_download=is_again, tqdm_class=counted.bar(),
                )
            )  # fmt: skip

        return persist(
            self._snapshot.name, self._snapshot.commit, download, counted.tells(self._note),
            self._sleep or counted.sleep, _TRIES,
            "run the command again when there is a network: what was fetched whole is kept",
        )  # fmt: skip

    def _show(self) -> None:
        """Open the bar, over everything that is not there yet."""
        with self._lock:
            if self._task is None:
                self._n_left = sum(map(self.size, self.missing(self._wanted)))
                task = self._progress.task(f"Fetching {self._snapshot.name}", self._n_left, "bytes")
                self._task = self._bar.enter_context(task)

    def _advance(self, n_bytes: int) -> None:
        with self._lock:
            if self._task is not None:
                self._n_left -= n_bytes
                self._task.advance(n_bytes)

    def _header(self, name: str) -> bytes:
        size = self._files[name].n_bytes
        first = self._range(name, 0, min(_FIRST_BYTES, size))
        end = min(8 + int.from_bytes(first[:8], "little"), size, 8 + MAX_HEADER_BYTES)
        return first if end <= len(first) else first + self._range(name, len(first), end)

    def _range(self, name: str, begin: int, end: int) -> bytes:
        """Bytes from `begin` up to `end` of a file."""
        from huggingface_hub import constants, get_session, hf_hub_url
        from huggingface_hub.utils import (  # type: ignore[attr-defined]
            build_hf_headers,
            hf_raise_for_status,
        )

        repository, commit = self._snapshot.name, self._snapshot.commit
        if begin == end:
            return b""

        def read() -> bytes:
            headers = build_hf_headers() | {
                "Range": f"bytes={begin}-{end - 1}", "Accept-Encoding": "identity",
            }  # fmt: skip
            url = hf_hub_url(repository, name, revision=commit)
            limit = constants.HF_HUB_DOWNLOAD_TIMEOUT  # of silence; the session has none
            with get_session().stream("GET", url, headers=headers, timeout=limit) as answer:
                hf_raise_for_status(answer)
                found = b""
                for block in answer.iter_bytes():
                    found += block
                    if len(found) >= end - begin:  # a server may ignore ranges
                        break
            if answer.status_code != 206 and begin:
                raise ValueError("it sends no parts of files")
            return found[: end - begin]

        found = persist(repository, commit, read, self._note, self._sleep or time.sleep)
        if len(found) != end - begin:
            raise SourceError(
                f"{repository}: {name} gives {len(found):,} bytes from byte {begin:,} on, expected "
                f"{end - begin:,}; try again later"
            )
        return found
