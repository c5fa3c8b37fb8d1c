"""Verifies a finished bundle: from its own files, and against the source where that is given."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from reap2gguf import __version__
from reap2gguf.bundle.layout import (
    CALIBRATION_FILE,
    CARD_FILE,
    HF_PICTURES,
    KEPT_FILE,
    MANIFEST_FILE,
    MODELFILE,
    OBSERVATIONS_FILE,
    gguf_name,
    is_hf_folder,
)
from reap2gguf.bundle.manifest import Manifest
from reap2gguf.bundle.members import check_members, hf_members, shown_name
from reap2gguf.bundle.sums import check_hf_hashes, folder_bytes
from reap2gguf.checkpoint.index import INDEX_NAME
from reap2gguf.errors import ArtifactError, UsageError, VerificationError
from reap2gguf.files import is_own_file
from reap2gguf.gguf_files.split import first_parts
from reap2gguf.messages import one_line
from reap2gguf.pruning.write import companion_files
from reap2gguf.verifying import changed
from reap2gguf.verifying.context import (
    Check,
    Opened,
    PrunedSource,
    Reference,
    Strictness,
)
from reap2gguf.verifying.exactness import Exactness
from reap2gguf.verifying.facts import (
    check_hf_facts,
    check_options,
    check_passed,
    check_recipe,
    check_record,
    check_side_records,
)
from reap2gguf.verifying.generated import (
    check_calibration_text,
    check_cards,
    check_modelfile,
    check_observations,
)
from reap2gguf.verifying.gguf_file import (
    ExpectedGguf,
    GgufCheck,
    check_gguf_header,
    values_or_error,
)
from reap2gguf.verifying.gguf_part import GgufPart, check_gguf_files
from reap2gguf.verifying.hf_folder import (
    check_folder,
    check_pruned,
    compare_files,
    compare_folder,
    open_folder,
)
from reap2gguf.verifying.report import Findings, Level, VerifyReport, ended_by_errors
from reap2gguf.verifying.shards import check_config_text, check_shards

if TYPE_CHECKING:
    from reap2gguf.bundle.manifest import FileRecord
    from reap2gguf.bundle.opening import OpenBundle
    from reap2gguf.checkpoint.checkpoint import Checkpoint
    from reap2gguf.models.contract import MoeModel
    from reap2gguf.progress import Progress
    from reap2gguf.pruning.view import PrunedView

_FROM_ITSELF = Strictness()
_NO_SOURCE = "not compared with the source: pass --source MODEL"


def verify_paths(
    paths: Sequence[Path],
    n_threads: int,
    progress: Progress,
    strictness: Strictness = _FROM_ITSELF,
) -> VerifyReport:
    """Verify a bundle folder, or a safetensors folder with GGUF files made from it.

    Raises UsageError if the paths are neither.
    """
    # os.path returns False where Path raises, for example for a name that is too long
    folders = [path for path in paths if os.path.isdir(path)]
    files = [path for path in paths if not os.path.isdir(path)]
    if missing := [path for path in files if not os.path.exists(path)]:
        raise UsageError(f"{missing[0]}: no such file or folder")
    if files and len(folders) == 1:
        return verify_pair(folders[0], files, n_threads, progress, strictness)
    if files or not folders:
        raise UsageError("pass a bundle folder, or a safetensors folder and its GGUF files")
    found = Findings()
    for folder in folders:
        is_bundle = is_own_file(folder / MANIFEST_FILE) or any(folder.glob("*.gguf"))
        if not is_bundle and not (folder / "config.json").is_file():
            raise UsageError(f"{folder}: neither a bundle nor a safetensors folder")
        if not is_bundle:
            found.add(verify_pair(folder, [], n_threads, progress, strictness))
        elif not _is_covered(folder, folders):
            found.add(verify_bundle(folder, n_threads, progress, strictness))
    return found.report()


def _is_covered(folder: Path, folders: Sequence[Path]) -> bool:
    """Whether a safetensors folder is verified with one of the others, its GGUF folder."""
    real = Path(os.path.realpath(folder))
    beside = real.with_name(gguf_name(real.name))
    return any(Path(os.path.realpath(other)) == beside for other in folders)


def verify_pair(
    folder: Path,
    files: Sequence[Path],
    n_threads: int,
    progress: Progress,
    strictness: Strictness = _FROM_ITSELF,
) -> VerifyReport:
    """Verify a safetensors folder, and GGUF files that must hold the same values."""
    found = Findings([folder.name, *(path.name for path in files)])
    with _opened_folder(folder) as (opened, violations):
        found.violations += violations
        expected = ExpectedGguf()
        if opened is not None:
            expected = ExpectedGguf(n_experts=opened[1].facts.n_experts)
            _check_pruned_folder(folder, opened, strictness, n_threads, progress, found)
        checks = [
            GgufCheck(path, expected, Exactness(strictness.is_exact)) for path in first_parts(files)
        ]
        if opened is None:
            for check in checks:
                found.violations += check_gguf_header(check.path, expected)
        else:
            how = n_threads, progress, strictness.device
            _check_pair(checks, files, opened, how, found)
    return found.report()


def _check_pair(
    checks: Sequence[GgufCheck],
    files: Sequence[Path],
    opened: Opened,
    how: tuple[int, Progress, str],
    found: Findings,
) -> None:
    """GGUF files without a manifest, against the safetensors; `files` are all of their parts.

    `how` is the number of threads, the progress and the device.
    """
    headers = [
        list(ended_by_errors(check.header_violations(opened), check.path.name)) for check in checks
    ]
    values = values_or_error(checks, opened, *how)
    for header, value in zip(headers, values, strict=True):
        found.violations += [*header, *value]
    exact = {path for check in checks if check.is_exact for path in check.files}
    unread = {path: check.unreadable for check in checks for path in check.files}
    found.not_checked += [f"{path.name}: {why}" for path, why in unread.items() if why]
    for path in (path for path in files if not unread.get(path)):
        found.reach(Level.EXACT if path in exact else Level.VALUES, [path])


def _check_pruned_folder(
    folder: Path,
    opened: Opened,
    strictness: Strictness,
    n_threads: int,
    progress: Progress,
    found: Findings,
) -> None:
    """A safetensors folder without a manifest: with the source, if its record is there."""
    shards = opened[0].shards
    found.reach(Level.NOTHING, shards)
    change, source = changed.take_recorded(folder, opened, found), strictness.source
    if source is None:
        found.take(check_folder(*opened, progress, n_threads), folder.name)
        found.not_checked.append(_NO_SOURCE)
        return
    if not is_own_file(folder / KEPT_FILE):
        raise UsageError(
            f"{folder}: has neither {MANIFEST_FILE} nor {KEPT_FILE}, which say what experts of the "
            "source it keeps; leave out --source"
        )
    pruned = source.pruned_by_record(folder)
    found.violations += pruned.violations
    view = pruned.view
    if view is not None and change is not None:
        view = changed.with_changed(view, change, opened[0])
    if view is not None:
        found.violations += check_pruned(folder, view, progress, n_threads)
        found.reach(Level.EXACT, shards)


def verify_bundle(
    folder: Path, n_threads: int, progress: Progress, strictness: Strictness = _FROM_ITSELF
) -> VerifyReport:
    """Verify a folder that `build` made; for a GGUF folder, also the safetensors beside it."""
    folder = Path(os.path.realpath(folder))
    try:
        manifest = Manifest.load(folder)
    except ArtifactError as error:
        return VerifyReport((folder.name,), (str(error),))
    check = Check(manifest, strictness, n_threads, progress)
    if manifest.hf is None:
        _check_both(check, None, folder)
    elif is_hf_folder(folder, manifest.hf.folder):
        _check_both(check, folder, None)
    else:
        hf = folder.parent / manifest.hf.folder
        beside = folder.with_name(folder.name.removesuffix(gguf_name("")))
        if not hf.is_dir() and beside != folder and is_own_file(beside / MANIFEST_FILE):
            hf = beside  # both folders were renamed
        _check_both(check, hf if hf.is_dir() else None, folder)
    return check.found.report()


def check_bundle(bundle: OpenBundle, n_threads: int, progress: Progress) -> None:
    """Check before a push what `verify` checks, values apart: the build has compared those.

    Raises VerificationError with all violations.
    """
    check = Check(bundle.manifest, Strictness(reads_values=False), n_threads, progress)
    _check_both(check, bundle.hf, bundle.gguf)
    if violations := check.found.report().violations:
        raise VerificationError(
            list(violations), "nothing was uploaded; fix that, or build the bundle again"
        )


def _check_both(check: Check, hf: Path | None, gguf: Path | None) -> None:
    """Check the folders of a bundle that are there."""
    found = check.found
    found.checked += [folder.name for folder in (gguf, hf) if folder is not None]
    check.take(check_record(check.manifest), MANIFEST_FILE)
    if check.manifest.hf is None:
        check.take(check_passed(check.manifest, None), MANIFEST_FILE)
    is_sound = not found.violations  # only then can anything be made from it again
    if gguf is not None:
        check.take(check_gguf_files(check, gguf), gguf.name)
    if hf is not None:
        check.take(_check_hf_files(check, hf), hf.name)
    pruned = _pruned_source(check)
    with _opened(hf) as (opened, violations):
        found.violations += violations
        if opened is not None:
            check.take(_check_hf_contents(check, opened, pruned.view), opened[0].folder.name)
        reference: Reference | None = opened
        change = check.manifest.pruning.change
        if reference is None and change is not None:
            found.not_checked.append(changed.needs_folder(change))
        elif reference is None and pruned.view is not None:
            reference = (pruned.view, pruned.view.model)
        if reference is not None:
            _check_plan(check, reference)
        if gguf is not None:
            GgufPart(check, gguf, reference, is_sound).run()
    source = None if pruned.view is None else pruned.view.folder
    if is_sound:
        _check_generated(check, hf, gguf, source)
    else:
        found.not_checked.append("cards and Modelfile not compared: the manifest is not sound")
    check.take(check_options(check.manifest), MANIFEST_FILE)
    check.take(changed.check_option(check.manifest), MANIFEST_FILE)
    _say_what_is_missing(check, hf, gguf, reference)


def _hf_files(check: Check) -> Mapping[str, FileRecord]:
    hf = check.manifest.hf
    return {} if hf is None else hf.files


def _check_hf_files(check: Check, folder: Path) -> Iterator[str]:
    """Violations in the names and hashes of the folder's files."""
    manifest, members, files = check.manifest, hf_members(check.manifest), _hf_files(check)
    if folder.is_symlink():
        yield f"{folder.name}: is a link, expected the folder beside {gguf_name(folder.name)}"
    try:
        if Manifest.load(folder) != manifest:
            yield f"{folder.name}: {MANIFEST_FILE} differs from that of the GGUF folder"
    except ArtifactError as error:
        yield str(error)
    for name in sorted(files.keys() - members):
        yield f"{MANIFEST_FILE}: hf.files names {shown_name(name)}, which no build writes"
    yield from check_members(folder, members)
    title = f"Verifying hashes of {folder.name}"
    with check.progress.task(title, folder_bytes(folder), "bytes") as task:
        yield from check_hf_hashes(folder, manifest, check.n_threads, task.advance)
    check.found.reach(Level.HASHES, (folder / name for name in files))


def _check_hf_contents(check: Check, opened: Opened, view: PrunedView | None) -> Iterator[str]:
    """Violations in what an opened folder holds; `view` is what it must be, if that is known."""
    checkpoint, model = opened
    yield from check_hf_facts(check.manifest, checkpoint, model)
    yield from check_shards(checkpoint)
    yield from check_config_text(checkpoint)
    change, reads_values = check.manifest.pruning.change, check.strictness.reads_values
    if change is not None:
        yield from changed.check_changed(change, checkpoint, model, reads_values)
    if not reads_values:
        return
    if change is not None:
        check.found.not_checked.append(changed.not_repeated(change))
        view = None if view is None else changed.with_changed(view, change, checkpoint)
    if view is None:
        yield from check_folder(checkpoint, model, check.progress, check.n_threads)
    else:
        yield from _compare_with_source(check, checkpoint, model, view)


def _compare_with_source(
    check: Check, checkpoint: Checkpoint, model: MoeModel, view: PrunedView
) -> Iterator[str]:
    """Violations against the source: config, every byte of the weights, and the copied files."""
    folder, listed = checkpoint.folder, _hf_files(check).keys()
    yield from compare_folder(checkpoint, view, model, check.progress, check.n_threads)
    copies = companion_files(view.folder)
    yield from compare_files(folder, copies)
    names = {file.name for file in copies} | {shard.name for shard in checkpoint.shards}
    names |= {"config.json", INDEX_NAME}
    for name in sorted(listed - names - {CARD_FILE, *HF_PICTURES}):
        yield f"{folder.name}: {shown_name(name)} is not a file of the source"
    check.found.reach(Level.EXACT, (folder / name for name in names & listed))


def _pruned_source(check: Check) -> PrunedSource:
    """What the bundle must hold, if the source is given."""
    source = check.strictness.source
    if source is None:
        return PrunedSource(None, ())
    pruned = source.pruned(check.manifest)
    check.found.violations += pruned.violations
    check.found.not_checked += pruned.not_checked
    return pruned


@contextmanager
def _opened_folder(folder: Path) -> Iterator[tuple[Opened | None, list[str]]]:
    """A safetensors folder with its model, None if it cannot be read; and the violations."""
    checkpoint, model, violations = open_folder(folder)
    if checkpoint is None:
        yield None, violations
        return
    with checkpoint:
        yield None if model is None else (checkpoint, model), violations


@contextmanager
def _opened(hf: Path | None) -> Iterator[tuple[Opened | None, list[str]]]:
    if hf is None:
        yield None, []
        return
    with _opened_folder(hf) as opened:
        yield opened


def _check_plan(check: Check, reference: Reference) -> None:
    """What the plan of the build follows from: recipes, applied again, and side files."""
    manifest, (weights, model) = check.manifest, reference
    for record in manifest.gguf:
        check.take(check_recipe(record, weights, model, manifest.has_imatrix), record.file)
    sides = check_side_records(manifest, weights, model)
    check.take(sides, MANIFEST_FILE)


def _check_generated(check: Check, hf: Path | None, gguf: Path | None, source: Path | None) -> None:
    """The texts that are made from the manifest, and the text whose hash it has."""
    manifest, found = check.manifest, check.found
    if gguf is not None and is_own_file(gguf / CALIBRATION_FILE):
        check.take(check_calibration_text(manifest, gguf / CALIBRATION_FILE), gguf.name)
    if gguf is not None and manifest.has_observations and is_own_file(gguf / OBSERVATIONS_FILE):
        check.take(check_observations(manifest, gguf / OBSERVATIONS_FILE), gguf.name)
    version = manifest.card_version
    if version != __version__:
        found.not_checked.append(
            f"cards and Modelfile not compared: made by reap2gguf {version}, this is {__version__}"
        )
        return
    made = list(check_cards(manifest, hf, gguf, source))
    if gguf is not None and is_own_file(gguf / MODELFILE):
        made.append(check_modelfile(manifest, gguf / MODELFILE, hf if source is None else source))
    for one in made:
        found.violations += one.violations
        if one.is_whole and not one.violations:
            found.reach(Level.EXACT, [one.path])


def _say_what_is_missing(
    check: Check, hf: Path | None, gguf: Path | None, reference: Reference | None
) -> None:
    """What could not be checked, and why."""
    say, manifest = check.found.not_checked.append, check.manifest
    if gguf is None and hf is not None:
        say(f"GGUF files not checked: pass {gguf_name(hf.name)} to check both folders")
    if hf is None and manifest.hf is not None:
        say(f"safetensors not checked: the folder {manifest.hf.folder} is not there")
    if reference is None and check.strictness.reads_values:
        why = "the safetensors are " + ("not beside it" if hf is None else "not readable")
        if manifest.hf is None:
            name = one_line(manifest.source.name)
            why = f"the bundle has none of its own; pass --source {name}"
        say(f"values not compared: {why}")
        say(f"recipes not applied again: {why}")
    if check.strictness.source is None:
        say(_NO_SOURCE)
        say("licence and language in the cards not compared: they are of the source's own card")
        if hf is None and gguf is not None:
            say(f"parameters in {MODELFILE} not compared: they are of generation_config.json")
