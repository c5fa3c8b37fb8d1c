"""The stages of a build, one at a time: observe, select, prune, imatrix and quantize."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from reap2gguf.api.changes import Changes, pruned_model
from reap2gguf.api.opening import PathLike, ProgressLike, keep_files, open_named, to_progress
from reap2gguf.api.peers import Peers
from reap2gguf.api.selecting import Selection, Wanted, chosen
from reap2gguf.errors import OutputError, UsageError
from reap2gguf.machine import processes
from reap2gguf.options import (
    DEQUANTIZE_CHOICES,
    MTP_CHOICES,
    REPAIR_CHOICES,
    CalibrationOptions,
    CheckQuants,
    ComputeOptions,
    Resume,
    check_bool,
    check_choice,
    check_labels,
    check_number,
    check_path,
    check_quants_of,
    check_tensor_types,
    check_threads,
    given_or_new,
    one_recipe,
)
from reap2gguf.outputs import output_file, output_path
from reap2gguf.progress import Progress, Silent, working
from reap2gguf.pruning.counts import check_asked

if TYPE_CHECKING:
    from reap2gguf.artifacts.observations import Observations
    from reap2gguf.checkpoint.checkpoint import Checkpoint
    from reap2gguf.exporting.model_files import WeightedBy
    from reap2gguf.gguf_files.imatrix import Imatrix
    from reap2gguf.hub.opened import OpenModel
    from reap2gguf.quantizing.resolve import ResolvedRecipe


@dataclass(frozen=True)
class PruneResult:
    """What was pruned, and which experts it keeps."""

    folder: Path  # of safetensors; of a GGUF model, the file or its first part
    selection: Selection


@dataclass(frozen=True)
class QuantizeResult:
    """A GGUF file that was written."""

    path: Path
    n_bytes: int
    bits_per_weight: float
    tensor_types: Mapping[str, str]  # GGUF tensor name -> GGML type, such as Q4_K


def observe(
    model: PathLike,
    output: PathLike,
    *,
    calibration: CalibrationOptions | None = None,
    compute: ComputeOptions | None = None,
    follow_links: bool = False,
    imatrix_sums: bool = False,
    progress: ProgressLike = None,
) -> Observations:
    """Record what each expert of MODEL does on calibration text, and write it to `output`.

    With `imatrix_sums` the file also has the sums of an importance matrix of all experts, for
    builds with `imatrix_from="source"`.
    An interrupted call resumes from the layer that `OUTPUT.state` holds. Every process of torchrun
    returns the sums of all; the first one writes them. Raises CalibrationError, ObservationError,
    OutputError, and what opening a model raises.
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
    peers = Peers(output)
    output, shown = peers.output, to_progress(progress)
    with open_named(model, shown, follow_links=follow_links) as opened:
        keep_files(opened, [output], files.paths)
        peers.check_same_model(opened.checkpoint)
        opened.check_tokenizer()
        from reap2gguf.calibration.drawing import observation_rows
        from reap2gguf.observing import passes
        from reap2gguf.pruning.coverage import observed_notes
        from reap2gguf.tokenizer.tokenizer import Tokenizer

        facts = opened.model.facts
        length = min(decided.max_length, facts.context_length)
        with working(shown, "Reading the calibration text"):
            tokenizer = Tokenizer(opened.source.folder)
            rows = observation_rows(tokenizer, decided, length, facts.vocab_size, shown, files)
        peers.make_folder()
        key = rows.sha256 + ("with imatrix" if imatrix_sums else "")
        where = _resuming(compute, output, opened.checkpoint, key)
        with working(shown, "Loading torch and the first layer"):
            of = opened.checkpoint, opened.model, rows
            seen = passes.observe(*of, where, shown, imatrix_sums)
    for line in observed_notes(seen):
        shown.note(line)
    peers.end(lambda: seen.save(output))
    return seen


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
    CalibrationError, ObservationError, OutputError if the folder exists or cannot be written, and
    VerificationError if what was written is not what was planned.
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
        if opened.checkpoint.gguf is not None:
            from reap2gguf.building.prune_gguf import check_output

            check_output(output, method, repair, dequantize)
        elif output.exists():
            raise OutputError(f"{output}: exists already; pass another output or move it away")
        checkpoint = opened.checkpoint if dequantize is None else opened.checkpoint.dequantized()
        how = Changes(checkpoint, output, repair, group_size, options, compute)
        with pruned_model(opened, observations, wanted, how, shown) as (view, selection, change):
            from reap2gguf.building.prune_folder import prune_to_folder

            for line in selection.notes:
                shown.note(line)
            where = output, shown, opened.source.label, selection.protected
            if checkpoint.gguf is not None:
                from reap2gguf.building.prune_gguf import prune_to_gguf

                output = prune_to_gguf(opened, view, selection.method, output, shown)
            else:
                from reap2gguf.pruning.history import original_of

                method = selection.method
                of = opened.source, opened.checkpoint, opened.model.facts, view.kept, method
                how_made = change, original_of(*of)
                prune_to_folder(checkpoint, opened.model, view, method, *where, *how_made)
    return PruneResult(output, selection)


def imatrix(
    model: PathLike,
    text: PathLike,
    output: PathLike,
    *,
    chunk: int = 512,
    imatrix_chunks: int | None = None,
    seed: int = 42,
    compute: ComputeOptions | None = None,
    follow_links: bool = False,
    progress: ProgressLike = None,
) -> Imatrix:
    """Compute the importance matrix of MODEL on a text; `output` is a GGUF file.

    The text is cut into chunks of `chunk` tokens; all are read, or `imatrix_chunks` of them, spread
    over the text by `seed`. The older format is written beside it, as `.dat`. An interrupted call
    resumes from the layer that `OUTPUT.state` holds. Raises CalibrationError, ObservationError,
    OutputError, UsageError, and what opening a model raises.
    """
    peers = Peers(output)
    output, text, shown = peers.output, check_path("text", text), to_progress(progress)
    check_number("chunk", chunk, 8)
    check_number("seed", seed, -(2**31 - 1))
    if imatrix_chunks is not None:
        check_number("imatrix_chunks", imatrix_chunks, 1)
    compute = given_or_new("compute", compute, ComputeOptions)
    if output.suffix == ".dat":
        raise UsageError(f"{output}: name the .gguf file; the .dat is written beside it")
    dat = output.with_suffix(".dat")
    if processes().is_first:
        output_file(dat)
    from reap2gguf.calibration.scanned_files import ScannedFiles

    files = ScannedFiles()
    files.text(text)
    with open_named(model, shown, follow_links=follow_links) as opened:
        keep_files(opened, [output, dat], [text])
        peers.check_same_model(opened.checkpoint)
        opened.check_tokenizer()
        from reap2gguf.calibration import drawing
        from reap2gguf.gguf_files.imatrix import save_both
        from reap2gguf.observing.passes import compute_imatrix
        from reap2gguf.tokenizer.tokenizer import Tokenizer

        size = min(chunk, opened.model.facts.context_length)
        with working(shown, f"Reading {text}"):
            tokenizer = Tokenizer(opened.source.folder)
            chunks = drawing.imatrix_chunks(tokenizer, text, size, files, imatrix_chunks, seed)
        peers.make_folder()
        where = _resuming(compute, output, opened.checkpoint, chunks.tokens_sha256)
        with working(shown, "Loading torch and the first layer"):
            result, _ = compute_imatrix(opened.checkpoint, opened.model, chunks, where, shown)
    peers.end(lambda: save_both(result, output))
    return result


def quantize(
    model: PathLike,
    recipe: str,
    output: PathLike,
    *,
    imatrix: Imatrix | PathLike | None = None,
    labels: Mapping[str, str] | None = None,
    tensor_types: Sequence[str] | Mapping[str, str] = (),
    threads: int | None = None,
    device: str = "auto",
    check_quants: CheckQuants | str = CheckQuants.SAMPLE,
    follow_links: bool = False,
    progress: ProgressLike = None,
) -> QuantizeResult:
    """Write MODEL as one GGUF file by a recipe: a file type, a shipped recipe, or a TOML file.

    `tensor_types` (pattern to type, or a list of PATTERN=TYPE) come before the recipe's rules. If
    `output` is a folder, the file in it is called NAME-LABEL.gguf; `labels` may give the recipe
    another label. `device` is what quantizes: "cpu", "cuda", or "auto", a GPU if there is one and
    much to do. `check_quants` says how much of what the compiled kernels quantize is compared with
    libggml's bytes: "all", "sample" (one super-block in a thousand) or "none". An interrupted call
    resumes from the tensor that `OUTPUT.journal` holds. Raises RecipeError, ArtifactError,
    OutputError, UsageError, and what opening a model raises.
    """
    from reap2gguf.building.needs.room import check_device
    from reap2gguf.bundle.layout import model_file
    from reap2gguf.exporting.model_files import WeightedBy
    from reap2gguf.gguf_files.imatrix import Imatrix
    from reap2gguf.quantizing.ik.workers import check_installed
    from reap2gguf.quantizing.overrides import read_overrides
    from reap2gguf.quantizing.recipe import find_recipe, load_recipes
    from reap2gguf.quantizing.resolve import resolve

    recipe = one_recipe(recipe)
    compute = ComputeOptions(
        device, threads=check_threads(threads), check_quants=check_quants_of(check_quants)
    )
    overrides = read_overrides(check_tensor_types(tensor_types))
    (asked,) = load_recipes([recipe], check_labels(labels or {}), overrides)
    found = find_recipe(recipe)
    inputs = [found] if isinstance(found, Path) else []
    if not isinstance(imatrix, Imatrix | None):
        inputs.append(imatrix := check_path("imatrix", imatrix))
    weighted_by = None if imatrix is None else WeightedBy.of(imatrix)
    check_device(compute)
    is_folder, shown = bool(str(output)) and os.path.isdir(str(output)), to_progress(progress)
    if labels and not is_folder:
        raise UsageError(f"{output}: names the file already; pass a folder, or no label")
    output = Path(output) if is_folder else output_file(output)
    with open_named(model, shown, follow_links=follow_links) as opened:
        if is_folder:
            output /= model_file(opened.source.short_name, asked.label)
            output = output_file(output)
        keep_files(opened, [output], inputs)
        facts = opened.model.facts
        tensors = opened.model.gguf_tensors(opened.checkpoint.tensors)
        resolved = resolve(asked, tensors, facts, facts.n_experts, weighted_by is not None)
        check_installed([resolved])
        _export(opened, resolved, output, weighted_by, compute, shown)
    types = {tensor: one.name for tensor, one in resolved.tensor_types().items()}
    return QuantizeResult(output, output.stat().st_size, resolved.bits_per_weight, types)


def _export(
    opened: OpenModel,
    recipe: ResolvedRecipe,
    output: Path,
    weighted_by: WeightedBy | None,
    compute: ComputeOptions,
    progress: Progress,
) -> None:
    """Write one GGUF file; its journal lies beside it until it is complete."""
    from reap2gguf.atomic import remove
    from reap2gguf.building.keys import export_key, ik_identity
    from reap2gguf.exporting.header_facts import HeaderNames
    from reap2gguf.exporting.journal import ExportJournal
    from reap2gguf.exporting.model_files import export_model
    from reap2gguf.exporting.quantizers import note_quantizers
    from reap2gguf.exporting.row_ranges import check_imatrix, made_types
    from reap2gguf.gguf_files.imatrix_coverage import shapes_of
    from reap2gguf.gguf_files.imatrix_fit import fit
    from reap2gguf.quantizing.minimum import check_minimum, check_needed
    from reap2gguf.quantizing.source_blocks import note_blocks

    name = opened.source.short_name
    fingerprint = opened.checkpoint.fingerprint()
    identity = ("", "") if weighted_by is None else (weighted_by.file, weighted_by.digest())
    key = export_key(fingerprint, name, recipe.source, *identity, *ik_identity([recipe]))
    path = output.with_name(f"{output.name}.journal")
    files = {output: recipe}
    journal = ExportJournal(path, key)
    names, checkpoint = HeaderNames(name), opened.checkpoint
    imatrix = None if weighted_by is None else weighted_by.imatrix
    # the export checks it too, but later: an error is to come before the line about quantizers
    tensors = opened.model.gguf_tensors(checkpoint.tensors)
    types = made_types(tensors, [recipe.tensor_types()])
    if imatrix is None:
        why = "none is given; compute one with `reap2gguf imatrix` and pass --imatrix"
        check_needed(recipe, (), why)
    check_imatrix(tensors, types, imatrix)
    by_expert = None  # a .dat file has all experts of a tensor in one row
    if weighted_by is not None:
        by_expert = fit(weighted_by.imatrix, shapes_of(tensors), weighted_by.file).imatrix
    check_minimum(recipe, by_expert, "" if weighted_by is None else weighted_by.file)
    weighted = () if imatrix is None else imatrix.entries.keys()
    note_blocks(checkpoint, [recipe], progress.note)
    note_quantizers([recipe], weighted, compute.device, progress)
    export_model(
        checkpoint,
        opened.model,
        names,
        files,
        weighted_by,
        compute.threads,
        progress,
        journal,
        device=compute.device,
        checked=compute.check_quants.share,
    )
    remove(path)


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
