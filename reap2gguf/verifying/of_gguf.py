"""Verifies GGUF files alone against the GGUF file that they were made from: sliced or quantized."""

from __future__ import annotations

from typing import TYPE_CHECKING

from reap2gguf.errors import Reap2ggufError
from reap2gguf.gguf_files.split import first_parts
from reap2gguf.gguf_source.header import RECIPE_KEY
from reap2gguf.pruning.view import PrunedView
from reap2gguf.verifying.exactness import Exactness
from reap2gguf.verifying.gguf_file import ExpectedGguf, GgufCheck, open_gguf, values_or_error
from reap2gguf.verifying.report import Findings, Level, VerifyReport, ended_by_errors
from reap2gguf.verifying.sliced import KEPT_KEY, compared_blocks, is_sliced_of, kept_in

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from reap2gguf.gguf_files.reader import GgufHeader
    from reap2gguf.gguf_source.checkpoint import GgufCheckpoint
    from reap2gguf.progress import Progress
    from reap2gguf.verifying.context import Reference, Strictness


def verify_files(
    paths: Sequence[Path],
    checkpoint: GgufCheckpoint,
    strictness: Strictness,
    n_threads: int,
    progress: Progress,
) -> VerifyReport:
    """Compare GGUF files with the one that they were made from; of parts, the first is enough.

    One that a recipe made is compared tensor by tensor: those of the source's type by bytes.
    """
    found = Findings([path.name for path in paths])
    for path in first_parts(paths):
        header, problems = open_gguf(path)
        found.violations += problems
        if header is None:
            continue
        if RECIPE_KEY in header.metadata and not is_sliced_of((checkpoint, None), header):
            _check_quantized(path, header, checkpoint, (strictness, n_threads, progress), found)
            continue
        violations = list(compared_blocks(path, checkpoint, progress))
        found.violations += violations
        if not violations:
            found.reach(Level.EXACT, [path])
    return found.report()


def _check_quantized(
    path: Path,
    header: GgufHeader,
    checkpoint: GgufCheckpoint,
    how: tuple[Strictness, int, Progress],
    found: Findings,
) -> None:
    strictness, n_threads, progress = how
    try:
        reference = _reference(header, checkpoint)
    except Reap2ggufError as error:
        found.violations.append(str(error))
        return
    expected = ExpectedGguf(n_experts=reference[1].facts.n_experts)
    check = GgufCheck(path, expected, Exactness(strictness.is_exact), header)
    violations = list(ended_by_errors(check.header_violations(reference), path.name))
    (values,) = values_or_error([check], reference, n_threads, progress, strictness.device)
    found.violations += [*violations, *values]
    if check.unreadable:
        found.not_checked.append(f"{path.name}: {check.unreadable}")
    else:
        found.reach(Level.EXACT if check.is_exact else Level.VALUES, check.files)


def _reference(header: GgufHeader, checkpoint: GgufCheckpoint) -> Reference:
    """The source, without the experts that a file says it does not keep.

    One that says the same as the source was not pruned again: it has all experts of the source.
    """
    kept = header.metadata.get(KEPT_KEY)
    if kept is None or kept == checkpoint.gguf.metadata.get(KEPT_KEY):
        return checkpoint, checkpoint.decoded.model
    model, kept = kept_in(header, checkpoint)
    view = PrunedView(checkpoint, model, kept)
    return view, view.model
