"""Rows of a dataset on the Hub, streamed by `datasets`: nothing is kept on the disk.

Which rows: the split's shards are shuffled by the seed, and its rows through a buffer of 10,000, of
which as many as are wanted are read. The same dataset at the same commit with the same seed gives
the same rows. REAP draws from all of a dataset by Python's own generator, which takes the whole of
it first: the rows that a published model saw cannot be drawn again, only as many of the same data.

The commit is resolved once, at the beginning, and all is read at it. Scripts of a dataset never
run. Networks fail now and then: what may pass is tried again, from the row that was reached.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any, cast

from reap2gguf.calibration.layouts import columns
from reap2gguf.calibration.spec import Component
from reap2gguf.errors import CalibrationError, OutputError, Reap2ggufError
from reap2gguf.hub.errors import (
    asked_wait,
    causes,
    first_line,
    is_busy,
    status_of,
    trouble,
)
from reap2gguf.hub.snapshot import TRIES, Note, Sleep

BUFFER = 10_000  # rows that wait to be drawn
_FIRST_WAIT = 1.0  # seconds; doubled at each try
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
_SAVED = "save its rows as JSONL or Parquet and pass the file"


def open_dataset(
    component: Component, seed: int, note: Note, sleep: Sleep = time.sleep
) -> tuple[str, Iterator[Mapping[str, Any]]]:
    """The commit of a dataset, and its rows in the order in which they are drawn.

    No row is read before the iterator is asked for one. Raises CalibrationError in one line if
    there is no such dataset, subset or split, it may not be read, or the Hub cannot be reached in
    five tries; so does the iterator.
    """
    tries = _Tries(component, note, sleep)
    while True:
        try:
            commit = _commit(component)
            stream = _stream(component, commit, seed)
            break
        except _errors() as error:
            tries.failed(error)
    return commit, _rows(component, commit, seed, stream, note, sleep)


def _commit(component: Component) -> str:
    from huggingface_hub import HfApi

    found = HfApi().dataset_info(component.dataset, revision=component.revision, timeout=60)
    if found.sha is None:
        raise ValueError("the Hub names no commit")
    return found.sha


def _rows(
    component: Component,
    commit: str,
    seed: int,
    stream: Iterator[Mapping[str, Any]],
    note: Note,
    sleep: Sleep,
) -> Iterator[Mapping[str, Any]]:
    """The rows of `stream`; where it breaks off, those of the same stream from there on."""
    done = 0
    broken = False
    tries = _Tries(component, note, sleep)
    while True:
        try:
            if broken:
                stream = islice(_stream(component, commit, seed), done, None)
            for row in stream:
                done += 1
                tries = _Tries(component, note, sleep)
                yield row
            return
        except _errors() as error:
            tries.failed(error)
            broken = True


def _stream(component: Component, commit: str, seed: int) -> Iterator[Mapping[str, Any]]:
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    found = datasets.load_dataset(
        component.dataset, component.subset, split=component.split, revision=commit, streaming=True
    )
    if found.column_names is not None:
        found = found.select_columns(columns(list(found.column_names)))
    # numpy takes no negative seed
    shuffled = found.shuffle(seed=seed % 2**32, buffer_size=BUFFER)
    return iter(shuffled)


class _Tries:
    """What became of one thing that is tried again and again."""

    def __init__(self, component: Component, note: Note, sleep: Sleep) -> None:
        self._component, self._note, self._sleep = component, note, sleep
        self._failed = 0

    def failed(self, error: BaseException) -> None:
        """Wait for the next try; raises CalibrationError if there is none, or no use in one."""
        name = self._component.name
        if refusal := _refusal(error, self._component):
            raise refusal from error
        self._failed += 1
        if self._failed == TRIES:
            raise CalibrationError(
                f"calibration {name}: the Hub cannot be reached in {TRIES} tries "
                f"({trouble(error)}); check the network, or {_SAVED}"
            ) from error
        seconds = max(_FIRST_WAIT * 2 ** (self._failed - 1), asked_wait(error))
        self._note(
            f"calibration {name}: the Hub cannot be reached ({trouble(error)}); try "
            f"{self._failed + 1} of {TRIES} in {seconds:.0f} s"
        )
        self._sleep(seconds)


def _errors() -> tuple[type[Exception], ...]:
    """What `datasets` and the libraries under it raise."""
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HfHubHTTPError

    # whatever HTTP client huggingface_hub is built on, its errors are of this class
    transport = cast("type[Exception]", HfHubHTTPError.__mro__[1])
    return (
        DatasetsError, transport, OSError, ValueError, TypeError, LookupError, ArithmeticError,
        RuntimeError, EOFError, AttributeError,
    )  # fmt: skip


def _refusal(error: BaseException, component: Component) -> Reap2ggufError | None:
    """What to tell the user if another try would fail as this one did; None if it may not."""
    where = f"calibration {component.name}"
    for cause in causes(error):
        if isinstance(cause, OSError) and cause.errno in _DISK_ERRORS:
            return OutputError(
                f"{where}: the Hub's cache cannot be written ({cause.strerror}); make room there, "
                "or set HF_HOME to a folder on another disk"
            )
        if said := _said_by_hub(cause, component):
            return CalibrationError(f"{where}: {said}")
    if isinstance(error, OSError) or _is_transport(error):
        return None
    return CalibrationError(f"{where}: cannot be read as rows ({first_line(error)}); {_SAVED}")


def _said_by_hub(cause: BaseException, component: Component) -> str | None:
    """What one error of the Hub, or of `datasets`, means; None if it may pass, or says nothing."""
    from datasets.exceptions import DataFilesNotFoundError, DatasetNotFoundError
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    text = str(cause)
    if isinstance(cause, GatedRepoError) or "gated dataset" in text:
        return "gated on the Hub; accept its terms there and run `hf auth login`"
    if isinstance(cause, RevisionNotFoundError):
        return f"no revision {component.revision!r} on the Hub"
    if isinstance(cause, RepositoryNotFoundError | DatasetNotFoundError | HFValidationError):
        return (
            "no such file or folder here and no such dataset on the Hub (or it is private: run "
            "`hf auth login`)"
        )
    if isinstance(cause, OfflineModeIsEnabled):
        return f"HF_HUB_OFFLINE is set, and its rows are not here; unset it, or {_SAVED}"
    if isinstance(cause, DataFilesNotFoundError) or type(cause).__name__ == "EmptyDatasetError":
        return f"holds no files that can be read as rows; {_SAVED}"
    return _said_by_datasets(cause, component) or _said_by_status(cause)


def _said_by_datasets(cause: BaseException, component: Component) -> str | None:
    """What the plain errors of `datasets` mean, which are known by their texts alone."""
    text = " ".join(str(cause).split())
    if isinstance(cause, RuntimeError) and "scripts are no longer supported" in text:
        return (
            "is made by a script, and none is run; the Hub may have its rows as Parquet, at "
            f"{component.dataset}@refs/convert/parquet"
        )
    if not isinstance(cause, ValueError):
        return None
    available = text.rpartition("vailable")[2].partition("[")[2].partition("]")[0][:400]
    listed = f" (there are {available})" if available else ""
    if "BuilderConfig" in text:
        return f"no subset {component.subset!r}{listed}"
    if "Config name is missing" in text:
        return f"needs a subset{listed}; write {component.dataset}[subset]"
    if "Bad split" in text or "Unknown split" in text:
        return f"no split {component.split!r}{listed}"
    return None


def _said_by_status(cause: BaseException) -> str | None:
    status = status_of(cause)
    if status is None or is_busy(status):
        return None
    return f"the Hub refuses it (HTTP {status}); if it is private, run `hf auth login`"


def _is_transport(error: BaseException) -> bool:
    from huggingface_hub.errors import HfHubHTTPError

    return isinstance(error, HfHubHTTPError.__mro__[1])
