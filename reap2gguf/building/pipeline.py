"""A build, from a checkpoint to a verified bundle: the stages in order.

    plan -> texts -> observe -> prune -> imatrix -> export -> verify -> publish

Each stage hands files to the next and is skipped when it was done before with the same inputs; one
that was interrupted goes on from its last layer, shard or tensor. Nothing gets its final name
before everything is verified.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from reap2gguf.artifacts.observations import Observations
from reap2gguf.atomic import remove
from reap2gguf.building import checks, stages
from reap2gguf.building.marks import NOTHING
from reap2gguf.building.plan import Plan
from reap2gguf.building.record import write_bundle_files
from reap2gguf.building.running import Running, StageCost, tell_others
from reap2gguf.building.workdir import Workdir
from reap2gguf.bundle.manifest import Manifest, hash_file
from reap2gguf.calibration.rows import Row, Tokenizer
from reap2gguf.calibration.texts import ImatrixChunks, ObservationRows, Texts, read_texts
from reap2gguf.errors import VerificationError
from reap2gguf.exporting.journal import ExportJournal
from reap2gguf.gguf_files.imatrix import Imatrix, load_imatrix
from reap2gguf.progress import Progress, Silent
from reap2gguf.pruning.select import select_experts
from reap2gguf.pruning.view import PrunedView
from reap2gguf.pruning.write import write_pruned


@dataclass(frozen=True)
class BuildResult:
    """Where a finished build lies, and what it took to get there."""

    hf_folder: Path
    gguf_folder: Path
    manifest: Manifest
    stages: Sequence[StageCost]


def build(plan: Plan, progress: Progress) -> BuildResult:
    """Run every stage of a plan and give the bundle its final names.

    Raises a Reap2ggufError, VerificationError among them, and then leaves no final name.
    """
    work = Workdir(plan.options.output, plan.name)
    with work.locked(), plan.checkpoint:
        return _build_alone(Running(plan, work, progress))


def _build_alone(run: Running) -> BuildResult:
    """The stages; no other build of the name is at work."""
    plan, work = run.plan, run.work
    run.prepare()
    if work.is_finished(run.keys.inputs):
        return _nothing_to_do(run)
    run.check_room()
    texts = _texts(run)
    observations, observations_sha256 = _observe(run, texts.rows)
    kept = select_experts(observations, plan.options.method, plan.target, plan.model.facts)
    pruned = PrunedView(plan.checkpoint, plan.model, kept)
    key = _prune(run, pruned)
    probe = stages.mtp_probe(plan.model, texts.rows)
    imatrix, key = _imatrix(run, pruned, texts.chunks, probe, key)
    key = _export(run, pruned, imatrix, key)
    checked = _verify(run, pruned, key)
    mtp_hits = int(work.marks.found("imatrix")["mtp_hits"])
    manifest = write_bundle_files(
        plan, work, observations, observations_sha256, texts, kept, checked, mtp_hits
    )
    work.publish(run.keys.inputs, [asdict(cost) for cost in run.costs])
    return BuildResult(work.final_hf, work.final_gguf, manifest, tuple(run.costs))


def _nothing_to_do(run: Running) -> BuildResult:
    """The bundle is there already."""
    work = run.work
    tell_others(False)
    tell_others(False)
    run.progress.note(
        f"{work.name}: finished before with the same inputs, nothing to do; `reap2gguf verify` "
        "checks it, --fresh builds it anew"
    )
    return BuildResult(work.final_hf, work.final_gguf, Manifest.load(work.final_gguf), ())


def _texts(run: Running) -> Texts:
    """All text, tokenized: a text that is too short is known before the work begins."""
    path = run.work.texts(run.keys.texts)
    reused = path.is_file() and not run.work.must_be_anew("texts")
    with run.stage("texts", reused):
        if not reused:
            run.work.share(_tokenized(run).save, path)
            run.work.meet_demand("texts")
        return Texts.load(path)


def _tokenized(run: Running) -> Texts:
    plan, options = run.plan, run.plan.options
    return read_texts(
        Tokenizer(plan.source.folder), plan.calibration, plan.max_length, options.imatrix_text,
        run.keys.chunk, plan.model.facts.vocab_size, run.progress,
    )  # fmt: skip


def _texts_of_first(run: Running) -> Texts:
    """The texts that the first process has read before it speaks.

    On another machine their file may not be there; the same inputs make the same again.
    """
    path = run.work.texts(run.keys.texts)
    return Texts.load(path) if path.is_file() else _tokenized(run)


def _observe(run: Running, rows: ObservationRows) -> tuple[Observations, str]:
    """Saliency sums of the unpruned model, taken once for every ratio; and their file's hash."""
    plan = run.plan
    key = run.keys.observe(rows)
    path = run.work.observations(key)
    reused = path.is_file() and not run.work.must_be_anew("observations")
    tell_others(not reused)
    with run.stage("observe", reused):
        if not reused:
            compute = run.computing("observe", key)
            seen = stages.observe(plan.checkpoint, plan.model, rows, compute, run.progress)
            run.work.share(seen.save, path)
            run.work.meet_demand("observations")
        run.drop_states("observe")
        return Observations.load(path), hash_file(path).sha256


def follow(plan: Plan) -> None:
    """What a process other than the first does in a build: its share of both sweeps."""
    from reap2gguf.observing.compute.ranks import join

    work = Workdir(plan.options.output, plan.name)
    run = Running(plan, work, Silent())
    with plan.checkpoint:
        if join().tell(None):
            texts = _texts_of_first(run)
            compute = run.computing("observe", run.keys.observe(texts.rows))
            stages.observe(plan.checkpoint, plan.model, texts.rows, compute, run.progress)
        if word := join().tell(None):
            key, kept = word
            texts = _texts_of_first(run)
            probe = stages.mtp_probe(plan.model, texts.rows)
            pruned = PrunedView(plan.checkpoint, plan.model, kept)
            compute = run.computing("imatrix", key)
            stages.compute_imatrix(pruned, pruned.model, texts.chunks, compute, run.progress, probe)


def _prune(run: Running, pruned: PrunedView) -> str:
    """The pruned safetensors."""
    work = run.work
    key = run.keys.prune(pruned.kept)
    reused = work.is_done("prune", key)
    with run.stage("prune", reused):
        if not reused:
            work.begin("prune", key, work.hf)
            write_pruned(pruned, work.hf, run.progress)
            work.marks.finish("prune", key, {})
    return key


def _imatrix(
    run: Running,
    pruned: PrunedView,
    chunks: ImatrixChunks,
    probe: Sequence[Row],
    key: str,
) -> tuple[Imatrix, str]:
    """The importance matrix of the pruned model."""
    work = run.work
    key = run.keys.imatrix(key, chunks, probe)
    path = work.gguf / "imatrix.gguf"
    reused = work.is_done("imatrix", key)
    tell_others(False if reused else (key, pruned.kept))
    with run.stage("imatrix", reused):
        if not reused:
            work.begin("imatrix", key, work.gguf)
            compute = run.computing("imatrix", key)
            imatrix, report = stages.compute_imatrix(
                pruned, pruned.model, chunks, compute, run.progress, probe
            )
            stages.save_imatrix(imatrix, path)
            work.marks.finish("imatrix", key, {"mtp_hits": report.mtp_hits})
        run.drop_states("imatrix")
        return load_imatrix(path), key


def _export(run: Running, pruned: PrunedView, imatrix: Imatrix, key: str) -> str:
    """Every GGUF file, in one pass over the pruned model."""
    plan, work = run.plan, run.work
    key = run.keys.export(key)
    files = {work.gguf / plan.gguf_name(recipe): recipe for recipe in plan.recipes}
    made = [*files, *(work.gguf / plan.side_name(side) for side in plan.side_files)]
    reused = work.is_done("export", key) and all(path.is_file() for path in made)
    with run.stage("export", reused):
        if reused:
            return key
        _begin_export(work, key)
        extra = stages.header_values(
            plan.source.label, plan.options.method, plan.target.n_experts, pruned.kept
        )
        threads = plan.options.compute.threads
        journal = ExportJournal(work.root / "export.json", key)
        stages.export(
            pruned,
            pruned.model,
            plan.name,
            files,
            imatrix,
            extra,
            threads,
            run.progress,
            journal=journal,
        )
        for side in plan.side_files:
            path = work.gguf / plan.side_name(side)
            journal = ExportJournal(work.root / f"export-{side.prefix}.json", key)
            stages.export_side(pruned, plan.name, path, side, threads, run.progress, journal)
        work.marks.finish("export", key, {})
    return key


def _begin_export(work: Workdir, key: str) -> None:
    """Leave what an export with the same inputs has written, and nothing of another."""
    if not work.marks.was_begun("export", key):
        work.marks.begin("export", NOTHING)  # or a kill would leave half of it, as if done
        for file in work.gguf.iterdir():
            if file.name not in ("imatrix.gguf", "imatrix.dat"):
                remove(file)
    work.marks.begin("export", key)


def _verify(run: Running, pruned: PrunedView, key: str) -> list[str]:
    """Read everything back; VerificationError if anything is not as planned."""
    work = run.work
    reused = work.is_done("verify", key)
    with run.stage("verify", reused):
        if reused:
            return list(work.marks.found("verify")["passed"])
        work.marks.begin("verify", key)
        violations, passed = _violations(run, pruned)
        if violations:
            raise VerificationError(violations, "run it again, or with --fresh if it stays so")
        work.marks.finish("verify", key, {"passed": passed})
    return passed


def _violations(run: Running, pruned: PrunedView) -> tuple[list[str], list[str]]:
    """What is not as planned, and what was looked at."""
    plan, work = run.plan, run.work
    threads = plan.options.compute.threads
    violations = checks.verify_pruned(work.hf, pruned, run.progress)
    looked = [f"safetensors: {len(pruned.tensors)} tensors equal the source's, byte for byte"]
    for recipe in plan.recipes:
        path = work.gguf / plan.gguf_name(recipe)
        violations += checks.verify_gguf(path, recipe, pruned, pruned.model, threads, run.progress)
        looked.append(f"{path.name}: {len(recipe.table)} tensors by name, shape, type and value")
    for side in plan.side_files:
        path = work.gguf / plan.side_name(side)
        violations += checks.verify_side(path, side, pruned, threads, run.progress)
        looked.append(f"{path.name}: {len(side.tensors)} tensors by name, shape, type and value")
    return violations, looked
