"""Models of any publisher side by side."""

from __future__ import annotations

import os
from contextlib import ExitStack
from typing import TYPE_CHECKING

from reap2gguf.api.opening import PathLike, ProgressLike, to_progress
from reap2gguf.errors import UsageError
from reap2gguf.machine import processes
from reap2gguf.options import ComputeOptions, check_bool, check_number, given_or_new
from reap2gguf.outputs import claimed, drop_states, result_file
from reap2gguf.progress import working

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from reap2gguf.comparing.compared import ModelComparison
    from reap2gguf.comparing.opening import Opened
    from reap2gguf.progress import Progress


def compare(
    *models: PathLike,
    reference: PathLike | None = None,
    text: str = "held-out",
    chunk: int = 512,
    chunks: int | None = None,
    quality: bool = True,
    picture: PathLike | None = None,
    output: PathLike | None = None,
    overwrite: bool = False,
    compute: ComputeOptions | None = None,
    progress: ProgressLike = None,
) -> ModelComparison:
    """Compare sizes, types, bits per weight and quality of models.

    Each of `models` is a GGUF file (the first part of several), a folder of them, a checkpoint, or
    a name on the Hub: `owner/name` or `owner/name:FILE.gguf`, which is read by ranges and never
    downloaded whole. Quality is perplexity on `text` (`held-out`, `wikitext2` or a file, of which
    the first `chunks` chunks of `chunk` tokens are scored), and KL divergence from `reference`: one
    of the models or another one; None takes the largest that can be computed. A model that does not
    fit the reference has sizes alone, and a reason. `picture` is a PNG file to write, and `output`
    a JSON file; with it, an interrupted call resumes from what is kept beside it, in files whose
    names begin with `OUTPUT.state`.

    Raises UsageError for a reference that cannot be computed and for an output that is one of the
    models, OutputError, also if an output exists and is not to be overwritten, and what opening a
    model raises.
    """
    check_bool("quality", quality)
    check_number("chunk", chunk, 8)
    if chunks is not None:
        check_number("chunks", chunks, 2)
    if not models:
        raise UsageError("no model to compare; pass GGUF files or folders")
    given = models if reference is None else (*models, reference)
    drawn, target = _files_to_write(given, text, picture, output)
    compute = given_or_new("compute", compute, ComputeOptions)
    reports = to_progress(progress)
    with ExitStack() as stack:
        stack.enter_context(claimed([drawn, target], overwrite))
        with working(reports, "Reading headers"):
            from reap2gguf.comparing.compared import compared

            wanted = None if reference is None else os.fspath(reference)
            opened = _opened(models, wanted, stack, reports)
        if not quality:
            result = compared(opened)
        else:
            from reap2gguf.comparing.quality import Question, measure

            state = None if target is None else target.with_name(f"{target.name}.state")
            asked = Question(text, chunks, chunk, compute, state)
            result = measure(opened, _reference(opened, wanted), asked, reports)
        if processes().is_first:
            _write(result, drawn, target)
    return result


def _files_to_write(
    models: Sequence[PathLike], text: str, picture: PathLike | None, output: PathLike | None
) -> tuple[Path | None, Path | None]:
    """The files of the picture and of the figures. Raises UsageError as `compare` does."""
    drawn, target = (
        None if path is None else result_file(path, models, text) for path in (picture, output)
    )
    if drawn is not None and drawn == target:
        raise UsageError(f"output {target}: the picture is written there; pass another output")
    return drawn, target


def _opened(
    models: Sequence[PathLike], wanted: str | None, stack: ExitStack, progress: Progress
) -> list[Opened]:
    """All models, first a reference that is none of them."""
    from reap2gguf.comparing.opening import open_all

    named = [os.fspath(model) for model in models]
    if wanted is not None and wanted not in named:
        named.insert(0, wanted)
    return open_all(named, stack, progress)


def _write(result: ModelComparison, drawn: Path | None, target: Path | None) -> None:
    if drawn is not None:
        from reap2gguf.comparing.picture import write_picture

        write_picture(result, drawn)
    if target is not None:
        result.save(target)
        drop_states(target)


def _reference(opened: Sequence[Opened], wanted: str | None) -> Opened:
    """The model that the others are measured against."""
    if wanted is not None:
        return next(one for one in opened if one.named == wanted)
    computable = [one for one in opened if one.model is not None] or opened
    return max(computable, key=lambda one: one.contents.n_file_bytes)
