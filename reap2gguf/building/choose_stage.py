"""The stage that chooses a method: after the observation, and before anything is pruned.

Candidates rank the same observations; each one's pruned model is measured as a view of the source,
on rows of the calibration that were held out and on a text of another domain. Nothing is written
but the record, so another build of the same inputs makes the same choice.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from reap2gguf.artifacts.made_with import COMPUTING
from reap2gguf.atomic import remove, write_whole
from reap2gguf.building.choosing import protected_of
from reap2gguf.building.keys import stage_key
from reap2gguf.building.observed import observations_of
from reap2gguf.building.repair_record import REPAIRED_CANDIDATE
from reap2gguf.building.stage import Run, Stage, needed
from reap2gguf.bundle.choice import ChoiceRecord, choice_of
from reap2gguf.checkpoint.config import read_json
from reap2gguf.choosing.candidates import kept_by
from reap2gguf.choosing.checks import check_unseen
from reap2gguf.choosing.lines import choice_lines
from reap2gguf.choosing.measure import Chooser
from reap2gguf.choosing.names import BEST_REPAIRED, criteria_of, split_name
from reap2gguf.choosing.repaired import why_not_repaired
from reap2gguf.choosing.texts import ONLY_HELD_OUT, MeasuredText, held_out_text, other_text
from reap2gguf.pruning.replaced import ReplacedView
from reap2gguf.repairing.limits import repaired_layers
from reap2gguf.repairing.record import RepairFolder
from reap2gguf.tokenizer.tokenizer import Tokenizer

if TYPE_CHECKING:
    from reap2gguf.artifacts.texts import ObservationRows
    from reap2gguf.building.plan import Plan
    from reap2gguf.building.stages import Observe
    from reap2gguf.building.text_stage import ReadTexts
    from reap2gguf.choosing.measure import Measurement
    from reap2gguf.evaluating.scores import Scores
    from reap2gguf.options import ComputeOptions
    from reap2gguf.pruning.select import Kept
    from reap2gguf.pruning.view import PrunedView

CHOICE_FILE = "choice.json"


class Choose(Stage[ChoiceRecord]):
    """Measures every candidate in one sweep, and takes the best."""

    name = "choose"
    is_sweep = True
    libraries: ClassVar[Sequence[str]] = COMPUTING

    @classmethod
    def is_asked(cls, plan: Plan) -> bool:
        return plan.chooses

    def __init__(self, run: Run, texts: ReadTexts, kept: Mapping[str, Kept]) -> None:
        """`kept`: by candidate, the experts that stay."""
        super().__init__(run)
        self._texts = texts
        self._kept = kept

    def make_key(self) -> str:
        texts = [text.sha256 for text in (self._held_out, self._other) if text is not None]
        repairs = self._rows.sha256 if BEST_REPAIRED in self.run.plan.candidates else ""
        return self.run.keys.choose(self._kept, texts, repairs)

    @property
    def path(self) -> Path:
        return self.run.work.root / CHOICE_FILE

    @property
    def outputs(self) -> Sequence[Path]:
        return (self.path,)

    @cached_property
    def _held_out(self) -> MeasuredText:
        """The rows that were held out."""
        texts = self._texts.result
        return held_out_text(self._rows.label, texts.held)

    @cached_property
    def _other(self) -> MeasuredText | None:
        """The text of another domain. Raises CalibrationError."""
        plan = self.run.plan
        facts = plan.model.facts
        with closing(Tokenizer(plan.source.folder)) as tokenizer:
            return other_text(
                plan.options.choose_text,
                plan.calibration,
                tokenizer,
                facts.vocab_size,
                facts.context_length,
            )

    def compute(self) -> Mapping[str, Any]:
        from reap2gguf.evaluating.engine import evaluate_variants  # loads torch

        run, plan, other = self.run, self.run.plan, self._other
        if other is None:
            run.progress.note(f"choose: {ONLY_HELD_OUT}")
        chooser = Chooser(plan.checkpoint, plan.model, self._kept, self._held_out, other)
        options = self.compute_options

        def evaluate(asked: Measurement) -> Scores:
            where = _of_variants(options, asked)
            return evaluate_variants(asked.variants, asked.rows, asked.pairs, where, run.progress)

        record, _ = chooser.choose(evaluate, self._repair if self._repairs() else None)
        if not split_name(record.chosen)[1] and run.is_first:
            remove(run.work.root / REPAIRED_CANDIDATE)
        if run.is_first:
            write_whole(self.path, json.dumps(asdict(record), indent=1, ensure_ascii=False) + "\n")
        return {}

    def load(self) -> ChoiceRecord:
        return choice_of(read_json(self.path))

    @property
    def _rows(self) -> ObservationRows:
        return needed(self._texts.result.rows)

    def _repairs(self) -> bool:
        """Whether the best candidate is repaired; a note says why not."""
        run, plan = self.run, self.run.plan
        if BEST_REPAIRED not in plan.candidates:
            return False
        if why := why_not_repaired(plan.checkpoint, plan.model, len(self._rows.rows)):
            run.progress.note(f"choose: {why}")
        return not why

    def _repair(self, view: PrunedView, stack: ExitStack) -> PrunedView:
        """The repaired model of a candidate. The stage `repair` takes over its files."""
        from reap2gguf.repairing.sweep import repair  # loads torch

        key, options = self.run.keys.repair(view, self._rows, "ridge"), self.compute_options
        if options.resume is not None:
            path = options.resume.path.with_name(f"{self.name}-repair.state")
            options = replace(options, resume=replace(options.resume, path=path, key=key))
        folder = RepairFolder(self.run.work.root / REPAIRED_CANDIDATE, key)
        repair(view, self._rows.rows, "ridge", folder, options, self.run.progress)
        stored = stack.enter_context(closing(folder.open(repaired_layers(view.model))))
        return ReplacedView(view, stored)


def _of_variants(options: ComputeOptions, asked: Measurement) -> ComputeOptions:
    """The options of one of several sweeps: each has states of its own variants."""
    if options.resume is None:
        return options
    key = stage_key(options.resume.key, [one.name for one in asked.variants])
    return replace(options, resume=replace(options.resume, key=key))


def choose_method(run: Run, texts: ReadTexts, observed: Observe | None) -> Plan:
    """The plan with the method that is best; the run continues with it. All processes call this."""
    kept = run.agree(lambda: candidates_of(run.plan, texts, observed))
    stage = run.do(Choose(run, texts, kept))
    record = run.agree(lambda: stage.result)
    for line in choice_lines(record):
        run.progress.note(line)
    return run.settle(replace(run.plan, choice=record))


def candidates_of(plan: Plan, texts: ReadTexts, observed: Observe | None) -> dict[str, Kept]:
    """By candidate, the experts that stay.

    Raises ArtifactError for given observations that may have read the rows that are held out.
    """
    seen, rows = needed(observations_of(plan, observed)), needed(texts.result.rows)
    if plan.observations is not None:
        check_unseen(seen, rows, plan.observations.file)
    protected = protected_of(plan, seen).all
    return kept_by(criteria_of(plan.candidates), seen, plan.target, plan.model.facts, protected)
