"""Which stages of a build are done already, by the stages' own keys; nothing is computed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from reap2gguf.artifacts.texts import Texts
from reap2gguf.building.choose_stage import Choose, candidates_of, observations_of
from reap2gguf.building.choosing import known_choice
from reap2gguf.building.given_stage import GivenImportance
from reap2gguf.building.needs.amount import is_small
from reap2gguf.building.needs.estimate import ALL, Reused
from reap2gguf.building.stage import Run, Stage
from reap2gguf.building.stages import Export, Importance, Observe, Prune, ReadTexts, needed
from reap2gguf.building.standing import standing
from reap2gguf.building.verify_stage import Verify
from reap2gguf.building.workdir import Workdir
from reap2gguf.errors import Reap2ggufError
from reap2gguf.progress import Silent
from reap2gguf.pruning.view import PrunedView

if TYPE_CHECKING:
    from reap2gguf.building.plan import Plan

_BEFORE_EXPORT = 5  # stages


def find_reused(plan: Plan) -> Reused:
    """What an earlier build of this output left for a plan; small texts are read if they are not.

    What is damaged, or cannot be read, counts as not there: the build itself says so. Raises
    CalibrationError for small texts that a build would refuse.
    """
    try:
        return _find(plan)
    finally:
        plan.checkpoint.close()  # a plan holds no open files; a later read opens them again


def _find(plan: Plan) -> Reused:
    work = Workdir(plan.options.output, plan.name, plan.writes_hf)
    run = Run(plan, work, Silent(), ())
    if (finished := _in_finished_bundle(run)) is not None:
        return finished
    texts = ReadTexts(run) if plan.reads_texts else None
    found = _shared_texts(texts) if texts is not None and _may_reuse(run) else None
    is_there = found is not None
    if texts is not None:
        if found is None and is_small(plan):
            found = texts.read()
        if found is None:
            return Reused(written_bytes=work.written_bytes())
        texts.result = found = texts.divided(found)
    try:
        done = tuple(_done(run, texts)) if _may_reuse(run) else ()
    except (Reap2ggufError, OSError):
        done = ()
    return Reused((("texts",) if is_there else ()) + done, found, None, work.written_bytes())


def _in_finished_bundle(run: Run) -> Reused | None:
    """What a finished bundle of this name has already; None if there is none to extend."""
    found = standing(run.plan, run.keys, run.work)
    if found is None:
        return None
    written = sum(record.n_bytes for record in found.stay)
    written += 0 if found.manifest.hf is None else found.manifest.hf.n_bytes
    missing = frozenset(recipe.name for recipe in found.missing)
    # what is added is not measured with the rest
    stages = (*ALL[:_BEFORE_EXPORT], "evaluate") if missing else ALL
    return Reused(stages, None, missing, written, found.is_up_to_date)


def _may_reuse(run: Run) -> bool:
    return not run.plan.options.fresh and not run.work.is_fresh


def _shared_texts(stage: ReadTexts) -> Texts | None:
    try:
        stage.key = stage.make_key()
        return Texts.load(stage.path) if stage.path.is_file() else None
    except (Reap2ggufError, OSError):
        return None


def _done(run: Run, texts: ReadTexts | None) -> Iterator[str]:
    """The names of the stages after the texts that are done, up to the first whose key needs more
    than is there."""
    plan = run.plan
    observed = None
    if plan.observes:
        observed = Observe(run, needed(texts))
        if not _is_done(observed):
            return
        yield observed.name
    if plan.chooses:
        choose = Choose(run, needed(texts), candidates_of(plan, needed(texts), observed))
        if not _is_done(choose):
            return
        yield choose.name
        plan = run.settle(replace(plan, choice=choose.result))
    kept = known_choice(run, observations_of(plan, observed))
    if kept is None:
        return
    pruned = PrunedView(plan.checkpoint, plan.model, kept)
    if plan.writes_hf and _is_done(prune := Prune(run, pruned)):
        yield prune.name
    importance = (
        Importance(run, pruned, texts)
        if plan.imatrix is None
        else GivenImportance(run, pruned, texts, plan.imatrix)
    )
    export = Export(run, pruned, importance)
    stages: tuple[Stage[Any], ...] = (importance, export, Verify(run, pruned, export))
    for stage in stages:
        if _is_done(stage):
            yield stage.name


def _is_done(stage: Stage[Any]) -> bool:
    """Whether a stage was finished with these inputs and its outputs are there."""
    stage.key = stage.make_key()
    if not all(path.exists() and not path.is_symlink() for path in stage.outputs):
        return False
    return stage.is_shared or stage.run.marks.is_done(stage.name, stage.key)
