"""The passes of a build over a text, one at a time: observe and imatrix."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from reap2gguf.api.imatrices import dat_beside
from reap2gguf.api.opening import PathLike, ProgressLike, claimed_files, open_named, to_progress
from reap2gguf.api.peers import Peers
from reap2gguf.api.texts import calibration_rows
from reap2gguf.options import (
    CalibrationOptions,
    ComputeOptions,
    Resume,
    check_bool,
    check_number,
    check_path,
    given_or_new,
)
from reap2gguf.progress import Progress, working

if TYPE_CHECKING:
    from reap2gguf.artifacts.observations import Observations
    from reap2gguf.artifacts.texts import ImatrixChunks, ObservationRows
    from reap2gguf.calibration.scanned_files import ScannedFiles
    from reap2gguf.checkpoint.checkpoint import Checkpoint
    from reap2gguf.gguf_files.imatrix import Imatrix
    from reap2gguf.hub.opened import OpenModel


def observe(
    model: PathLike,
    output: PathLike,
    *,
    calibration: CalibrationOptions | None = None,
    compute: ComputeOptions | None = None,
    follow_links: bool = False,
    imatrix_sums: bool = False,
    overwrite: bool = False,
    progress: ProgressLike = None,
) -> Observations:
    """Record what each expert of MODEL does on calibration text, and write it to `output`.

    With `imatrix_sums` the file also has the sums of an importance matrix of all experts, for
    builds with `imatrix_from="source"`.
    An interrupted call resumes from the layer that `OUTPUT.state` holds. Every process of torchrun
    returns the sums of all; the first one writes them. Raises CalibrationError, ObservationError,
    OutputError, also if the output exists and is not to be overwritten, and what opening a model
    raises.
    """
    from reap2gguf.calibration.scanned_files import ScannedFiles
    from reap2gguf.calibration.sources import check_calibration
    from reap2gguf.calibration.spec import decide

    # what can be refused without torch is refused before it is loaded
    check_bool("imatrix_sums", imatrix_sums)
    compute = given_or_new("compute", compute, ComputeOptions)
    decided = decide(given_or_new("calibration", calibration, CalibrationOptions))
    files = ScannedFiles()
    check_calibration(decided, files)
    peers, shown = Peers(output), to_progress(progress)
    with (
        open_named(model, shown, follow_links=follow_links) as opened,
        claimed_files(opened, [peers.output], files.paths, overwrite),
    ):
        peers.check_same_model(opened.checkpoint)
        rows = calibration_rows(opened, decided, files, shown)
        peers.make_folder()
        seen = _observed(opened, rows, peers.output, compute, imatrix_sums, shown)
        peers.end(lambda: seen.save(peers.output))
    return seen


def _observed(
    opened: OpenModel,
    rows: ObservationRows,
    output: Path,
    compute: ComputeOptions,
    imatrix_sums: bool,
    progress: Progress,
) -> Observations:
    """What the experts do on rows; what the user should know of it is said."""
    key = rows.sha256 + ("with imatrix" if imatrix_sums else "")
    where = _resuming(compute, output, opened.checkpoint, key)
    with working(progress, "Loading torch and the first layer"):
        from reap2gguf.observing import passes
        from reap2gguf.pruning.coverage import observed_notes

        seen = passes.observe(opened.checkpoint, opened.model, rows, where, progress, imatrix_sums)
    for line in observed_notes(seen):
        progress.note(line)
    return seen


def imatrix(
    model: PathLike,
    text: PathLike,
    output: PathLike,
    *,
    chunk: int = 512,
    imatrix_chunks: int | None = None,
    seed: int = 42,
    compute: ComputeOptions | None = None,
    overwrite: bool = False,
    follow_links: bool = False,
    progress: ProgressLike = None,
) -> Imatrix:
    """Compute the importance matrix of MODEL on a text; `output` is a GGUF file.

    The text is cut into chunks of `chunk` tokens; all are read, or `imatrix_chunks` of them, spread
    over the text by `seed`. The older format is written beside it, as `.dat`. An interrupted call
    resumes from the layer that `OUTPUT.state` holds. Raises CalibrationError, ObservationError,
    OutputError, also if a file exists and is not to be overwritten, UsageError, and what opening a
    model raises.
    """
    from reap2gguf.calibration.scanned_files import ScannedFiles
    from reap2gguf.gguf_files.imatrix import save_both

    peers, shown = Peers(output), to_progress(progress)
    text, cut = check_path("text", text), _Chunking(chunk, imatrix_chunks, seed)
    compute = given_or_new("compute", compute, ComputeOptions)
    dat = dat_beside(peers.output)
    files = ScannedFiles()
    files.text(text)
    with (
        open_named(model, shown, follow_links=follow_links) as opened,
        claimed_files(opened, [peers.output, dat], [text], overwrite),
    ):
        peers.check_same_model(opened.checkpoint)
        chunks = cut.of(opened, text, files, shown)
        peers.make_folder()
        where = _resuming(compute, peers.output, opened.checkpoint, chunks.tokens_sha256)
        with working(shown, "Loading torch and the first layer"):
            from reap2gguf.observing.passes import compute_imatrix

            result, _ = compute_imatrix(opened.checkpoint, opened.model, chunks, where, shown)
        peers.end(lambda: save_both(result, peers.output))
    return result


@dataclass(frozen=True)
class _Chunking:
    """How a text is cut for an importance matrix."""

    size: int  # tokens of a chunk
    most: int | None  # chunks; None: all
    seed: int  # which are taken, if not all

    def __post_init__(self) -> None:
        """Raises UsageError for numbers that no matrix can be computed with."""
        check_number("chunk", self.size, 8)
        check_number("seed", self.seed, -(2**31 - 1))
        if self.most is not None:
            check_number("imatrix_chunks", self.most, 1)

    def of(
        self, opened: OpenModel, text: Path, files: ScannedFiles, progress: Progress
    ) -> ImatrixChunks:
        """The chunks of a text in the model's tokens. Raises CalibrationError."""
        opened.check_tokenizer()
        from reap2gguf.calibration.drawing import imatrix_chunks
        from reap2gguf.tokenizer.tokenizer import Tokenizer

        size = min(self.size, opened.model.facts.context_length)
        with working(progress, f"Reading {text}"):
            tokenizer = Tokenizer(opened.source.folder)
            return imatrix_chunks(tokenizer, text, size, files, self.most, self.seed)


def _resuming(
    compute: ComputeOptions, output: Path, checkpoint: Checkpoint, rows: str
) -> ComputeOptions:
    """Keep the progress of a sweep that writes `output` beside it."""
    from reap2gguf.artifacts.made_with import COMPUTING, versions
    from reap2gguf.building.keys import IMATRIX_FORMAT, OBSERVE_FORMAT, stage_key

    path = output.with_name(f"{output.name}.state")
    source = (checkpoint.fingerprint(), checkpoint.stamps())
    key = stage_key(
        OBSERVE_FORMAT, IMATRIX_FORMAT, source, rows, compute.likely_device, compute.likely_dtype
    )
    resume = Resume(path, key, versions(COMPUTING))
    return replace(compute, scratch=output.parent, resume=resume)
