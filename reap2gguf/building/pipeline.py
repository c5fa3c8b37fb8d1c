"""A build, from a checkpoint to a verified bundle: the table of contents of the program.

    plan -> texts -> observe -> prune -> imatrix -> export -> verify -> record

A build that keeps all experts has nothing to observe.

`stages.py` and `verify_stage.py` declare each stage, `stage.py` says how one is reused and resumed.
Nothing gets its final name before everything is verified. Started by torchrun, every process runs
this list; those that are not the first compute their share of both sweeps and leave after the
second.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reap2gguf.building.needs.room import check_device, check_room
from reap2gguf.building.plan import with_all_values
from reap2gguf.building.record import Evidence, write_record
from reap2gguf.building.stage import Run, Stage, StageCost
from reap2gguf.building.stages import Export, Importance, Observe, Prune, ReadTexts
from reap2gguf.building.verify_stage import Verify
from reap2gguf.building.workdir import Workdir
from reap2gguf.bundle.manifest import Manifest
from reap2gguf.machine import processes
from reap2gguf.progress import Progress, Silent
from reap2gguf.pruning.select import select_experts
from reap2gguf.pruning.view import PrunedView

if TYPE_CHECKING:
    from reap2gguf.building.plan import Plan
    from reap2gguf.pruning.select import Kept

STAGES: Sequence[type[Stage[Any]]] = (ReadTexts, Observe, Prune, Importance, Export, Verify)


@dataclass(frozen=True)
class BuildResult:
    """Where a finished build lies, and what it cost.

    `stages` is empty where the bundle was up to date and nothing was done.
    """

    hf_folder: Path
    gguf_folder: Path
    manifest: Manifest
    stages: Sequence[StageCost]


def build(plan: Plan, progress: Progress) -> BuildResult | None:
    """Run every stage of a plan and give the bundle its final names.

    Returns None in a process of torchrun that is not the first. Raises a Reap2ggufError, for
    example VerificationError, and then leaves no final name.
    """
    check_device(plan.options.compute)
    work = Workdir(plan.options.output, plan.name)
    if not processes().is_first:
        with plan.checkpoint:
            return _run_stages(Run(plan, work, Silent(), STAGES))
    with work.locked(), plan.checkpoint:
        run = Run(plan, work, progress, STAGES)
        run.prepare()
        return _run_stages(run)


def _run_stages(run: Run) -> BuildResult | None:
    """All stages in order; no other build of this name is running."""
    plan = run.plan
    if run.agree(lambda: run.work.is_finished(run.keys.inputs)):
        return _up_to_date(run) if run.is_first else None
    if run.is_first:  # the only one that writes files
        run.plan = plan = with_all_values(plan, run.progress.note)
    run.keeps_states = run.agree(lambda: check_room(plan, run.work, run.progress))

    texts = run.do(ReadTexts(run))
    observed = run.do(Observe(run, texts)) if plan.target.prunes else None
    kept = run.agree(lambda: _kept(plan, observed))
    pruned = PrunedView(plan.checkpoint, plan.model, kept)
    run.do(Prune(run, pruned))
    importance = run.do(Importance(run, pruned, texts))
    if not run.is_first:
        return None
    exported = run.do(Export(run, pruned, importance))
    verified = run.do(Verify(run, pruned, exported))

    evidence = Evidence(
        None if observed is None else observed.result,
        "" if observed is None else observed.sha256,
        texts.result,
        kept,
        importance.facts,
        verified.result.passed,
        {**importance.seals, **verified.result.seals},
    )
    manifest = write_record(plan, run.work, evidence)
    run.work.finalize(run.keys.inputs, [asdict(cost) for cost in run.costs])
    return BuildResult(run.work.final_hf, run.work.final_gguf, manifest, tuple(run.costs))


def _kept(plan: Plan, observed: Observe | None) -> Kept:
    """The experts that stay: the best ones, or all where nothing is pruned."""
    if observed is None:
        return dict.fromkeys(plan.model.facts.moe_layers, tuple(range(plan.target.n_kept)))
    return select_experts(observed.result, plan.method, plan.target, plan.model.facts)


def _up_to_date(run: Run) -> BuildResult:
    """The bundle is there already."""
    work = run.work
    run.progress.note(
        f"{work.name}: up to date; `reap2gguf verify` checks it, --fresh builds it from scratch"
    )
    return BuildResult(work.final_hf, work.final_gguf, Manifest.load(work.final_gguf), ())
