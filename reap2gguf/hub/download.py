"""Downloads a file of the Hub: its retries, its progress, its threads, and its partial files.

A download can be abandoned: its thread waits for the network, and neither Ctrl-C nor the end of the
program waits for that thread.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from reap2gguf.atomic import remove
from reap2gguf.errors import CheckpointError, OutputError
from reap2gguf.files import file_sha256
from reap2gguf.hub.retry import model_retry

if TYPE_CHECKING:
    from reap2gguf.hub.retry import Note, Sleep
    from reap2gguf.hub.snapshot import HubFile

T = TypeVar("T")
# Some minutes, since huggingface_hub repeats each try several times: hours of work would be lost.
_TRIES = 8
_DESCRIPTORS = Path("/proc/self/fd")
_PARTIAL = ".incomplete"  # how huggingface_hub ends the name of a file that is not complete


class AbandonedError(BaseException):
    """Nobody waits for the download any more."""


class DownloadProgress:
    """Counts the bytes of one file once, however often huggingface_hub restarts its download."""

    def __init__(self, advance: Callable[[int], None], abandoned: threading.Event) -> None:
        self._advance = advance
        self._abandoned = abandoned
        self._n_reported = 0  # the most bytes that any try has reached
        self._n_now = 0  # bytes of this try

    def check(self) -> None:
        """Raise AbandonedError if nobody waits for the file."""
        if self._abandoned.is_set():
            raise AbandonedError

    def sleep(self, seconds: float) -> None:
        """Wait; raises AbandonedError as soon as nobody waits for the file."""
        self._abandoned.wait(seconds)
        self.check()

    def guarded(self, note: Note) -> Note:
        """The same note, which raises AbandonedError if nobody waits for the file."""

        def checked(text: str) -> None:
            self.check()
            note(text)

        return checked

    def bar_class(self) -> Any:
        """A class of progress bars for one try, as huggingface_hub takes it; it draws nothing."""
        from huggingface_hub.utils import tqdm  # type: ignore[attr-defined]

        progress = self
        self._n_now = 0

        class Bar(tqdm):
            def __init__(self, *arguments: Any, **named: Any) -> None:
                super().__init__(*arguments, **{**named, "disable": True})  # type: ignore[no-untyped-call]

            def update(self, n: float | None = 1) -> None:
                progress.add(int(n or 0))

            # hf_xet looks for these two: with them, it reports what it receives from the network
            # apart from what it has written to the file
            def update_transfer(self, n: float | None = 1) -> None:
                progress.check()

            def set_transfer_postfix_str(self, *arguments: Any, **named: Any) -> None:
                """Draws nothing."""

        return Bar

    def add(self, n_bytes: int) -> None:
        """Count bytes that arrived; fewer than zero where a download starts from the beginning."""
        self.check()
        self._n_now += n_bytes
        if self._n_now > self._n_reported:
            self._advance(self._n_now - self._n_reported)
            self._n_reported = self._n_now

    def finish(self, n_bytes: int) -> None:
        """The file of `n_bytes` is complete, though another process may have fetched it."""
        self._n_now = 0
        self.add(n_bytes)


def download_file(
    name: str,
    commit: str,
    file: HubFile,
    progress: DownloadProgress,
    note: Note,
    sleep: Sleep | None = None,
) -> None:
    """Download one file of a repository into the Hub's cache, complete and with the Hub's hash.

    Requests that fail are repeated (`retry.py`); a file that arrives damaged is downloaded once
    more. Raises SourceError, OutputError, CheckpointError for a wrong hash, and AbandonedError.
    """
    retry = model_retry(
        name,
        commit,
        progress.guarded(note),
        sleep or progress.sleep,
        _TRIES,
        "run the same command again when the network is back: complete files are kept",
    )
    for is_second in (False, True):
        path = retry.call(partial(_hf_download, name, commit, file, progress, is_second))
        progress.finish(file.n_bytes)
        if file.sha256 is None or file_sha256(path) == file.sha256:
            return
        note(f"{file.name}: arrived damaged; downloading it again")
    raise CheckpointError(
        f"{path}: its hash differs from that of the file on the Hub, twice; the network or disk "
        "changes the bytes"
    )


def _hf_download(
    name: str, commit: str, file: HubFile, progress: DownloadProgress, force: bool
) -> Path:
    from huggingface_hub import hf_hub_download

    path = hf_hub_download(
        name,
        file.name,
        revision=commit,
        force_download=force,
        tqdm_class=progress.bar_class(),
    )
    return Path(path)


def run_in_threads(actions: Sequence[Callable[[], T]], n_threads: int) -> list[T]:
    """The results of actions, in order. The first error stops the rest and is raised.

    An executor would wait for its threads when Ctrl-C is pressed, and again at the end of the
    program: for as long as the network takes.
    """
    results: list[Future[T]] = [Future() for _ in actions]
    remaining = iter(zip(actions, results, strict=True))
    lock, is_over = threading.Lock(), threading.Event()

    def take() -> tuple[Callable[[], T], Future[T]] | None:
        with lock:
            return None if is_over.is_set() else next(remaining, None)

    def work() -> None:
        while (taken := take()) is not None:
            action, result = taken
            try:
                result.set_result(action())
            except BaseException as error:  # noqa: BLE001 - whatever it is, the caller raises it
                result.set_exception(error)

    for _ in range(min(n_threads, len(actions))):
        threading.Thread(target=work, daemon=True).start()
    try:
        return [result.result() for result in results]
    finally:
        is_over.set()


def cached_blobs(name: str) -> Path:
    """The folder of the Hub's cache that holds the contents of a model's files."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    folder = repo_folder_name(repo_id=name, repo_type="model")
    return Path(constants.HF_HUB_CACHE) / folder / "blobs"


def remove_partial_files(folder: Path) -> None:
    """Remove the files that this process is still downloading into a folder of the Hub's cache.

    Each download of huggingface_hub has a file name of its own, and none resumes another's, so a
    partial file would stay there for ever. Files of other processes are not touched. Where the
    system does not list open files (macOS), nothing is removed.
    """
    for descriptor in _DESCRIPTORS.iterdir() if _DESCRIPTORS.is_dir() else ():
        with suppress(OSError, OutputError):  # closed meanwhile, and its file is gone
            path = Path(os.readlink(descriptor))
            if path.name.endswith(_PARTIAL) and path.parent == folder.resolve():
                remove(path)
