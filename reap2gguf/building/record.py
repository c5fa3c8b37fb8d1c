"""The record of a finished build: manifest, cards and hashes in both folders."""

from __future__ import annotations

import json
import platform
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reap2gguf import __version__
from reap2gguf.artifacts.made_with import version
from reap2gguf.atomic import PART, remove, write_whole
from reap2gguf.building.bundle_files import BundleFiles
from reap2gguf.building.illustrate import draw_pictures
from reap2gguf.building.seals import Seal, refuse_changed
from reap2gguf.building.sliced_record import sliced_record
from reap2gguf.bundle.card import gguf_card, hf_card
from reap2gguf.bundle.layout import (
    CALIBRATION_FILE,
    CARD_FILE,
    HF_PICTURES,
    MANIFEST_FILE,
    MODELFILE,
    OBSERVATIONS_FILE,
    SUMS_FILE,
    model_file,
    side_file,
)
from reap2gguf.bundle.manifest import (
    CalibrationRecord,
    FileRecord,
    FolderRecord,
    GgufOrigin,
    GgufRecord,
    Manifest,
    MtpRecord,
    PruningRecord,
    SideRecord,
    SourceRecord,
    hash_file,
)
from reap2gguf.bundle.members import check_members, gguf_members, hf_members
from reap2gguf.bundle.modelfile import modelfile, with_join_commands
from reap2gguf.bundle.options_record import OptionsRecord
from reap2gguf.bundle.sums import compose_sums
from reap2gguf.errors import VerificationError
from reap2gguf.ggml import load_ggml
from reap2gguf.gguf_files.imatrix_coverage import layer_hits
from reap2gguf.pruning.coverage import coverage_record, importance_record
from reap2gguf.quantizing.ik.workers import PACKAGE, package_version
from reap2gguf.verifying.report import passed_summary

if TYPE_CHECKING:
    from reap2gguf.artifacts.observations import Observations
    from reap2gguf.artifacts.texts import Texts
    from reap2gguf.building.given import GivenImatrix
    from reap2gguf.building.plan import Plan
    from reap2gguf.building.workdir import Workdir
    from reap2gguf.bundle.evaluation import Evaluation
    from reap2gguf.bundle.records import MergeRecord, RepairRecord
    from reap2gguf.models.description import SideFile
    from reap2gguf.pruning.protection import ProtectedExperts
    from reap2gguf.pruning.select import Kept
    from reap2gguf.pruning.view import PrunedView
    from reap2gguf.quantizing.resolve import ResolvedRecipe

_LIBRARIES = ("torch", "transformers", "safetensors", "gguf", "numpy", "tokenizers")


@dataclass(frozen=True)
class Evidence:
    """What the stages of a build found out, for its manifest and cards."""

    observations: Observations | None  # None: all experts are kept
    observations_sha256: str
    texts: Texts
    kept: Kept
    protected: ProtectedExperts  # of these
    pruned: PrunedView  # of the source, with these experts
    importance: Mapping[str, Any]  # facts of the importance matrix's sweep
    checks: Sequence[str]  # what was verified, one line each
    seals: Mapping[str, Seal]  # the verified files, by path below the work folder
    made_with: Mapping[str, Mapping[str, str]]  # versions of libraries, by stage
    evaluation: Evaluation | None = None  # None: not measured
    repair: RepairRecord | None = None  # None: the kept experts are not fitted to anything
    merge: MergeRecord | None = None  # None: no experts became one
    given: GivenImatrix | None = None  # an importance matrix that no pass of its own made


def write_record(plan: Plan, work: Workdir, evidence: Evidence, written: PrunedView) -> Manifest:
    """Write cards, manifests and SHA256SUMS of a verified build; the manifest.

    `written` is the model with the experts that are kept: the plan counts with any, and experts may
    differ in their types.
    """
    passed = list(evidence.checks)
    manifest = Manifest(
        name=plan.name,
        program={**program_versions(), **ik_versions(plan.recipes)},
        source=_source_record(plan, evidence.kept),
        pruning=_pruning_record(plan, evidence),
        calibration=_calibration_record(plan, evidence),
        hf=_folder_record(work, evidence.pruned) if plan.writes_hf else None,
        gguf=_gguf_records(plan, work),
        side_files=tuple(side_record(plan.name, side, work.gguf) for side in plan.side_files),
        verification={"summary": passed_summary(passed), "passed": passed},
        caveats=plan.caveats,
        options=_options_record(plan),
        made_with=evidence.made_with,
        evaluation=evidence.evaluation,
        has_observations=evidence.observations is not None,
        choice=plan.choice,
        budget=plan.budget,
    )
    return _write(plan, work, evidence, manifest)


def _gguf_records(plan: Plan, work: Workdir) -> tuple[GgufRecord, ...]:
    if plan.slices:
        return (sliced_record(plan, work.gguf),)
    return tuple(
        gguf_record(plan.name, recipe, work.gguf, plan.with_toml) for recipe in plan.recipes
    )


def _folder_record(work: Workdir, written: PrunedView) -> FolderRecord:
    return FolderRecord(
        folder=work.final_hf.name,
        n_shards=len(list(work.hf.glob("*.safetensors"))),
        n_parameters=written.n_parameters,
        n_bytes=written.n_bytes,
        files={},
    )


def _source_record(plan: Plan, kept: Kept) -> SourceRecord:
    return SourceRecord(
        label=plan.source.label,
        revision=plan.source.revision,
        fingerprint=plan.checkpoint.fingerprint(),
        architecture=plan.model.facts.architecture,
        n_parameters=plan.checkpoint.n_parameters,
        n_bytes=plan.checkpoint.n_stored_bytes,
        earlier=None if plan.history is None else plan.history.after(kept),
        gguf=_gguf_origin(plan),
    )


def _gguf_origin(plan: Plan) -> GgufOrigin | None:
    """The file that was the source, and how much of it is left."""
    name = plan.source.gguf_name
    return GgufOrigin(name, plan.n_parameters) if name else None


def _pruning_record(plan: Plan, evidence: Evidence) -> PruningRecord:
    seen, merge = evidence.observations, evidence.merge
    return PruningRecord(
        method=plan.method,
        n_experts=plan.target.n_experts,
        n_kept=plan.target.n_kept,
        experts_per_token=plan.model.facts.experts_per_token,
        kept=evidence.kept,
        observations_sha256=evidence.observations_sha256,
        n_rows=merge.n_rows if merge else 0 if seen is None else seen.n_rows,
        n_tokens=merge.n_tokens if merge else 0 if seen is None else seen.n_tokens,
        n_dropped_rows=0 if seen is None else seen.n_dropped_rows,
        mtp=_mtp_record(plan, seen, evidence.importance),
        coverage=None if seen is None else coverage_record(seen, evidence.kept),
        observations_file=None if plan.observations is None else plan.observations.file,
        repair=evidence.repair,
        merge=merge,
        protected=evidence.protected.named,
        super_experts=evidence.protected.super_experts,
    )


def _mtp_record(plan: Plan, seen: Observations | None, importance: Mapping[str, Any]) -> MtpRecord:
    in_gguf = plan.model.mtp_in_gguf
    # a pass that was not made here has not asked it on the same rows
    is_asked = plan.observes or not plan.target.prunes
    if not plan.model.facts.has_mtp or not is_asked or not plan.computes_imatrix:
        return MtpRecord(plan.mtp, in_gguf=in_gguf)
    hits = int(importance["mtp_hits"])
    if seen is None:  # the same model before and after
        return MtpRecord(plan.mtp, hits, hits, int(importance["mtp_tokens"]), in_gguf)
    return MtpRecord(plan.mtp, seen.n_mtp_hits, hits, seen.n_mtp_tokens, in_gguf)


def _calibration_record(plan: Plan, evidence: Evidence) -> CalibrationRecord:
    texts, seen, given = evidence.texts, plan.observations, evidence.given
    rows, chunks = texts.rows, texts.chunks
    own = rows if seen is None else None  # the rows that ranked the experts, if that was done here
    record = CalibrationRecord(
        spec=own.label if own else seen.seen.calibration if seen else None,
        sha256=own.sha256 if own else seen.seen.calibration_sha256 if seen else None,
        max_length=plan.max_length if own else None,
        seed=plan.calibration.seed if own else None,
        packed=plan.calibration.pack if own else None,
        imatrix_text=None if chunks is None else chunks.label,
        imatrix_sha256=None if chunks is None else chunks.sha256,
        imatrix_chunks=None if chunks is None else len(chunks.chunks),
        imatrix_chunk_size=None if chunks is None else chunks.chunk_size,
        components=() if rows is None else rows.components,
        imatrix_text_chunks=0 if chunks is None else chunks.n_of_text,
        imatrix_unseen=int(evidence.importance.get("unseen_experts", 0)),  # none of a given matrix
        imatrix_coverage=importance_record(expert_tokens(evidence.importance)),
    )
    return record if given is None else with_given_imatrix(record, given, evidence.kept)


def expert_tokens(facts: Mapping[str, Any]) -> dict[int, Sequence[int]]:
    """The tokens that each expert saw, by layer, of the facts that the importance matrix's stage
    left: JSON, in which keys are texts. Empty where the stage did not know them."""
    found = facts.get("expert_tokens", {})
    return {int(layer): tuple(tokens) for layer, tokens in found.items()}


def with_given_imatrix(
    record: CalibrationRecord, given: GivenImatrix, kept: Kept
) -> CalibrationRecord:
    """The record of a calibration with what the file of an importance matrix says of itself."""
    imatrix = given.of(kept)
    return replace(
        record,
        imatrix_text=", ".join(given.imatrix.datasets),
        imatrix_chunks=given.imatrix.n_chunks,
        imatrix_chunk_size=given.imatrix.chunk_size,
        imatrix_file=given.file,
        imatrix_text_chunks=0,
        imatrix_unseen=sum(imatrix.unseen_experts().values()),
        imatrix_coverage=importance_record(layer_hits(imatrix)),
        imatrix_cut_from=given.cut_from,
    )


def _options_record(plan: Plan) -> OptionsRecord:
    """What `--like` takes over."""
    options, calibration = plan.options, plan.calibration
    text = options.imatrix_text
    return OptionsRecord(
        keep_experts=options.keep_experts,
        compression=options.ratio,
        name=options.name,
        method=options.method,
        mtp=options.mtp,
        kept=None if options.kept is None else options.kept.name,
        protect=options.protect,
        protect_super_experts=options.protect_super_experts,
        spec=calibration.label,
        samples=calibration.samples,
        max_length=calibration.max_length,
        seed=calibration.seed,
        pack=calibration.pack,
        observations=None if options.observations is None else options.observations.name,
        imatrix=None if options.imatrix is None else options.imatrix.name,
        imatrix_from=options.imatrix_from,
        imatrix_text=None if text is None else text.name,
        chunk=options.chunk,
        imatrix_chunks=options.imatrix_chunks,
        device=options.compute.likely_device,
        dtype=options.compute.likely_dtype,
        inputs=plan.inputs,
        dequantize=None if plan.checkpoint.decoding is None else options.dequantize,
        evaluate=options.evaluate,
        repair=options.repair,
        group_size=plan.group_size if plan.method == "ream" else None,
        candidates=",".join(plan.candidates) or None,
        choose_text=None if options.choose_text is None else options.choose_text.name,
    )


def _write(plan: Plan, work: Workdir, evidence: Evidence, manifest: Manifest) -> Manifest:
    """Write what is left of both folders; what was verified is not written and not hashed again."""
    # of interrupted attempts
    for stale in (*work.hf.glob(f"*{PART}"), *work.gguf.glob(f"*{PART}")):
        remove(stale)
    for made in (work.hf / CARD_FILE, work.hf / MANIFEST_FILE, work.gguf / SUMS_FILE):
        remove(made)
    if (chunks := evidence.texts.chunks) is not None:
        write_whole(work.gguf / CALIBRATION_FILE, chunks.text)
    files = BundleFiles(_sealed(work, work.hf, evidence), _sealed(work, work.gguf, evidence))
    if chunks is not None:
        files.gguf[CALIBRATION_FILE] = hash_file(work.gguf / CALIBRATION_FILE)
    if evidence.observations is not None:
        evidence.observations.save(work.gguf / OBSERVATIONS_FILE)
        files.gguf[OBSERVATIONS_FILE] = hash_file(work.gguf / OBSERVATIONS_FILE)
    return write_texts(work, manifest, files, plan.source.folder)


def write_texts(work: Workdir, manifest: Manifest, files: BundleFiles, source: Path) -> Manifest:
    """Write pictures, cards, manifests, Modelfile and SHA256SUMS around finished files.

    Returns the manifest. The pictures are drawn from the files in the GGUF folder. `source` is the
    folder whose card and generation config are inherited. Raises VerificationError for a file that
    is no part of the bundle.
    """
    source_card = source / CARD_FILE
    pictures = draw_pictures(manifest, work.gguf)
    manifest = replace(manifest, pictures=tuple(pictures))
    gguf_text = gguf_card(manifest, source_card)
    if manifest.hf is not None:
        made: dict[str, str | bytes] = {CARD_FILE: hf_card(manifest, source_card)}
        made |= {name: pictures[name] for name in HF_PICTURES if name in pictures}
        hf_files = {**files.hf, **_written(work.hf, made)}
        manifest = replace(manifest, hf=replace(manifest.hf, files=dict(sorted(hf_files.items()))))
        manifest.save(work.hf)
    texts: dict[str, str | bytes] = {
        CARD_FILE: gguf_text,
        MODELFILE: with_join_commands(modelfile(manifest, source), manifest.gguf),
        MANIFEST_FILE: manifest.text(),
    }
    texts |= {one.toml_file: one.recipe_source for one in manifest.gguf if one.has_toml}
    gguf_files = {**files.gguf, **_written(work.gguf, texts | pictures)}
    sums = compose_sums({name: file.sha256 for name, file in gguf_files.items()})
    write_whole(work.gguf / SUMS_FILE, sums)
    _refuse_strays(work, manifest)
    return manifest


def _written(folder: Path, contents: Mapping[str, str | bytes]) -> dict[str, FileRecord]:
    """Write small files; their records."""
    for name, content in contents.items():
        write_whole(folder / name, content)
    return {name: hash_file(folder / name) for name in contents}


def _sealed(work: Workdir, folder: Path, evidence: Evidence) -> dict[str, FileRecord]:
    """The verified files of a folder, by name. Raises OutputError for one that changed since."""
    sealed = {
        name: one for name, one in evidence.seals.items() if (work.root / name).parent == folder
    }
    refuse_changed(work.root, {name: (one.n_bytes, one.changed_ns) for name, one in sealed.items()})
    return {Path(name).name: one.record for name, one in sealed.items()}


def _refuse_strays(work: Workdir, manifest: Manifest) -> None:
    """Raises VerificationError for a file that another program has put into the work folder."""
    strays = [] if manifest.hf is None else [*check_members(work.hf, hf_members(manifest))]
    strays += check_members(work.gguf, gguf_members(manifest))
    if strays:
        raise VerificationError(strays, f"nothing was published; look into {work.root}")


def program_versions() -> dict[str, str]:
    """Versions of everything whose numbers may matter."""
    found = {"reap2gguf": __version__, "python": platform.python_version()}
    for library in _LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            found[library] = "missing"
    if commit := _own_commit():
        found["reap2gguf commit"] = commit
    found["ggml"] = load_ggml().label
    return found


def ik_versions(recipes: Iterable[ResolvedRecipe]) -> dict[str, str]:
    """The version of the package that makes types of ik_llama.cpp, if any recipe has some."""
    has_some = any(recipe.recipe.is_ik for recipe in recipes)
    return {PACKAGE: package_version()} if has_some else {}


def _own_commit() -> str | None:
    """The commit of this program, where pip installed it from a repository (PEP 610)."""
    try:
        record = distribution("reap2gguf").read_text("direct_url.json")
    except PackageNotFoundError:
        return None
    commit: str | None = json.loads(record or "{}").get("vcs_info", {}).get("commit_id")
    return commit


def gguf_record(
    name: str, recipe: ResolvedRecipe, folder: Path, with_toml: Collection[str] = ()
) -> GgufRecord:
    """The record of a file that was written to `folder` for the bundle `name`.

    `with_toml` are names of recipes that lie beside their files.
    """
    path = folder / model_file(name, recipe.label)
    return GgufRecord(
        file=path.name,
        recipe=recipe.name,
        title=recipe.title,
        label=recipe.label,
        file_type=recipe.file_type,
        recipe_source=recipe.source,
        n_bytes=path.stat().st_size,
        bits_per_weight=round(recipe.bits_per_weight, 4),
        tensors={name: tensor_type.name for name, tensor_type in recipe.tensor_types().items()},
        source_blocks=recipe.n_sliced,
        has_toml=recipe.name in with_toml,
    )


def side_record(name: str, side: SideFile, folder: Path | None = None) -> SideRecord:
    """The record of a side file of the bundle `name`; without its size if there is no folder."""
    file = side_file(side.prefix, name)
    n_bytes = 0 if folder is None else (folder / file).stat().st_size
    tensor_types = {tensor: one.name for tensor, one in side.tensor_types().items()}
    return SideRecord(file, side.title, n_bytes, tensor_types)
