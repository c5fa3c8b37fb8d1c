"""Adds GGUF files to a finished bundle: nothing is observed, pruned or swept again.

    what is there -> write the new files -> verify them -> link the rest -> record -> final names

The new files are made from the bundle's own safetensors and importance matrix, and are byte for
byte those that a build with all recipes would have made. Files that stay get a second name (a hard
link) in a new folder, which takes the old one's place when everything is verified. Until then the
finished bundle is whole; a kill while folders change names is made good by the next command.

Memory: that of an export (`exporting/gguf_export.py`).
"""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from reap2gguf import __version__
from reap2gguf.atomic import link_or_copy, remove
from reap2gguf.building.bundle_files import BundleFiles, check_bundle_files, recorded_files
from reap2gguf.building.finished import Inputs
from reap2gguf.building.keys import export_key, ik_identity
from reap2gguf.building.record import gguf_record, ik_versions, write_texts
from reap2gguf.building.seals import read_seals, seal, stamps, written_seals
from reap2gguf.building.stage import BuildResult, StageCost
from reap2gguf.bundle.layout import (
    CARD_FILE,
    IMATRIX_FILE,
    MANIFEST_FILE,
    MODELFILE,
    PICTURES,
    SUMS_FILE,
    model_file,
)
from reap2gguf.bundle.members import gguf_members
from reap2gguf.disk.hashing import Hashes
from reap2gguf.errors import OutputError, VerificationError
from reap2gguf.exporting.header_facts import HeaderNames
from reap2gguf.exporting.journal import ExportJournal
from reap2gguf.exporting.model_files import WeightedBy, export_model
from reap2gguf.exporting.quantizers import note_quantizers
from reap2gguf.ggml import load_ggml
from reap2gguf.gguf_files.imatrix import Imatrix, load_imatrix
from reap2gguf.machine import peak_bytes
from reap2gguf.quantizing.minimum import check_minimum
from reap2gguf.verifying.exactness import Exactness
from reap2gguf.verifying.gguf_file import ExpectedGguf, GgufCheck, check_ggufs
from reap2gguf.verifying.hf_folder import open_folder
from reap2gguf.verifying.report import Level, passed_file, passed_summary

if TYPE_CHECKING:
    from reap2gguf.building.adopting import Adopted
    from reap2gguf.building.workdir import Workdir
    from reap2gguf.bundle.evaluation import Evaluation
    from reap2gguf.bundle.manifest import GgufRecord, Manifest
    from reap2gguf.options import ComputeOptions
    from reap2gguf.progress import Progress
    from reap2gguf.quantizing.resolve import ResolvedRecipe
    from reap2gguf.verifying.context import Reference

_REWRITTEN = (CARD_FILE, MANIFEST_FILE, MODELFILE, SUMS_FILE, *PICTURES)
_CARD_BYTES = 2**22  # cards, pictures, manifests and marks
_ADVICE = "the bundle is as it was; run the command again, and report it if it happens twice"


@dataclass(frozen=True)
class Addition:
    """What to add to a finished bundle, and what of it stays."""

    work: Workdir  # of the addition
    manifest: Manifest  # of the bundle as it is
    recipes: Sequence[ResolvedRecipe] = ()  # of files to write
    adopted: Sequence[Adopted] = ()  # files that are there, and have been verified
    stay: Sequence[GgufRecord] = ()
    order: Sequence[str] = ()  # file names of the new bundle, as far as they have an order
    inputs: Inputs = field(default_factory=lambda: Inputs(""))  # of the new bundle
    exact: frozenset[str] = frozenset()  # names of recipes whose files are quantized again
    with_toml: frozenset[str] = frozenset()  # names of recipes that lie beside their files
    evaluation: Evaluation | None = None  # in place of the one in the manifest

    @property
    def new_names(self) -> set[str]:
        """The names of the files that are added."""
        written = {record_name(self.manifest, recipe) for recipe in self.recipes}
        return written | {one.record.file for one in self.adopted}


@dataclass
class _Run:
    """An addition that is running, and what it has cost."""

    addition: Addition
    reference: Reference
    compute: ComputeOptions
    progress: Progress
    costs: list[StageCost] = field(default_factory=list)

    @contextmanager
    def counted(self, name: str) -> Iterator[None]:
        """Keep what the work inside costs."""
        start = time.monotonic()
        yield
        seconds = round(time.monotonic() - start, 2)
        self.costs.append(StageCost(name, seconds, peak_bytes()))


def record_name(manifest: Manifest, recipe: ResolvedRecipe) -> str:
    """The file of a recipe in a bundle."""
    return model_file(manifest.name, recipe.label)


def extend(
    addition: Addition, reference: Reference, compute: ComputeOptions, progress: Progress
) -> BuildResult:
    """Add files to a bundle whose lock is held.

    `reference` is the weights of the bundle's model, and the model; of `compute` device, threads
    and `check_quants` count. An interrupted call resumes
    from the tensor that it had reached. Raises VerificationError if a file of the bundle is not as
    it was built or a new one is wrong, OutputError if the disk refuses; then the bundle is as it
    was.
    """
    work, manifest, threads = addition.work, addition.manifest, compute.threads
    run = _Run(addition, reference, compute, progress)
    adopted = [one.path for one in addition.adopted]
    check_bundle_files(work, manifest, addition.stay, adopted, threads, progress)
    work.prepare_addition({"bundle": _digest(manifest.text())})
    _check_room(addition)
    files = {work.gguf / record_name(manifest, recipe): recipe for recipe in addition.recipes}
    with run.counted("export"), Hashes() as hashes:
        _export(run, files, hashes)
        written = read_seals(written_seals(work.root, hashes))
    with run.counted("verify"):
        before = stamps(work.root, files)
        passed = _verify(run, files)
        sealed = seal(work.root, before, threads, progress, written)
    there = recorded_files(work, manifest)
    linked = {name: one for name, one in there.gguf.items() if name in _linked_gguf(addition)}
    new = {Path(name).name: one.record for name, one in sealed.items()}
    _link(addition, there)
    for one in addition.adopted:
        link_or_copy(one.path, work.gguf / one.record.file)
        new[one.record.file] = one.sum
        n_tensors = len(one.record.tensors)
        passed[one.record.file] = passed_file(one.record.file, n_tensors, Level.VALUES)
    of_hf = {name: one for name, one in there.hf.items() if name not in _REWRITTEN}
    records = BundleFiles(of_hf, linked | new)
    # of a bundle without safetensors, the reference is the source itself
    source = reference[0].folder if manifest.hf is None else work.final_hf
    manifest = write_texts(work, _manifest(addition, passed, files), records, source)
    work.finalize(addition.inputs, [asdict(cost) for cost in run.costs])
    return BuildResult.of(work, manifest, run.costs)


@contextmanager
def open_reference(manifest: Manifest, folder: Path) -> Iterator[Reference]:
    """A bundle's own safetensors. Raises VerificationError if they are not a model."""
    checkpoint, model, violations = open_folder(folder, manifest.pruning.n_kept)
    if checkpoint is None or model is None or violations:
        raise VerificationError(violations, "nothing was added; build the bundle again")
    with checkpoint:
        yield checkpoint, model


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _check_room(addition: Addition) -> None:
    """OutputError if the disk has no space for the new files."""
    work = addition.work
    there = sum(file.lstat().st_size for file in work.gguf.glob("*.gguf*"))
    needed = sum(recipe.n_bytes for recipe in addition.recipes) + _CARD_BYTES - there
    free = shutil.disk_usage(work.output).free
    if needed > free:
        raise OutputError(
            f"{work.output}: the new files need {needed:,} bytes, and {free:,} are free on that "
            "disk; free some space"
        )


def _export(run: _Run, files: Mapping[Path, ResolvedRecipe], hashes: Hashes) -> None:
    if not files:
        return
    addition, (weights, model) = run.addition, run.reference
    work, manifest = addition.work, addition.manifest
    recipes = [(recipe.name, recipe.label, recipe.source) for recipe in files.values()]
    key = export_key(manifest.text(), recipes, *ik_identity(files.values()))
    journal = ExportJournal(work.root / "export.json", key)
    names = HeaderNames.of(manifest, __version__)
    imatrix = _imatrix(addition)
    weighted_by = None if imatrix is None else WeightedBy(imatrix)
    compute = run.compute
    for recipe in files.values():
        check_minimum(recipe, imatrix, IMATRIX_FILE)
    weighted = () if imatrix is None else imatrix.entries.keys()
    note_quantizers(addition.recipes, weighted, compute.device, run.progress)
    export_model(
        weights,
        model,
        names,
        files,
        weighted_by,
        compute.threads,
        run.progress,
        journal,
        hashes,
        compute.device,
        compute.check_quants.share,
    )


def _imatrix(addition: Addition) -> Imatrix | None:
    """The bundle's own importance matrix, if it has one."""
    if not addition.manifest.has_imatrix:
        return None
    return load_imatrix(addition.work.final_gguf / IMATRIX_FILE)


def _verify(run: _Run, files: Mapping[Path, ResolvedRecipe]) -> dict[str, str]:
    """What was checked, by file. Raises VerificationError if a file is not as planned."""
    addition = run.addition
    passed: dict[str, str] = {}
    names = HeaderNames.of(addition.manifest, __version__)
    imatrix = _imatrix(addition) if files else None
    checks = []
    for path, recipe in files.items():
        is_exact = recipe.name in addition.exact
        exactness = Exactness(is_exact, imatrix, load_ggml().label)
        n_kept, file_type = addition.manifest.pruning.n_kept, recipe.llama_file_type.value
        expected = ExpectedGguf(recipe.tensor_types(), n_kept, file_type, names, recipe.name)
        checks.append(GgufCheck(path, expected, exactness))
        level = Level.EXACT if is_exact else Level.VALUES
        passed[path.name] = passed_file(path.name, len(recipe.table), level)
    compute = run.compute
    violations = check_ggufs(checks, run.reference, compute.threads, run.progress, compute.device)
    if violations:
        for path in files:
            remove(path)
        remove(addition.work.root / "export.json")
        raise VerificationError(violations, _ADVICE)
    return passed


def _linked_gguf(addition: Addition) -> set[str]:
    """The files of the GGUF folder that stay as they are."""
    stay = replace(addition.manifest, gguf=tuple(addition.stay))
    return gguf_members(stay) - set(_REWRITTEN)


def _link(addition: Addition, there: BundleFiles) -> None:
    """Give every file that stays its name in the folders that take the place of the old ones."""
    work = addition.work
    kept_gguf = _linked_gguf(addition)
    places = [(work.gguf, work.final_gguf, kept_gguf)]
    if work.has_hf:
        places.append((work.hf, work.final_hf, there.hf.keys() - set(_REWRITTEN)))
    for made, final, names in places:
        for stale in made.iterdir():
            if stale.name not in addition.new_names or made == work.hf:
                remove(stale)
        for name in names:
            link_or_copy(final / name, made / name)


def _manifest(
    addition: Addition, passed: Mapping[str, str], files: Mapping[Path, ResolvedRecipe]
) -> Manifest:
    """The manifest of the bundle with the new files."""
    old, work = addition.manifest, addition.work
    records = {record.file: record for record in addition.stay}
    for path, recipe in files.items():
        record = gguf_record(old.name, recipe, work.gguf, addition.with_toml)
        records[path.name] = replace(record, made_by=_versions(old, recipe))
    records |= {one.record.file: one.record for one in addition.adopted}
    ordered = [records.pop(name) for name in addition.order if name in records]
    gguf = (*ordered, *records.values())
    lines = _passed(old, gguf, passed)
    written_by = "" if old.program.get("reap2gguf") == __version__ else __version__
    verification = {"summary": passed_summary(lines), "passed": lines}
    evaluation = old.evaluation
    if addition.evaluation is not None:
        evaluation = addition.evaluation
    elif evaluation is not None:  # of a file that is replaced, it is not of the new one
        evaluation = evaluation.of_files([record.file for record in addition.stay])
    return replace(
        old,
        gguf=gguf,
        verification=verification,
        written_by=written_by,
        evaluation=evaluation,
    )


def _versions(manifest: Manifest, recipe: ResolvedRecipe) -> dict[str, str]:
    """The versions that write a file now, if they are others than those of the bundle."""
    now = {"reap2gguf": __version__, "ggml": load_ggml().label, **ik_versions([recipe])}
    return {name: found for name, found in now.items() if manifest.program.get(name) != found}


def _passed(old: Manifest, gguf: Sequence[GgufRecord], new: Mapping[str, str]) -> list[str]:
    """What was verified, a line for each file, in the order in which a build writes them."""
    before = [str(line) for line in old.verification.get("passed", ())]
    of_models = {record.file for record in old.gguf}
    lines = {line.partition(": ")[0]: line for line in before} | dict(new)
    first = [line for line in before[:1] if line.partition(": ")[0] not in of_models]
    sides = [lines[side.file] for side in old.side_files if side.file in lines]
    return [*first, *(lines[r.file] for r in gguf if r.file in lines), *sides]
