"""A build, from a checkpoint to a verified bundle: the table of contents of the program.

    plan -> texts -> observe -> weigh -> choose -> merge -> repair
      -> { prune, imatrix, export, verify } -> evaluate -> record

Stages in braces overlap: GGUF files are written layer by layer as their importance is known, beside
the safetensors, and each format is verified when it is written (`together.py`). With a target size,
`fit` chooses the types of a file between `imatrix` and `export`, and so the export waits.

A build has only the stages that its options ask for:

- `weigh` (`--compression auto`) weighs numbers of experts against bits for the size that was asked
  for, and the plan continues with the best one.
- `choose` (`--method auto`) measures which method of pruning costs least, and the plan continues
  with it.
- `merge` finds the experts that remain and merges the others into them; `repair` fits those that
  remain. What follows is then of the merged or repaired model.
- A build that keeps all experts has nothing to observe and nothing to prune: it writes GGUF files
  alone. One that ranks experts by their weights has nothing to observe.
- Given observations, and a given importance matrix, take the place of the stages that make them;
  with both, no text is read. With `--imatrix-from source`, `observe` takes the sums of the
  importance matrix, too.
- `evaluate` measures quality where that is asked for, or costs little.

`stages.py` and the files `*_stage.py` declare the stages, and `stage.py` says how one is reused and
resumed. Nothing gets its final name before everything is verified. Started by torchrun, every
process runs this list; those that are not the first compute their share of the sweeps and leave
after the importance matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from reap2gguf.building.choose_stage import Choose, choose_method
from reap2gguf.building.choosing import chosen_experts, protected_of
from reap2gguf.building.evaluate_stage import Evaluate
from reap2gguf.building.extending import extend_finished
from reap2gguf.building.fit_stage import Fit
from reap2gguf.building.given_stage import GivenImportance, importance_of
from reap2gguf.building.merge_stage import Merge
from reap2gguf.building.needs.room import check_device, check_room
from reap2gguf.building.needs.scoring import chunks_of
from reap2gguf.building.observed import observations_of, observations_sha256
from reap2gguf.building.plan_sides import with_all_values
from reap2gguf.building.record import Evidence, write_record
from reap2gguf.building.repair_stage import Repair
from reap2gguf.building.slice_stage import Slice
from reap2gguf.building.stage import BuildResult, Run, Stage, needed
from reap2gguf.building.stages import Export, Importance, Observe, Prune
from reap2gguf.building.standing import refuse_dropping, standing
from reap2gguf.building.text_stage import ReadTexts
from reap2gguf.building.together import do_after, do_together
from reap2gguf.building.unchanged import Hashing
from reap2gguf.building.verify_stage import Verify
from reap2gguf.building.weigh_stage import Weigh, known_budget, weigh_experts
from reap2gguf.building.weighed import settled
from reap2gguf.building.workdir import Workdir
from reap2gguf.exporting.quantizers import note_quantizers
from reap2gguf.fitting.probing import ProbedText
from reap2gguf.machine import processes
from reap2gguf.progress import Progress, Silent
from reap2gguf.pruning.coverage import selection_notes
from reap2gguf.pruning.protection import ProtectedExperts, protection_notes
from reap2gguf.pruning.view import PrunedView

if TYPE_CHECKING:
    from reap2gguf.artifacts.observations import Observations
    from reap2gguf.building.plan import Plan
    from reap2gguf.building.standing import Standing
    from reap2gguf.pruning.select import Kept

STAGES: Sequence[type[Stage[Any]]] = (
    *(ReadTexts, Observe, Weigh, Choose, Merge, Repair, Prune, Importance, Export, Verify),
    Evaluate,
)


def stages_of(plan: Plan) -> Sequence[type[Stage[Any]]]:
    """The stages of a build, in their order."""
    if plan.sized is None:
        return STAGES
    after = STAGES.index(Export)
    return (*STAGES[:after], Fit, *STAGES[after:])


def build(plan: Plan, progress: Progress) -> BuildResult | None:
    """Run every stage of a plan and give the bundle its final names.

    Returns None in a process of torchrun that is not the first. Raises a Reap2ggufError, for
    example VerificationError, and then leaves no final name.
    """
    check_device(plan.options.compute)
    work = Workdir(plan.options.output, plan.name, plan.writes_hf)
    if not processes().is_first:
        with plan.checkpoint:
            return _run_stages(Run(plan, work, Silent(), stages_of(plan)))
    with work.locked(), plan.checkpoint:
        run = Run(plan, work, progress, stages_of(plan))
        run.prepare()
        run.probe_text = partial(_probed_text, run)
        with run.held:
            return _run_stages(run)


@dataclass(frozen=True)
class _Made:
    """The model that is written, and the stages and figures that led to it."""

    texts: ReadTexts | None
    observed: Observe | None
    merged: Merge | None
    repaired: Repair | None
    seen: Observations | None  # None where experts are not ranked, or in a later process
    protected: ProtectedExperts
    view: PrunedView


def _run_stages(run: Run) -> BuildResult | None:
    """All stages in order; no other build of this name is running."""
    run.check_same_model()
    found = _standing(run) if run.is_first else None
    if run.agree(lambda: found is not None):
        run.dismiss()
        return None if found is None else extend_finished(run, found)
    _prepare(run)
    made = _smaller_model(run)
    plan, pruned = run.plan, made.view
    importance = importance_of(run, pruned, made.texts, made.observed)
    if isinstance(importance, GivenImportance):
        run.agree(importance.check_minimum)
    prune = Prune(run, pruned) if plan.writes_hf else None
    export = (Slice if plan.slices else Export)(run, pruned, importance)
    verify = Verify(run, pruned, export, prune)
    plan = _write_files(run, pruned, importance, prune, export, verify)
    if not run.is_first:
        return None
    n_chunks = chunks_of(plan, made.texts.result if made.texts else None)
    evaluate = run.do(Evaluate(run, pruned, export, verify, n_chunks)) if n_chunks else None
    manifest = write_record(
        plan, run.work, _evidence(plan, made, importance, verify, evaluate), pruned
    )
    run.work.finalize(run.keys.inputs, [asdict(cost) for cost in run.costs])
    return BuildResult.of(run.work, manifest, run.costs)


def _prepare(run: Run) -> None:
    """Check that there is room, and read what the plan needs of all values."""
    if run.is_first:  # the only one that writes files
        refuse_dropping(run.plan, run.work)
        run.plan = with_all_values(run.plan, run.progress.note)
    run.room = run.agree(lambda: check_room(run.plan, run.work, run.progress))
    if run.is_first:
        recipes, compute = run.plan.recipes, run.plan.options.compute
        note_quantizers(recipes, run.plan.weighted, compute.device, run.progress)


def _smaller_model(run: Run) -> _Made:
    """Find the experts that stay, and merge or repair them where that was asked for."""
    plan = run.plan
    texts = run.do(ReadTexts(run)) if plan.reads_texts else None
    observed = run.do(Observe(run, needed(texts))) if plan.observes else None
    if plan.weighs:
        plan = weigh_experts(run, texts, observed)
    if plan.chooses:
        plan = choose_method(run, needed(texts), observed)
    merged = run.do(Merge(run, needed(texts))) if plan.merges else None
    if merged is None:
        kept = run.agree(lambda: chosen_experts(run, observations_of(plan, observed)))
        view = PrunedView(plan.checkpoint, plan.model, kept)
    else:
        view = merged.result.view
    seen = observations_of(plan, observed) if run.is_first and plan.target.prunes else None
    protected = protected_of(plan, seen) if run.is_first else ProtectedExperts()
    if run.is_first:
        _note_choice(run, seen, view.kept, protected)
    repaired = run.do(Repair(run, view, needed(texts))) if plan.repairs else None
    if repaired is not None:
        view = repaired.result.view
    return _Made(texts, observed, merged, repaired, seen, protected, view)


def _evidence(
    plan: Plan,
    made: _Made,
    importance: Importance | GivenImportance,
    verify: Verify,
    evaluate: Evaluate | None,
) -> Evidence:
    """What the record says of how the files were made."""
    stages = made.texts, made.observed, made.merged, made.repaired, importance
    return Evidence(
        made.seen,
        observations_sha256(plan, made.observed) if plan.target.prunes else "",
        importance.texts,
        made.view.kept,
        made.protected,
        made.view,
        importance.facts,
        verify.result.passed,
        {**importance.seals, **verify.result.seals},
        {stage.name: stage.made_with() for stage in stages if stage},
        evaluation=evaluate.result if evaluate else None,
        repair=made.repaired.record if made.repaired else None,
        merge=made.merged.record if made.merged else None,
        given=importance.given if isinstance(importance, GivenImportance) else None,
    )


def _standing(run: Run) -> Standing | None:
    """The finished bundle that the build only has to extend, as `standing` finds it.

    Where its number of experts was weighed, the run continues with that number.
    """
    plan = run.plan
    if (record := known_budget(plan, run.keys, run.work)) is not None:
        run.work.has_hf = run.settle(settled(plan, record)).writes_hf
    hashing = Hashing(plan.options.compute.threads, run.progress)
    found = standing(run.plan, run.keys, run.work, hashing)
    if found is None and record is not None:  # it is not what it was: everything is done again
        run.work.has_hf = run.settle(plan).writes_hf
    return found


def _probed_text(run: Run) -> ProbedText:
    """The text that probes are measured on, where the other processes of torchrun have left.

    Raises CalibrationError.
    """
    from reap2gguf.evaluating.engine import evaluate_variants  # loads torch
    from reap2gguf.fitting.probe_text import probe_text

    options = replace(run.plan.options.compute, scratch=run.scratch)
    text = probe_text(run.plan.source.folder, run.plan.model.facts)
    return ProbedText(
        text.sha256,
        lambda variants, pairs: evaluate_variants(
            variants, text.rows, pairs, options, run.progress, alone=True
        ),
    )


def _note_choice(
    run: Run, seen: Observations | None, kept: Kept, protected: ProtectedExperts
) -> None:
    """Say by how many tokens the experts were chosen, and which ones stay whatever they score."""
    for line in (
        *(() if seen is None else selection_notes(seen, kept)),
        *protection_notes(protected, run.plan.options.protection),
    ):
        run.progress.note(line)


def _write_files(
    run: Run,
    pruned: PrunedView,
    importance: Importance | GivenImportance,
    prune: Prune | None,
    export: Export,
    verify: Verify,
) -> Plan:
    """Compute the importance matrix, write both formats and verify them; the plan with all types.

    Where a size was asked for, types are chosen with the whole matrix, so GGUF files wait for it.
    """
    plan, written = run.plan, [prune] if prune else []
    if plan.sized is None:
        do_together(run, importance, *written, export, verify)
        return plan
    do_together(run, importance, *written)
    if run.is_first:
        fit = run.do(Fit(run, pruned, importance, export.names()))
        run.plan = plan.with_types(fit.result)
        do_after(run, export, verify)
    return run.plan
