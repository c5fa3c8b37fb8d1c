"""Makes a bundle of what single commands made: observe, prune, imatrix and quantize.

    open -> compare with the source -> link -> record -> final names

Every file is verified before it is recorded: the safetensors byte for byte against the source, each
GGUF file against the weights that it was made from. Files get a second name in the bundle (a hard
link; a copy where there are none), and stay where they are. What nobody can know of them any more
is left out of cards and manifest. An interrupted call starts again; nothing half-written gets a
final name.

Memory: that of a verification, and of the importance matrix.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from reap2gguf.atomic import link_or_copy, remove
from reap2gguf.building.adopting import Adopted, adopt
from reap2gguf.building.bundle_files import BundleFiles
from reap2gguf.building.finished import Inputs
from reap2gguf.building.given import GivenImatrix, read_imatrix
from reap2gguf.building.naming import check_given_name
from reap2gguf.building.pruned_choice import Choice, method_of, observed, protected_in
from reap2gguf.building.record import (
    program_versions,
    side_record,
    with_given_imatrix,
    write_texts,
)
from reap2gguf.building.stage import BuildResult
from reap2gguf.building.workdir import Workdir
from reap2gguf.bundle.layout import (
    CALIBRATION_FILE,
    IMATRIX_FILE,
    KEPT_FILE,
    OBSERVATIONS_FILE,
    side_file,
)
from reap2gguf.bundle.manifest import (
    NO_METHOD,
    CalibrationRecord,
    FolderRecord,
    Manifest,
    MtpRecord,
    PruningRecord,
    SourceRecord,
    hash_file,
)
from reap2gguf.bundle.records import MergeRecord
from reap2gguf.bundle.sums import hash_folder
from reap2gguf.errors import (
    OutputError,
    UsageError,
    VerificationError,
)
from reap2gguf.exporting.header_facts import HeaderNames
from reap2gguf.exporting.model_files import export_side
from reap2gguf.files import is_own_file
from reap2gguf.gguf_files.imatrix import save_both
from reap2gguf.models.description import Dropped
from reap2gguf.models.side_values import side_files
from reap2gguf.models.table import describe
from reap2gguf.pruning.history import read_history
from reap2gguf.pruning.view import PrunedView
from reap2gguf.pruning.write import written_names
from reap2gguf.quantizing.labels import twice
from reap2gguf.tokenizer.check import check_tokenizer
from reap2gguf.verifying.changed import read_change
from reap2gguf.verifying.gguf_file import ExpectedGguf, check_side_file
from reap2gguf.verifying.hf_folder import check_pruned
from reap2gguf.verifying.opening import open_source
from reap2gguf.verifying.report import Level, passed_file, passed_folder, passed_summary

if TYPE_CHECKING:
    from reap2gguf.artifacts.observations import Observations
    from reap2gguf.building.bundle_options import BundleOptions
    from reap2gguf.models.contract import MoeModel
    from reap2gguf.models.description import SideFile
    from reap2gguf.progress import Progress
    from reap2gguf.pruning.select import Kept
    from reap2gguf.verifying.against_source import OpenSource

_TITLE = "made by `quantize`, or by another program"
_ADVICE = "no bundle was made"
_CHANGED = (
    "was changed by another program while it was taken over; run the same command again when "
    "nothing writes there"
)


@dataclass(frozen=True)
class _Parts:
    """What goes into a bundle, opened and compared."""

    source: OpenSource
    view: PrunedView  # of the source, with the experts that the folder keeps
    method: str
    protected: Kept  # experts that were kept whatever they scored
    is_pruned: bool
    seen: tuple[str, str, Observations] | None  # name and hash of the file
    imatrix: GivenImatrix | None
    text: Path | None


def bundle(options: BundleOptions, progress: Progress) -> BuildResult:
    """Verify what single commands made, and make a bundle of it.

    Raises UsageError if the folder is not one that `prune` wrote and not a model, or if a part of
    it is missing; ArtifactError if a part does not fit; VerificationError if a file does not hold
    what it should; OutputError if the bundle is there already or cannot be written.
    """
    name = options.name or Path(os.path.realpath(options.folder)).name
    check_given_name(name)
    with _opened(options, progress) as parts:
        work = Workdir(options.output, name, parts.is_pruned)
        with work.locked():
            if work.is_interrupted:
                work.finish_interrupted()
                if work.final_gguf.is_dir():
                    progress.note(f"{work.name}: finished what an interrupted command had begun")
                    return BuildResult.of(work, Manifest.load(work.final_gguf))
            work.finish_interrupted()
            _refuse_existing(work)
            return _bundle(options, parts, work.of_addition(), progress)


def _bundle(
    options: BundleOptions, parts: _Parts, work: Workdir, progress: Progress
) -> BuildResult:
    view, threads = parts.view, options.threads
    manifest = _manifest(parts, work.name)
    names = sorted(written_names(view)) if parts.is_pruned else []
    shards = {name: Path(os.path.realpath(options.folder / name)) for name in names}
    before = _times(shards.values())
    passed = []
    if parts.is_pruned:
        if violations := check_pruned(options.folder, view, progress, threads):
            raise VerificationError(violations, _ADVICE)
        passed.append(passed_folder(len(view.stored.tensors)))
    adopted = _adopted(options, manifest, view, progress)
    passed += [passed_file(a.record.file, len(a.record.tensors), Level.VALUES) for a in adopted]
    _place(parts, manifest, work, shards, adopted)
    sides = side_files(view.model, view)
    passed += _write_sides(sides, manifest, view, work, threads, progress)
    manifest = replace(
        manifest,
        gguf=tuple(one.record for one in adopted),
        side_files=tuple(side_record(work.name, side, work.gguf) for side in sides),
        verification={"summary": passed_summary(passed), "passed": passed},
    )
    files = BundleFiles(
        hash_folder(work.hf, threads) if work.has_hf else {}, hash_folder(work.gguf, threads)
    )
    _check_unchanged(files, adopted)
    if _times(shards.values()) != before:
        raise OutputError(f"{options.folder}: {_CHANGED}")
    manifest = write_texts(work, manifest, files, parts.source.source.folder)
    work.finalize(Inputs(""), [])
    return BuildResult.of(work, manifest)


def _place(
    parts: _Parts,
    manifest: Manifest,
    work: Workdir,
    shards: Mapping[str, Path],
    adopted: Sequence[Adopted],
) -> None:
    """Link everything that was given into empty folders of the bundle; `shards` by their names."""
    work.prepare_addition({"bundle": hashlib.sha256(manifest.text().encode()).hexdigest()})
    for made in (work.gguf, *([work.hf] if work.has_hf else [])):
        for stale in made.iterdir():
            remove(stale)
    for name, file in shards.items():
        link_or_copy(file, work.hf / name)
    for one in adopted:
        link_or_copy(Path(os.path.realpath(one.path)), work.gguf / one.record.file)
    if parts.text is not None:
        link_or_copy(parts.text, work.gguf / CALIBRATION_FILE)
    if parts.seen is not None:
        parts.seen[2].save(work.gguf / OBSERVATIONS_FILE)
    if parts.imatrix is not None:
        save_both(parts.imatrix.imatrix, work.gguf / IMATRIX_FILE)


def _refuse_existing(work: Workdir) -> None:
    for final in (work.final_gguf, *([work.final_hf] if work.has_hf else [])):
        if os.path.lexists(final):
            raise OutputError(
                f"{final}: exists already; pass another --name or --output, or move it away "
                "(`reap2gguf add` adds GGUF files to a bundle)"
            )


@contextmanager
def _opened(options: BundleOptions, progress: Progress) -> Iterator[_Parts]:
    """All parts; what does not fit is refused before anything is written."""
    is_pruned = is_own_file(options.folder / KEPT_FILE)
    if is_pruned and options.source is None:
        raise UsageError(
            f"{options.folder}: was pruned; pass --source with the model that it was made from: "
            "the safetensors are compared with it, and cards and manifest name it"
        )
    if not is_pruned and options.source is not None:
        raise UsageError(
            f"{options.folder}: has no {KEPT_FILE}, which says what experts of the source it "
            "keeps; leave out --source to bundle GGUF files of this model as it is"
        )
    change = read_change(options.folder) if is_pruned else None
    if change is not None:
        way = f"--method {change.method}" if isinstance(change, MergeRecord) else "--repair"
        raise UsageError(
            f"{options.folder}: its experts were {change.word}, which `bundle` cannot record; make "
            f"the bundle with `reap2gguf build {way}`"
        )
    model = options.source if options.source is not None else str(options.folder)
    with open_source(model, progress) as source:
        if is_pruned:
            found = source.pruned_by_record(options.folder)
            if found.view is None:
                raise VerificationError(list(found.violations), _ADVICE)
            view, method = found.view, method_of(options.folder)
        else:
            described = describe(source.checkpoint)
            ids = tuple(range(described.facts.n_experts))
            kept = dict.fromkeys(described.facts.moe_layers, ids)
            view, method = PrunedView(source.checkpoint, described, kept), NO_METHOD
        protected = protected_in(options.folder, view.kept) if is_pruned else {}
        seen = None
        if options.observations is not None:
            choice = Choice(view.kept, method, protected)
            facts = _source_model(source, view).facts
            seen = observed(options.observations, source.checkpoint, choice, facts)
        tensors = view.model.gguf_tensors(view.tensors)
        imatrix = None if options.imatrix is None else read_imatrix(options.imatrix, tensors)
        text = None if options.text is None else Path(os.path.realpath(options.text))
        yield _Parts(source, view, method, protected, is_pruned, seen, imatrix, text)


def _source_model(source: OpenSource, view: PrunedView) -> MoeModel:
    return describe(source.checkpoint, keep_mtp=view.model.facts.has_mtp)


def _manifest(parts: _Parts, name: str) -> Manifest:
    """The manifest as far as it is known before the files are in their places."""
    view, checkpoint = parts.view, parts.source.checkpoint
    model = _source_model(parts.source, view)
    stored_as = checkpoint.dequantized() if view.stored is view else checkpoint
    caveats = check_tokenizer(checkpoint.folder, model.facts.vocab_size, model.tokenizers)
    n_shards = sum(file.endswith(".safetensors") for file in written_names(view))
    folder = FolderRecord(name, n_shards, view.n_parameters, view.n_bytes, {})
    return Manifest(
        name=name,
        program=program_versions(),
        source=_source_record(parts, model),
        pruning=_pruning_record(parts, model),
        calibration=_calibration_record(parts),
        hf=folder if parts.is_pruned else None,
        gguf=(),
        caveats=(*stored_as.caveats, *model.caveats(), *caveats),
        has_observations=parts.seen is not None,
    )


def _source_record(parts: _Parts, model: MoeModel) -> SourceRecord:
    """Where the weights came from."""
    source, checkpoint = parts.source.source, parts.source.checkpoint
    history = read_history(checkpoint, model.facts, lambda line: None)
    kept = {layer: tuple(ids) for layer, ids in parts.view.kept.items()}
    return SourceRecord(
        source.label,
        source.revision,
        checkpoint.fingerprint(),
        model.facts.architecture,
        checkpoint.n_parameters,
        checkpoint.n_stored_bytes,
        None if history is None else history.after(kept),
    )


def _pruning_record(parts: _Parts, model: MoeModel) -> PruningRecord:
    """Which experts remain, and by what they were chosen, as far as that is known."""
    file, sha256, seen = parts.seen or (None, "", None)
    return PruningRecord(
        method=parts.method,
        n_experts=model.facts.n_experts,
        n_kept=parts.view.n_kept,
        experts_per_token=model.facts.experts_per_token,
        kept={layer: tuple(ids) for layer, ids in parts.view.kept.items()},
        observations_sha256=sha256,
        n_rows=0 if seen is None else seen.n_rows,
        n_tokens=0 if seen is None else seen.n_tokens,
        n_dropped_rows=0 if seen is None else seen.n_dropped_rows,
        mtp=_mtp_record(parts, model),
        observations_file=file,
        protected=parts.protected,
    )


def _mtp_record(parts: _Parts, model: MoeModel) -> MtpRecord:
    """What happened to a multi-token-prediction block."""
    if model.facts.has_mtp:
        state = "pruned" if parts.is_pruned else "kept"
        return MtpRecord(state, in_gguf=model.mtp_in_gguf)
    names = parts.source.checkpoint.tensors
    drops = any(isinstance(model.role(name), Dropped) for name in names)
    return MtpRecord("dropped" if drops else "none", in_gguf=model.mtp_in_gguf)


def _calibration_record(parts: _Parts) -> CalibrationRecord:
    """The texts of both passes, as far as they are known."""
    seen = None if parts.seen is None else parts.seen[2]
    found = CalibrationRecord(
        spec=None if seen is None else seen.calibration,
        sha256=None if seen is None else seen.calibration_sha256,
        max_length=None,
        seed=None,
        packed=None,
        imatrix_text=None,
        imatrix_sha256=None,
        imatrix_chunks=None,
        imatrix_chunk_size=None,
    )
    if parts.imatrix is not None:
        found = with_given_imatrix(found, parts.imatrix, parts.view.kept)
    if parts.text is not None:
        found = replace(found, imatrix_sha256=hash_file(parts.text).sha256)
    return found


def _adopted(
    options: BundleOptions, manifest: Manifest, view: PrunedView, progress: Progress
) -> list[Adopted]:
    """The GGUF files, each compared with the weights."""
    found = []
    for path in options.files:
        label = options.labels.get(str(path))
        one = adopt(path, label, manifest, (view, view.model), options.threads, progress)
        found.append(replace(one, record=replace(one.record, title=_TITLE)))
    if same := twice([one.record.label for one in found]):
        raise UsageError(
            f"two of the files have the label {' and '.join(map(repr, dict.fromkeys(same)))} and "
            "so the same name; give one of them another with --label FILE=LABEL"
        )
    return found


def _write_sides(
    sides: Sequence[SideFile],
    manifest: Manifest,
    view: PrunedView,
    work: Workdir,
    threads: int,
    progress: Progress,
) -> list[str]:
    """Write the model's other files, such as a vision projector; what was verified of them."""
    # headers say that there is one
    records = tuple(side_record(work.name, side) for side in sides)
    names = HeaderNames.of(replace(manifest, side_files=records))
    passed = []
    for side in sides:
        path = work.gguf / side_file(side.prefix, work.name)
        export_side(view, view.model, names, path, side, threads, progress)
        expected = ExpectedGguf(side.tensor_types(), names=names)
        source = view, view.model, [side]
        if violations := list(check_side_file(path, expected, source, threads, progress)):
            raise VerificationError(violations, _ADVICE)
        passed.append(passed_file(path.name, len(side.tensors), Level.EXACT))
    return passed


def _check_unchanged(files: BundleFiles, adopted: Sequence[Adopted]) -> None:
    """Raises OutputError for a GGUF file whose bytes are not those that were verified."""
    for one in adopted:
        if files.gguf[one.record.file] != one.sum:
            raise OutputError(f"{one.path}: {_CHANGED}")


def _times(files: Iterable[Path]) -> list[tuple[int, int]]:
    """Size and time of change of each file; none for one that is missing, which is a violation."""
    stats = [file.stat() for file in files if file.exists()]
    return [(stat.st_size, stat.st_mtime_ns) for stat in stats]
