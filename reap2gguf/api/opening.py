"""What the functions of the library share: how they open a model and report progress."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from reap2gguf.errors import UsageError
from reap2gguf.options import check_bool
from reap2gguf.outputs import claimed, keep_inputs
from reap2gguf.progress import CallbackProgress, Progress, ProgressEvent, Silent, working

if TYPE_CHECKING:
    from reap2gguf.hub.opened import OpenModel

ProgressLike = Callable[[ProgressEvent], None] | Progress | None
PathLike = Path | str


def open_named(
    name: PathLike, progress: Progress, keep_mtp: bool = True, follow_links: bool = False
) -> OpenModel:
    check_bool("follow_links", follow_links)
    with working(progress, f"Reading {name}"):
        from reap2gguf.hub.opened import open_model

        return open_model(str(name), progress, keep_mtp, follow_links)


@contextmanager
def claimed_files(
    opened: OpenModel, outputs: Sequence[Path], inputs: Iterable[Path], overwrite: bool
) -> Iterator[None]:
    """Outputs that replace no input, and are written by no other process while this is open.

    Raises UsageError or OutputError otherwise, and if one exists and is not to be overwritten.
    """
    keep_files(opened, outputs, inputs)
    with claimed(outputs, overwrite):
        yield


def keep_files(opened: OpenModel, outputs: Sequence[Path], inputs: Iterable[Path]) -> None:
    """Raise UsageError for an output that would replace an input, or a file of the model."""
    keep_inputs(outputs, [*inputs, *opened.checkpoint.shards], opened.source.folder)


def to_progress(given: ProgressLike) -> Progress:
    if given is None:
        return Silent()
    if not callable(given) and not hasattr(given, "task"):
        raise UsageError(f"progress is {given!r}, expected a function or a Progress")
    return CallbackProgress(given) if callable(given) else given
