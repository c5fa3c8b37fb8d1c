"""What the functions of the library share: how they open a model and report progress."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from reap2gguf.errors import UsageError
from reap2gguf.options import check_bool
from reap2gguf.outputs import keep_inputs
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


def keep_files(opened: OpenModel, outputs: list[Path], inputs: Iterable[Path]) -> None:
    keep_inputs(outputs, [*inputs, *opened.checkpoint.shards], opened.source.folder)


def to_progress(given: ProgressLike) -> Progress:
    if given is None:
        return Silent()
    if not callable(given) and not hasattr(given, "task"):
        raise UsageError(f"progress is {given!r}, expected a function or a Progress")
    return CallbackProgress(given) if callable(given) else given
