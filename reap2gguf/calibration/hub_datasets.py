"""Records of a dataset on the Hub, streamed by `datasets`: nothing is kept on the disk.

Which records: the split's shards are shuffled by the seed, then its records within a buffer of
10,000, and only as many as are asked for are read. The same dataset at the same commit with the
same seed gives the same records. REAP draws from the whole dataset with Python's own generator,
which reads all of it first. So the records of a published model cannot be drawn again, only as many
of the same data.

The commit is resolved once, at the start, and everything is read at that commit. Scripts of a
dataset never run. A request that fails is repeated; reading resumes at the record that was reached.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

from reap2gguf.calibration.layouts import Record, columns
from reap2gguf.errors import CalibrationError, OutputError, Reap2ggufError
from reap2gguf.hub.errors import (
    Problem,
    cache_refusal,
    causes,
    first_line,
    is_transport,
    problem_of,
    request_errors,
    status_of,
)
from reap2gguf.hub.retry import Note, Retry, Sleep

if TYPE_CHECKING:
    from reap2gguf.calibration.spec import Component

BUFFER = 10_000  # records that wait to be drawn
_PRIVATE = "(or it is private: run `hf auth login`)"


@dataclass(frozen=True)
class Wording:
    """How notes and errors name a dataset, and what they advise where it cannot be had."""

    subject: str
    instead: str  # what a user can do without this dataset
    missing: str  # what it means that the Hub does not have it


def _of_calibration(component: Component) -> Wording:
    return Wording(
        f"calibration {component.name}",
        "save its records as JSONL or Parquet and pass the file",
        f"no such file or folder here and no such dataset on the Hub {_PRIVATE}",
    )


def open_dataset(
    component: Component,
    seed: int | None,
    note: Note,
    sleep: Sleep = time.sleep,
    wording: Wording | None = None,
) -> tuple[str, Iterator[Record]]:
    """The commit of a dataset, and its records in the order in which they are drawn.

    They are drawn by `seed`; without one they come in the order of the dataset. Without `wording`
    it is named as a component of a calibration.

    No record is read before the iterator is asked for one. Raises CalibrationError if there is no
    such dataset, subset or split, it may not be read, or the Hub cannot be reached in five tries;
    OutputError if the Hub's cache cannot be written. The iterator raises the same errors.
    """
    words = wording or _of_calibration(component)

    def refusal(error: BaseException) -> Reap2ggufError | None:
        return _refusal(error, component, words)

    retry = Retry(
        words.subject,
        refusal,
        f"check the network, or {words.instead}",
        note,
        sleep,
        error_class=CalibrationError,
        errors=_dataset_errors,
    )

    def open_stream() -> tuple[str, Iterator[Record]]:
        commit = _resolve_commit(component)
        return commit, _stream(component, commit, seed)

    commit, stream = retry.call(open_stream)
    return commit, _resuming(component, commit, seed, stream, retry)


def _resolve_commit(component: Component) -> str:
    from huggingface_hub import HfApi

    info = HfApi().dataset_info(component.dataset, revision=component.revision, timeout=60)
    if info.sha is None:
        raise ValueError("the Hub names no commit")
    return info.sha


def _resuming(
    component: Component, commit: str, seed: int | None, first: Iterator[Record], retry: Retry
) -> Iterator[Record]:
    """The records of `first`; where it breaks off, those of the same stream from there on."""
    n_done = 0
    stream: Iterator[Record] | None = first

    def next_record() -> Record | None:
        nonlocal stream
        if stream is None:
            stream = islice(_stream(component, commit, seed), n_done, None)
        try:
            return next(stream, None)
        except BaseException:
            stream = None  # a stream that has failed gives no more records
            raise

    while (record := retry.call(next_record)) is not None:
        n_done += 1
        yield record


def _stream(component: Component, commit: str, seed: int | None) -> Iterator[Record]:
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    dataset = datasets.load_dataset(
        component.dataset, component.subset, split=component.split, revision=commit, streaming=True
    )
    if dataset.column_names is not None:
        dataset = dataset.select_columns(columns(list(dataset.column_names)))
    if seed is None:
        return iter(dataset)
    # numpy takes no negative seed
    return iter(dataset.shuffle(seed=seed % 2**32, buffer_size=BUFFER))


def _dataset_errors() -> tuple[type[Exception], ...]:
    """What `datasets` and the libraries under it raise."""
    from datasets.exceptions import DatasetsError

    others = (TypeError, ArithmeticError, EOFError, AttributeError)
    return (DatasetsError, *request_errors(), *others)


def _refusal(error: BaseException, component: Component, wording: Wording) -> Reap2ggufError | None:
    """What to report if another try would fail like this one; None if it may pass."""
    where = wording.subject
    for cause in causes(error):
        if refusal := cache_refusal(cause):
            return OutputError(f"{where}: {refusal}")
        words = _hub_words(cause, component, wording)
        words = words or _datasets_words(cause, component, wording)
        if words:
            return CalibrationError(f"{where}: {words}")
    if is_transport(error):
        return None
    return CalibrationError(
        f"{where}: cannot be read as records ({first_line(error)}); {wording.instead}"
    )


def _hub_words(cause: BaseException, component: Component, wording: Wording) -> str | None:
    """What one error of the Hub means; None if it may pass, or is not the Hub's."""
    words = {
        Problem.INVALID_NAME: wording.missing,
        Problem.NO_TOKEN: "not logged in to the Hub: run `hf auth login`",
        Problem.GATED: "gated on the Hub; accept its terms there and run `hf auth login`",
        Problem.NO_REPOSITORY: wording.missing,
        Problem.NO_REVISION: f"no revision {component.revision!r} on the Hub",
        Problem.OFFLINE: (
            f"HF_HUB_OFFLINE is set, and its records are not cached; unset it, or {wording.instead}"
        ),
        Problem.REFUSED: (
            f"the Hub refuses it (HTTP {status_of(cause)}); if it is private, run `hf auth login`"
        ),
    }
    problem = problem_of(cause)
    if "gated dataset" in str(cause):  # the words of `datasets`
        problem = Problem.GATED
    return None if problem is None else words.get(problem)


def _datasets_words(cause: BaseException, component: Component, wording: Wording) -> str | None:
    """What an error of `datasets` means; most are plain errors, known by their texts alone."""
    from datasets.exceptions import DataFilesNotFoundError, DatasetNotFoundError

    text = " ".join(str(cause).split())
    if isinstance(cause, DatasetNotFoundError):
        return wording.missing
    if isinstance(cause, DataFilesNotFoundError) or type(cause).__name__ == "EmptyDatasetError":
        return f"holds no files that can be read as records; {wording.instead}"
    if isinstance(cause, RuntimeError) and "scripts are no longer supported" in text:
        return (
            "needs a script, and scripts are not run; the Hub may have its records as "
            f"Parquet, at {component.dataset}@refs/convert/parquet"
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
