"""A build, from a checkpoint to a verified bundle: the stages in order.

    plan -> texts -> observe -> prune -> imatrix -> export -> verify -> publish

Each stage hands files to the next and is skipped when it was done before with the same inputs.
Nothing gets its final name before everything is verified.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from reap2gguf import __version__, checks, stages
from reap2gguf.artifacts.imatrix import Imatrix, load_imatrix
from reap2gguf.artifacts.manifest import Manifest, StageRecord, hash_file
from reap2gguf.artifacts.observations import Observations
from reap2gguf.calibration.rows import Row, Tokenizer
from reap2gguf.calibration.texts import ImatrixChunks, ObservationRows, read_texts
from reap2gguf.checkpoint.checkpoint import Checkpoint
from reap2gguf.errors import VerificationError
from reap2gguf.memory import peak_bytes
from reap2gguf.models import MoeModel, describe
from reap2gguf.plan import Plan, estimate
from reap2gguf.processes import processes
from reap2gguf.progress import Progress, Silent
from reap2gguf.prune.select import Kept, select_experts
from reap2gguf.prune.write import companion_files, write_pruned
from reap2gguf.record import write_bundle_files
from reap2gguf.workdir import Workdir, stage_key


@dataclass(frozen=True)
class BuildResult:
    """Where a finished build lies."""

    hf_folder: Path
    gguf_folder: Path
    manifest: Manifest


@dataclass
class _Build:
    """A running build: the plan, its folders, and what the stages have cost so far."""

    plan: Plan
    work: Workdir
    progress: Progress
    records: list[StageRecord] = field(default_factory=list)

    @contextmanager
    def stage(self, name: str, reused: bool = False) -> Iterator[None]:
        if reused:
            self.progress.note(f"{name}: done before with the same inputs, reused")
        begun = time.monotonic()
        yield
        seconds = round(time.monotonic() - begun, 2)
        self.records.append(StageRecord(name, seconds, peak_bytes(), reused))


def build(plan: Plan, progress: Progress) -> BuildResult:
    """Run every stage of a plan and give the bundle its final names.

    Raises a Reap2ggufError, VerificationError among them, and then leaves no final name.
    """
    work = Workdir(plan.options.output, plan.name)
    with work.locked(), plan.checkpoint:
        return _build_alone(_Build(plan, work, progress))


def _build_alone(run: _Build) -> BuildResult:
    """The stages; no other build of the name is at work."""
    plan, work, options = run.plan, run.work, run.plan.options
    work.prepare(options.fresh)
    work.check_room(estimate(plan, has_gpu=False).disk_bytes)
    if replaced := work.earlier_files():
        run.progress.note(f"an earlier build of this name will be replaced: {', '.join(replaced)}")
    rows, chunks = _texts(run)
    observations, observations_file = _observe(run, rows)
    kept = select_experts(observations, options.method, plan.target, plan.model.facts)
    key = _prune(run, kept)
    with Checkpoint.open(work.hf) as pruned:
        model = describe(pruned)
        probe = stages.mtp_probe(plan.model, rows)
        imatrix, key = _imatrix(run, pruned, model, chunks, probe, key)
        _export(run, pruned, model, imatrix, kept, key)
        checked = _verify(run, pruned, model, kept)
    manifest = write_bundle_files(
        plan, work, observations, observations_file, chunks, kept, checked, run.records
    )
    work.publish()
    return BuildResult(work.final_hf, work.final_gguf, manifest)


def _texts(run: _Build) -> tuple[ObservationRows, ImatrixChunks]:
    """All text, tokenized: a text that is too short is known before the work begins."""
    plan, options = run.plan, run.plan.options
    chunk = min(options.chunk, plan.model.facts.context_length)
    with run.stage("texts"):
        tokenizer = Tokenizer(plan.source.folder)
        return read_texts(
            tokenizer, options.calibration, plan.max_length, options.imatrix_text, chunk,
            plan.model.facts.vocab_size,
        )  # fmt: skip


def _observe(run: _Build, rows: ObservationRows) -> tuple[Observations, Path]:
    """Saliency sums of the unpruned model, taken once for every ratio."""
    plan, options = run.plan, run.plan.options
    calibration, compute = options.calibration, options.compute
    key = stage_key(
        __version__, plan.checkpoint.fingerprint(), rows.sha256, plan.max_length,
        calibration.samples, calibration.seed, compute.device, compute.dtype, plan.mtp,
    )  # fmt: skip
    path = run.work.observations(key)
    reused = path.is_file() and not options.fresh
    _tell_others(not reused)
    with run.stage("observe", reused):
        if not reused:
            scratch = replace(compute, scratch=run.work.root)
            seen = stages.observe(plan.checkpoint, plan.model, rows, scratch, run.progress)
            seen.save(path)
        return Observations.load(path), path


def follow(plan: Plan) -> None:
    """What a process other than the first does in a build: its share of both sweeps."""
    from reap2gguf.observe.ranks import join

    work = Workdir(plan.options.output, plan.name)
    run = _Build(plan, work, Silent())
    compute = replace(plan.options.compute, scratch=work.root)
    with plan.checkpoint:
        rows, chunks = _texts(run)
        if join().tell(None):
            stages.observe(plan.checkpoint, plan.model, rows, compute, run.progress)
        if join().tell(None):
            probe = stages.mtp_probe(plan.model, rows)
            with Checkpoint.open(work.hf) as pruned:
                model = describe(pruned)
                stages.compute_imatrix(pruned, model, chunks, compute, run.progress, probe)


def _tell_others(is_needed: bool) -> None:
    """Say to the processes that follow whether the next sweep takes place."""
    if processes().size > 1:
        from reap2gguf.observe.ranks import join

        join().tell(is_needed)


def _prune(run: _Build, kept: Kept) -> str:
    """The pruned safetensors."""
    plan, work = run.plan, run.work
    companions = {f.name: hash_file(f).sha256 for f in companion_files(plan.source.folder)}
    key = stage_key(
        __version__, plan.checkpoint.fingerprint(), sorted(kept.items()), companions, plan.mtp
    )
    reused = work.is_done("prune", key)
    with run.stage("prune", reused):
        if not reused:
            work.begin("prune", work.hf)
            write_pruned(
                plan.checkpoint, plan.model, kept, plan.target.n_kept, work.hf, run.progress
            )
            work.mark_done("prune", key)
    return key


def _imatrix(
    run: _Build,
    pruned: Checkpoint,
    model: MoeModel,
    chunks: ImatrixChunks,
    probe: Sequence[Row],
    key: str,
) -> tuple[Imatrix, str]:
    """The importance matrix of the pruned model."""
    compute, work = run.plan.options.compute, run.work
    asked = [row.tolist() for row in probe]
    key = stage_key(
        key, chunks.tokens_sha256, chunks.chunk_size, asked, compute.device, compute.dtype
    )
    path = work.gguf / "imatrix.gguf"
    reused = work.is_done("imatrix", key)
    compute = replace(compute, scratch=work.root)
    _tell_others(not reused)
    with run.stage("imatrix", reused):
        if not reused:
            work.begin("imatrix", work.gguf)
            imatrix, report = stages.compute_imatrix(
                pruned, model, chunks, compute, run.progress, probe
            )
            work.mtp_hits = report.mtp_hits
            stages.save_imatrix(imatrix, path)
            work.mark_done("imatrix", key)
        return load_imatrix(path), key


def _export(
    run: _Build, pruned: Checkpoint, model: MoeModel, imatrix: Imatrix, kept: Kept, key: str
) -> None:
    """Every GGUF file, in one pass over the pruned safetensors."""
    plan, work = run.plan, run.work
    recipes = [recipe.recipe.source for recipe in plan.recipes]
    key = stage_key(key, plan.name, plan.source.label, plan.options.method, recipes)
    reused = work.is_done("export", key)
    with run.stage("export", reused):
        if reused:
            return
        for stale in work.gguf.iterdir():
            if stale.name not in ("imatrix.gguf", "imatrix.dat"):
                stale.unlink()
        extra = stages.header_values(
            plan.source.label, plan.options.method, plan.target.n_experts, kept
        )
        files = {work.gguf / plan.gguf_name(recipe): recipe for recipe in plan.recipes}
        threads = plan.options.compute.threads
        stages.export(pruned, model, plan.name, files, imatrix, extra, threads, run.progress)
        for side in plan.side_files:
            path = work.gguf / plan.side_name(side)
            stages.export_side(pruned, plan.name, path, side, threads, run.progress)
        work.mark_done("export", key)


def _verify(run: _Build, pruned: Checkpoint, model: MoeModel, kept: Kept) -> list[str]:
    """Read everything back; VerificationError if anything is not as planned."""
    plan, work = run.plan, run.work
    threads = plan.options.compute.threads
    expected = checks.expected_folder(plan.model, plan.checkpoint, kept, plan.target.n_kept)
    with run.stage("verify"):
        violations = checks.verify_pruned(pruned, model, expected, plan.checkpoint, run.progress)
        for recipe in plan.recipes:
            path = work.gguf / plan.gguf_name(recipe)
            violations += checks.verify_gguf(path, recipe, pruned, model, threads, run.progress)
        for side in plan.side_files:
            path = work.gguf / plan.side_name(side)
            violations += checks.verify_side(path, side, pruned, threads, run.progress)
    if violations:
        raise VerificationError(violations)
    return [
        f"safetensors: {len(expected.tensors or ())} tensors equal the source's, byte for byte",
        *(
            f"{plan.gguf_name(recipe)}: {len(recipe.table)} tensors by name, shape, type and value"
            for recipe in plan.recipes
        ),
        *(
            f"{plan.side_name(side)}: {len(side.tensors)} tensors by name, shape, type and value"
            for side in plan.side_files
        ),
    ]
