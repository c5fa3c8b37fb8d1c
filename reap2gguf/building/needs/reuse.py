"""Which stages of a build are done already, by the stages' own keys; nothing is computed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from reap2gguf.artifacts.texts import Texts
from reap2gguf.building.choose_stage import Choose, candidates_of
from reap2gguf.building.choosing import known_choice
from reap2gguf.building.fit_stage import Fit
from reap2gguf.building.given_stage import importance_of
from reap2gguf.building.merge_stage import Merge
from reap2gguf.building.needs.amount import is_small
from reap2gguf.building.needs.estimate import ALL, KnownCoverage, Reused
from reap2gguf.building.observed import observations_of
from reap2gguf.building.record import expert_tokens
from reap2gguf.building.repair_stage import Repair
from reap2gguf.building.stage import Run, Stage, needed
from reap2gguf.building.stages import Export, Importance, Observe, Prune
from reap2gguf.building.standing import standing
from reap2gguf.building.text_stage import ReadTexts
from reap2gguf.building.verify_stage import Verify
from reap2gguf.building.weigh_stage import Weigh, kept_by_count, known_budget, matrix_for
from reap2gguf.building.weighed import settled
from reap2gguf.building.workdir import Workdir
from reap2gguf.errors import Reap2ggufError
from reap2gguf.gguf_files.imatrix_coverage import layer_hits
from reap2gguf.progress import Silent
from reap2gguf.pruning.coverage import (
    coverage_record,
    importance_record,
    observed_notes,
    recorded_line,
    selection_notes,
)
from reap2gguf.pruning.view import PrunedView

if TYPE_CHECKING:
    from reap2gguf.artifacts.observations import Observations
    from reap2gguf.building.plan import Plan
    from reap2gguf.pruning.select import Kept

_BEFORE_EXPORT = ("texts", "observe", "weigh", "choose", "merge", "repair", "prune", "imatrix")


def find_reused(plan: Plan) -> Reused:
    """What an earlier build of this output left for a plan; small texts are read if they are not.

    What is damaged, or cannot be read, counts as not there: the build itself says so. Raises
    CalibrationError for small texts that a build would refuse.
    """
    run = Run(plan, Workdir(plan.options.output, plan.name, plan.writes_hf), Silent(), ())
    try:
        with run.held:
            return _find(run)
    finally:
        plan.checkpoint.close()  # a plan holds no open files; a later read opens them again


def _find(run: Run) -> Reused:
    plan, work = run.plan, run.work
    if (finished := _in_finished_bundle(run)) is not None:
        return finished
    texts = ReadTexts(run) if plan.reads_texts else None
    known = _given_coverage(run)
    found = _shared_texts(texts) if texts is not None and _may_reuse(run) else None
    is_there = found is not None
    if texts is not None:
        if found is None and is_small(plan):
            found = texts.read()
        if found is None:
            return Reused(written_bytes=work.written_bytes(), coverage=known)
        texts.result = found = texts.divided(found)
    done: list[str] = ["texts"] if is_there else []
    try:
        if _may_reuse(run):
            known = _add_done(run, texts, done, known)
    except (Reap2ggufError, OSError):
        # what is kept cannot be read: the build makes it again, and says why
        del done[is_there:]
    written = work.written_bytes()
    return Reused(tuple(done), found, None, written, coverage=known)


def _in_finished_bundle(run: Run) -> Reused | None:
    """What a finished bundle of this name has already; None if there is none to extend."""
    if (record := known_budget(run.plan, run.keys, run.work)) is not None:
        run.settle(settled(run.plan, record))
    found = standing(run.plan, run.keys, run.work)
    if found is None:
        return None
    written = sum(record.n_bytes for record in found.stay)
    written += 0 if found.manifest.hf is None else found.manifest.hf.n_bytes
    missing = frozenset(recipe.name for recipe in found.missing)
    # what is added is not measured with the rest
    done = tuple(name for name in ALL if name != "fit" or run.plan.sized is not None)
    stages = (*_BEFORE_EXPORT, "evaluate") if missing else done
    observed = found.manifest.pruning.coverage
    lines = () if observed is None else (recorded_line(observed),)
    known = KnownCoverage(observed, lines, found.manifest.calibration.imatrix_coverage)
    return Reused(stages, None, missing, written, found.is_up_to_date, known)


def _may_reuse(run: Run) -> bool:
    return not run.plan.options.fresh and not run.work.is_fresh


def _shared_texts(stage: ReadTexts) -> Texts | None:
    try:
        stage.key = stage.make_key()
        return Texts.load(stage.path) if stage.path.is_file() else None
    except (Reap2ggufError, OSError):
        return None  # the stage reads the texts again, and says what is wrong with them


def _add_done(
    run: Run, texts: ReadTexts | None, done: list[str], known: KnownCoverage
) -> KnownCoverage:
    """Add the names of the stages after the texts that are done, up to the first whose key needs
    more than is there; what is known of the tokens of experts then."""
    plan = run.plan
    observed = None
    if plan.observes:
        observed = Observe(run, needed(texts))
        if not _is_done(observed):
            return known
        done.append(observed.name)
    if plan.weighs:
        weigh = Weigh(run, observed, kept_by_count(plan, observed))
        if not _is_done(weigh):
            return _observed(observations_of(plan, observed), None)
        done.append(weigh.name)
        _ = needed(texts).result  # of this plan: the next one may read less
        matrix = partial(matrix_for, plan, observed)
        plan = run.settle(settled(plan, weigh.result, matrix))
    seen = observations_of(plan, observed) if plan.target.prunes else None
    if plan.chooses:
        choose = Choose(run, needed(texts), candidates_of(plan, needed(texts), observed))
        if not _is_done(choose):
            return _observed(seen, None)
        done.append(choose.name)
        plan = run.settle(replace(plan, choice=choose.result))
    merged = Merge(run, needed(texts)) if plan.merges else None
    if merged is not None:
        if not _is_done(merged):
            return known
        done.append(merged.name)
    kept = merged.result.view.kept if merged else known_choice(run, seen)
    known = replace(_observed(seen, kept), importance=known.importance)
    if kept is None:
        return known
    pruned = merged.result.view if merged else PrunedView(plan.checkpoint, plan.model, kept)
    if plan.repairs:
        if not _is_done(repaired := Repair(run, pruned, needed(texts))):
            return known
        done.append(repaired.name)
        pruned = repaired.result.view
    if plan.writes_hf and _is_done(prune := Prune(run, pruned)):
        done.append(prune.name)
    importance = importance_of(run, pruned, texts, observed)
    if plan.imatrix is not None:
        found = importance_record(layer_hits(plan.imatrix.of(kept)))
        known = replace(known, importance=found)
    done += _written(run, pruned, importance)
    if plan.imatrix is None and importance.name in done:
        known = replace(known, importance=importance_record(expert_tokens(importance.facts)))
    return known


def _written(run: Run, pruned: PrunedView, importance: Importance) -> Iterator[str]:
    """The importance matrix and the stages that need it, as far as they are done."""
    if _is_done(importance):
        yield importance.name
    export = Export(run, pruned, importance)
    if run.plan.sized is not None:
        fit = Fit(run, pruned, importance, export.names())
        if not _is_done(fit):
            return
        yield fit.name
        run.plan = run.plan.with_types(fit.result)
    stages: tuple[Stage[Any], ...] = (export, Verify(run, pruned, export))
    yield from (stage.name for stage in stages if _is_done(stage))


def _given_coverage(run: Run) -> KnownCoverage:
    """What given files say, before anything of an earlier run is looked at."""
    plan = run.plan
    seen = observations_of(plan, None)
    kept = None
    if (seen is not None or not plan.target.prunes) and not (plan.chooses or plan.weighs):
        kept = known_choice(run, seen)
    known = _observed(seen, kept)
    if plan.imatrix is not None and (kept is not None or plan.imatrix.cut_from is None):
        hits = layer_hits(plan.imatrix.of(kept or {}))
        known = replace(known, importance=importance_record(hits))
    return known


def _observed(seen: Observations | None, kept: Kept | None) -> KnownCoverage:
    """The tokens by which experts are ranked, and what they mean for the choice if it is known."""
    if seen is None:
        return KnownCoverage()
    if kept is None:
        return KnownCoverage(None, tuple(observed_notes(seen)))
    return KnownCoverage(coverage_record(seen, kept), tuple(selection_notes(seen, kept)))


def _is_done(stage: Stage[Any]) -> bool:
    """Whether a stage was finished with these inputs and its outputs are there."""
    stage.key = stage.make_key()
    if not all(path.exists() and not path.is_symlink() for path in stage.outputs):
        return False
    return stage.is_shared or stage.run.marks.is_done(stage.name, stage.key)
