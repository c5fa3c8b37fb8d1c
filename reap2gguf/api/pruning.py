"""Pruning on its own: which experts stay, and the model without the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from reap2gguf.api.changes import Changes, pruned_model
from reap2gguf.api.opening import PathLike, ProgressLike, open_named, to_progress
from reap2gguf.api.selecting import Selection, Wanted, chosen
from reap2gguf.options import (
    DEQUANTIZE_CHOICES,
    MTP_CHOICES,
    REPAIR_CHOICES,
    CalibrationOptions,
    ComputeOptions,
    check_choice,
    given_or_new,
)
from reap2gguf.outputs import claimed, output_path
from reap2gguf.progress import Progress, Silent
from reap2gguf.pruning.counts import check_asked

if TYPE_CHECKING:
    from reap2gguf.artifacts.observations import Observations
    from reap2gguf.hub.opened import OpenModel


@dataclass(frozen=True)
class PruneResult:
    """What was pruned, and which experts it keeps."""

    folder: Path  # of safetensors; of a GGUF model, the file or its first part
    selection: Selection


def select(
    model: PathLike,
    observations: Observations | PathLike | None = None,
    *,
    keep_experts: int | None = None,
    compression: float | None = None,
    method: str = "reap",
    protect: str = "",
    protect_super_experts: bool = False,
    kept: Mapping[int, Sequence[int]] | PathLike | None = None,
    mtp: str = "prune",
    follow_links: bool = False,
) -> Selection:
    """Choose the experts to keep by a criterion over observations; nothing is written.

    Methods that rank experts by their weights alone take no observations. `protect` names experts
    that stay whatever they score, such as "3:17,*:5-8" (layer:expert). `kept` names all experts
    that stay, by layer or in a file such as `prune` writes, in place of every choice. Raises
    ArtifactError if observations or `kept` are of another model, UsageError for a number of experts
    that the model cannot run with, and for protected experts that do not exist or fit.
    """
    check_choice("mtp", mtp, MTP_CHOICES)
    wanted = Wanted(keep_experts, compression, method, protect, protect_super_experts, kept)
    with open_named(model, Silent(), mtp == "prune", follow_links) as opened:
        return chosen(opened, observations, wanted, Silent())


def prune(
    model: PathLike,
    observations: Observations | PathLike | None,
    output: PathLike,
    *,
    keep_experts: int | None = None,
    compression: float | None = None,
    method: str = "reap",
    protect: str = "",
    protect_super_experts: bool = False,
    kept: Mapping[int, Sequence[int]] | PathLike | None = None,
    mtp: str = "prune",
    repair: str = "none",
    group_size: int | None = None,
    calibration: CalibrationOptions | None = None,
    compute: ComputeOptions | None = None,
    dequantize: str | None = None,
    overwrite: bool = False,
    follow_links: bool = False,
    progress: ProgressLike = None,
) -> PruneResult:
    """Write MODEL without the experts that matter least, as a verified safetensors folder.

    Of a GGUF file, `output` is a GGUF file too, of as many parts: the blocks of the experts that
    stay, byte for byte. An interrupted call resumes from the tensor that `OUTPUT.journal` holds.
    Quantized weights stay as they are stored, unless `dequantize` is "bf16". `observations` is None
    for methods that rank experts by their weights alone, and with `kept`. A repair, "ridge" or
    "scale", fits the kept experts on the calibration text, and `compute` says where; an interrupted
    one resumes from `.OUTPUT.repair`, a folder beside the output. The methods "ream" and "hc_smoe"
    merge experts on that text, in groups of at most `group_size` (ream), and resume from
    `.OUTPUT.merge`; for them, too, `observations` is None. Raises what `select` raises,
    CalibrationError, ObservationError, OutputError if the output cannot be written or exists, which
    `overwrite` allows for a GGUF file, and VerificationError if what was written is not what was
    planned.
    """
    output, shown = output_path(output), to_progress(progress)
    check_choice("mtp", mtp, MTP_CHOICES)
    check_choice("repair", repair, REPAIR_CHOICES)
    if dequantize is not None:
        check_choice("dequantize", dequantize, DEQUANTIZE_CHOICES)
    wanted = Wanted(keep_experts, compression, method, protect, protect_super_experts, kept)
    check_asked(method, repair, group_size)
    options = given_or_new("calibration", calibration, CalibrationOptions)
    compute = given_or_new("compute", compute, ComputeOptions)
    with open_named(model, shown, mtp == "prune", follow_links) as opened:
        checkpoint = opened.checkpoint if dequantize is None else opened.checkpoint.dequantized()
        how = Changes(checkpoint, output, repair, group_size, options, compute)
        if opened.checkpoint.gguf is None:
            return _prune_folder(opened, observations, wanted, how, shown)
        from reap2gguf.building.prune_gguf import check_slicing

        check_slicing(method, repair, dequantize)
        return _prune_file(opened, observations, wanted, how, overwrite, shown)


def _prune_folder(
    opened: OpenModel,
    observations: Observations | PathLike | None,
    wanted: Wanted,
    how: Changes,
    progress: Progress,
) -> PruneResult:
    """Write a safetensors folder."""
    with (
        claimed([how.output]),
        pruned_model(opened, observations, wanted, how, progress) as (view, selection, change),
    ):
        _say(selection, progress)
        from reap2gguf.building.prune_folder import PrunedBy, prune_to_folder
        from reap2gguf.pruning.history import original_of

        facts, method = opened.model.facts, selection.method
        original = original_of(opened.source, opened.checkpoint, facts, view.kept, method)
        by = PrunedBy(method, opened.source.label, selection.protected, change, original)
        prune_to_folder(how.checkpoint, opened.model, view, by, how.output, progress)
    return PruneResult(how.output, selection)


def _prune_file(
    opened: OpenModel,
    observations: Observations | PathLike | None,
    wanted: Wanted,
    how: Changes,
    overwrite: bool,
    progress: Progress,
) -> PruneResult:
    """Write a GGUF file, or its parts."""
    from reap2gguf.building.prune_gguf import claimed_parts, prune_to_gguf

    with (
        claimed_parts(opened, how.output, overwrite) as output,
        pruned_model(opened, observations, wanted, how, progress) as (view, selection, _),
    ):
        _say(selection, progress)
        first = prune_to_gguf(opened, view, selection.method, output, progress, overwrite)
    return PruneResult(first, selection)


def _say(selection: Selection, progress: Progress) -> None:
    for line in selection.notes:
        progress.note(line)
