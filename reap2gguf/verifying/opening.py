"""Opens the model that a bundle was made from, as the user names it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from reap2gguf.hub.opened import resolve_model
from reap2gguf.verifying.against_source import OpenSource

if TYPE_CHECKING:
    from reap2gguf.progress import Progress


@contextmanager
def open_source(model: str, progress: Progress) -> Iterator[OpenSource]:
    """MODEL, which is downloaded where it is compared. Raises what opening a model raises."""
    source = resolve_model(model, progress.note)
    source.complete(progress.note)
    with source.open(progress.note) as checkpoint:
        checkpoint.report_to(progress)
        yield OpenSource(source, checkpoint)
