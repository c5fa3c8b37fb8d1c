"""The record of a finished build: manifest, cards and hashes in both folders."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reap2gguf import __version__
from reap2gguf.atomic import PART, remove, write_whole
from reap2gguf.bundle.card import gguf_card, hf_card
from reap2gguf.bundle.layout import CALIBRATION_FILE, CARD_FILE, MANIFEST_FILE, MODELFILE
from reap2gguf.bundle.manifest import (
    CalibrationRecord,
    FolderRecord,
    GgufRecord,
    Manifest,
    MtpRecord,
    PruningRecord,
    SideRecord,
    SourceRecord,
)
from reap2gguf.bundle.modelfile import modelfile
from reap2gguf.bundle.sums import hash_folder, write_sums
from reap2gguf.ggml import load_ggml

if TYPE_CHECKING:
    from reap2gguf.artifacts.observations import Observations
    from reap2gguf.artifacts.texts import ImatrixChunks, Texts
    from reap2gguf.building.plan import Plan
    from reap2gguf.building.workdir import Workdir
    from reap2gguf.models.description import SideFile
    from reap2gguf.pruning.select import Kept
    from reap2gguf.quantizing.resolve import ResolvedRecipe

_LIBRARIES = ("torch", "transformers", "safetensors", "gguf", "numpy", "tokenizers")


@dataclass(frozen=True)
class Evidence:
    """What the stages of a build found out, for its manifest and cards."""

    observations: Observations
    observations_sha256: str
    texts: Texts
    kept: Kept
    importance: Mapping[str, Any]  # facts of the importance matrix's sweep
    checks: Sequence[str]  # what was verified, one line each


def write_record(plan: Plan, work: Workdir, evidence: Evidence) -> Manifest:
    """Write cards, manifests and SHA256SUMS of a verified build; the manifest."""
    n_checks = len(evidence.checks)
    manifest = Manifest(
        name=plan.name,
        program=program_versions(),
        source=_source_record(plan, evidence.observations),
        pruning=_pruning_record(plan, evidence),
        calibration=_calibration_record(plan, evidence.observations, evidence.texts),
        hf=FolderRecord(
            folder=work.final_hf.name,
            n_shards=len(list(work.hf.glob("*.safetensors"))),
            n_parameters=plan.n_parameters,
            n_bytes=plan.hf_bytes,
            files={},
        ),
        gguf=tuple(_gguf_record(plan, recipe, work.gguf) for recipe in plan.recipes),
        side_files=tuple(_side_record(plan, side, work.gguf) for side in plan.side_files),
        verification={"summary": f"{n_checks} checks passed", "passed": list(evidence.checks)},
        caveats=plan.caveats,
    )
    return _write(plan, work, evidence.texts.chunks, manifest)


def _source_record(plan: Plan, observations: Observations) -> SourceRecord:
    return SourceRecord(
        label=plan.source.label,
        revision=plan.source.revision,
        fingerprint=observations.model_fingerprint,
        architecture=plan.model.facts.architecture,
        n_parameters=plan.checkpoint.n_parameters,
        n_bytes=plan.checkpoint.n_bytes,
    )


def _pruning_record(plan: Plan, evidence: Evidence) -> PruningRecord:
    observations = evidence.observations
    return PruningRecord(
        method=plan.options.method,
        n_experts=plan.target.n_experts,
        n_kept=plan.target.n_kept,
        experts_per_token=plan.model.facts.experts_per_token,
        kept=evidence.kept,
        observations_sha256=evidence.observations_sha256,
        n_rows=observations.n_rows,
        n_tokens=observations.n_tokens,
        n_dropped_rows=observations.n_dropped_rows,
        mtp=_mtp_record(plan, observations, int(evidence.importance["mtp_hits"])),
    )


def _mtp_record(plan: Plan, observations: Observations, mtp_hits: int) -> MtpRecord:
    if not plan.model.facts.has_mtp:
        return MtpRecord(plan.mtp)
    return MtpRecord(plan.mtp, observations.n_mtp_hits, mtp_hits, observations.n_mtp_tokens)


def _calibration_record(plan: Plan, observations: Observations, texts: Texts) -> CalibrationRecord:
    chunks = texts.chunks
    return CalibrationRecord(
        spec=observations.calibration,
        sha256=observations.calibration_sha256,
        max_length=plan.max_length,
        seed=plan.calibration.seed,
        packed=plan.calibration.pack,
        imatrix_text=chunks.label,
        imatrix_sha256=chunks.sha256,
        imatrix_chunks=len(chunks.chunks),
        imatrix_chunk_size=chunks.chunk_size,
        components=texts.rows.components,
    )


def _write(plan: Plan, work: Workdir, chunks: ImatrixChunks, manifest: Manifest) -> Manifest:
    source_card = plan.source.folder / CARD_FILE
    threads = plan.options.compute.threads
    # of interrupted attempts; and a manifest cannot hold its own hash
    for stale in (*work.hf.glob(f"*{PART}"), *work.gguf.glob(f"*{PART}")):
        remove(stale)
    remove(work.hf / MANIFEST_FILE)
    write_whole(work.hf / CARD_FILE, hf_card(manifest, source_card))
    files = hash_folder(work.hf, threads)
    manifest = replace(manifest, hf=replace(manifest.hf, files=files))
    manifest.save(work.hf)
    write_whole(work.gguf / CALIBRATION_FILE, chunks.text)
    write_whole(work.gguf / CARD_FILE, gguf_card(manifest, source_card))
    write_whole(work.gguf / MODELFILE, modelfile(manifest, plan.source.folder))
    manifest.save(work.gguf)
    write_sums(work.gguf, threads)
    return manifest


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
    ggml = load_ggml()
    found["ggml"] = f"{ggml.version} of a llama.cpp build" if ggml.is_own else ggml.version
    return found


def _own_commit() -> str | None:
    """The commit of this program, where pip installed it from a repository (PEP 610)."""
    try:
        record = distribution("reap2gguf").read_text("direct_url.json")
    except PackageNotFoundError:
        return None
    commit: str | None = json.loads(record or "{}").get("vcs_info", {}).get("commit_id")
    return commit


def _gguf_record(plan: Plan, recipe: ResolvedRecipe, folder: Path) -> GgufRecord:
    path = folder / plan.gguf_name(recipe)
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
    )


def _side_record(plan: Plan, side: SideFile, folder: Path) -> SideRecord:
    path = folder / plan.side_name(side)
    tensor_types = {name: tensor_type.name for name, tensor_type in side.tensor_types().items()}
    return SideRecord(path.name, side.title, path.stat().st_size, tensor_types)
