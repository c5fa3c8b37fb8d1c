"""The weights of a repository on the Hub: headers by ranged reads, whole files as they are needed.

A file is fetched into the Hub's cache by huggingface_hub when a tensor of it is first read, or
before that when it is expected; threads of this module wait for the network, at most four at once.
What comes is compared with the Hub's own hash. Memory: a header, and what huggingface_hub buffers.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from reap2gguf.checkpoint.hub import HubFile, Note, Sleep, Snapshot, persist
from reap2gguf.checkpoint.safetensors_header import MAX_HEADER_BYTES
from reap2gguf.errors import CheckpointError, SourceError
from reap2gguf.files import file_sha256
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
        with ThreadPoolExecutor(_HEADERS_AT_ONCE, "headers") as pool:
            found = pool.map(self._header, self._wanted)
            return dict(zip(self._wanted, found, strict=True))

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
        CheckpointError if what came is not what the Hub says it has.
        """
        if path.name in self._files and not path.is_file():
            self._begin(path.name).result()

    def close(self) -> None:
        """Give up what is being fetched; who waits for it is told so. Reading begins it anew."""
        with self._lock:
            self._leaving.set()
            self._leaving = threading.Event()
            for coming in self._coming.values():
                coming.cancel()
            self._coming.clear()
            self._task = None
            # what is not complete must not be said to be done
            ended = _LeavingError() if self.missing(self._wanted) else None
            self._bar.__exit__(type(ended) if ended else None, ended, None)

    def _begin(self, name: str) -> Future[None]:
        with self._lock:
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
        except _LeavingError:
            return
        except Exception as found:  # noqa: BLE001 - whatever it is, who waits is told
            error = found
        with self._lock:
            if not coming.cancelled():
                coming.set_result(None) if error is None else coming.set_exception(error)

    def _fetch(self, file: HubFile, leaving: threading.Event) -> None:
        """One file into the cache, whole and as the Hub has it."""
        counted = _Counted(self._advance, leaving)
        counted.check()
        self._show()
        for is_again in (False, True):
            path = self._download(file, counted, is_again)
            if file.sha256 is None or file_sha256(path) == file.sha256:
                return
            self._note(f"{file.name}: came damaged and is fetched again")
        raise CheckpointError(
            f"{path}: its hash is not that of the file on the Hub, twice; the network or the disk "
            "changes what passes through it"
        )

    def _download(self, file: HubFile, counted: _Counted, is_again: bool) -> Path:
        from huggingface_hub import hf_hub_download

        def download() -> Path:
            return Path(
                hf_hub_download(
                    self._snapshot.name, file.name, revision=self._snapshot.commit,
                    force_download=is_again, tqdm_class=counted.bar(),
                )
            )  # fmt: skip

        return persist(
            self._snapshot.name, self._snapshot.commit, download, self._note,
            self._sleep or counted.sleep, _TRIES,
            "run the command again when there is a network: what was fetched whole is kept",
        )  # fmt: skip

    def _show(self) -> None:
        """Open the bar, over everything that is not there yet."""
        with self._lock:
            if self._task is None:
                left = sum(self._files[name].n_bytes for name in self.missing(self._wanted))
                title = f"Fetching {self._snapshot.name}"
                self._task = self._bar.enter_context(self._progress.task(title, left, "bytes"))

    def _advance(self, n_bytes: int) -> None:
        with self._lock:
            if self._task is not None:
                self._task.advance(n_bytes)

    def _header(self, name: str) -> bytes:
        size = self._files[name].n_bytes
        first = self._range(name, 0, min(_FIRST_BYTES, size))
        end = min(8 + int.from_bytes(first[:8], "little"), size, 8 + MAX_HEADER_BYTES)
        return first if end <= len(first) else first + self._range(name, len(first), end)

    def _range(self, name: str, begin: int, end: int) -> bytes:
        """Bytes from `begin` up to `end` of a file."""
        from huggingface_hub import get_session, hf_hub_url
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
            with get_session().stream("GET", url, headers=headers) as answer:
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


class _LeavingError(BaseException):
    """What is fetched is wanted no more."""


class _Counted:
    """Counts a file's bytes once, however often huggingface_hub begins it anew."""

    def __init__(self, advance: Callable[[int], None], leaving: threading.Event) -> None:
        self._advance = advance
        self._leaving = leaving
        self._most = 0  # that came in any try
        self._now = 0  # in this one

    def check(self) -> None:
        """_LeavingError if nobody waits for the file."""
        if self._leaving.is_set():
            raise _LeavingError

    def sleep(self, seconds: float) -> None:
        """Wait, as long as anybody does."""
        self._leaving.wait(seconds)
        self.check()

    def bar(self) -> Any:
        """A class of progress bars for one try."""
        from huggingface_hub.utils import tqdm  # type: ignore[attr-defined]

        counted = self
        self._now = 0

        class Bar(tqdm):
            def __init__(self, *arguments: Any, **named: Any) -> None:
                super().__init__(*arguments, **{**named, "disable": True})  # type: ignore[no-untyped-call]

            def update(self, n: float | None = 1) -> None:
                counted.count(int(n or 0))

            # a bar that has these is told apart what hf_xet receives and what it has written
            def update_transfer(self, n: float | None = 1) -> None:
                counted.check()

            def set_transfer_postfix_str(self, *arguments: Any, **named: Any) -> None:
                """Nothing is drawn."""

        return Bar

    def count(self, n_bytes: int) -> None:
        """Bytes have come, or are given back where a download begins anew."""
        self.check()
        self._now += n_bytes
        if self._now > self._most:
            self._advance(self._now - self._most)
            self._most = self._now
