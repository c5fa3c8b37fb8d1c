"""The stage that divides a size between experts and bits: after the observation, before a choice.

Every number of experts is measured as a view of the source, on a text that nothing else of the
build reads, and its types are chosen for the size. Nothing is written but the record, so another
build of the same inputs makes the same choice.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from reap2gguf.artifacts.made_with import COMPUTING
from reap2gguf.atomic import write_whole
from reap2gguf.building.given import imatrix_of, read_imatrix
from reap2gguf.building.needs.scoring import CHUNK, WEIGHED_TOKENS
from reap2gguf.building.observed import observations_of, observations_sha256
from reap2gguf.building.stage import Run, Stage, needed
from reap2gguf.building.weighed import settled
from reap2gguf.bundle.budget import BudgetRecord, budget_of_json
from reap2gguf.bundle.manifest import Manifest
from reap2gguf.checkpoint.config import read_json
from reap2gguf.choosing.names import AUTO, criteria_of
from reap2gguf.errors import ArtifactError, UsageError
from reap2gguf.evaluating.texts import HELD_OUT, EvaluationText, cut_text, fitting_chunk, read_text
from reap2gguf.fitting.errors_table import Cache, Where
from reap2gguf.fitting.lines import budget_lines
from reap2gguf.fitting.trading import Source, Weighing
from reap2gguf.pruning.protection import protected_experts
from reap2gguf.pruning.select import Target, select_experts
from reap2gguf.quantizing.overrides import read_overrides
from reap2gguf.tokenizer.tokenizer import Tokenizer

if TYPE_CHECKING:
    from reap2gguf.building.given import GivenImatrix
    from reap2gguf.building.keys import BuildKeys
    from reap2gguf.building.plan import Plan
    from reap2gguf.building.stages import Observe
    from reap2gguf.building.text_stage import ReadTexts
    from reap2gguf.building.workdir import Workdir
    from reap2gguf.models.description import GgufTensor
    from reap2gguf.pruning.select import Kept

BUDGET_FILE = "budget.json"


class Weigh(Stage[BudgetRecord]):
    """Measures what pruning costs in one sweep, and predicts what quantizing costs."""

    name = "weigh"
    is_sweep = True
    libraries: ClassVar[Sequence[str]] = COMPUTING

    @classmethod
    def is_asked(cls, plan: Plan) -> bool:
        return bool(plan.counts)

    def __init__(self, run: Run, observed: Observe | None, kept: Mapping[int, Kept]) -> None:
        """`kept`: by number of experts, those that stay."""
        super().__init__(run)
        self._observed = observed
        self._kept = kept

    def make_key(self) -> str:
        plan = self.run.plan
        return self.run.keys.weigh(
            self._kept,
            observations_sha256(plan, self._observed),
            self._text.tokens_sha256,
        )

    @property
    def outputs(self) -> Sequence[Path]:
        return (self.run.work.root / BUDGET_FILE,)

    @cached_property
    def _text(self) -> EvaluationText:
        """The text that pruning is measured on. Raises CalibrationError."""
        plan, note = self.run.plan, self.run.progress.note
        given, facts = plan.options.choose_text, plan.model.facts
        label, content = read_text(HELD_OUT if given is None else str(given), note)
        size = fitting_chunk(CHUNK, facts.context_length, note)
        with closing(Tokenizer(plan.source.folder)) as tokenizer:
            n_chunks = WEIGHED_TOKENS // CHUNK
            return cut_text(label, content, tokenizer, facts.vocab_size, size, n_chunks)

    @property
    def _weighing(self) -> Weighing:
        plan = self.run.plan
        source = Source(
            plan.checkpoint,
            plan.model,
            plan.source.short_name,
            lambda tensors: matrix_for(plan, self._observed, tensors),
            read_overrides(plan.options.tensor_types),
            plan.history,
        )
        return Weighing(source, self._kept, needed(plan.options.target))

    def compute(self) -> Mapping[str, Any]:
        from reap2gguf.evaluating.engine import evaluate_variants  # loads torch

        run, plan, weighing = self.run, self.run.plan, self._weighing
        rows, options = self._text.rows, self.compute_options
        costs = weighing.costs(
            lambda variants, pairs: evaluate_variants(variants, rows, pairs, options, run.progress)
        )
        if not run.is_first:
            return {}
        compute = plan.options.compute
        where = Where(compute.device, compute.threads)
        record = BudgetRecord(
            needed(plan.options.target).words,
            ranking_method(plan),
            self._text.record.label,
            self._text.tokens_sha256,
            self._text.record.n_scored,
            tuple(weighing.weigh(costs, where, run.progress, self._cache)),
        )
        write_whole(self.outputs[0], json.dumps(asdict(record), indent=1) + "\n")
        return {}

    def _cache(self, count: int) -> Cache:
        """Where what was measured of a number of experts is kept, until the build is finished."""
        return Cache(self.run.work.root / f"weigh-{count}.json", f"{self.key}-{count}")

    def load(self) -> BudgetRecord:
        return budget_of_json(read_json(self.outputs[0]))


def ranking_method(plan: Plan) -> str:
    """The method that ranks the experts that are weighed: the first of those to choose from."""
    if plan.options.method == AUTO:
        return criteria_of(plan.candidates)[0]
    return plan.options.method


def matrix_for(plan: Plan, observed: Observe | None, tensors: Sequence[GgufTensor]) -> GivenImatrix:
    """The importance matrix of MODEL for the tensors of a view of it: a given one, or the sums of
    the observations. Raises ArtifactError as `imatrix_of` and `read_imatrix` do."""
    of = plan.model.facts.n_experts, plan.model.facts.mtp_layer
    if plan.options.imatrix is not None:
        return read_imatrix(plan.options.imatrix, tensors, *of)
    if observed is not None:
        return imatrix_of(observed.result, observed.sha256, str(observed.path), tensors, *of)
    given = needed(plan.observations)
    return imatrix_of(given.seen, given.sha256, str(plan.options.observations), tensors, *of)


def kept_by_count(plan: Plan, observed: Observe | None) -> dict[int, Kept]:
    """By number of experts, those that stay; numbers that cannot hold the protected are left out.

    Raises UsageError if none can.
    """
    seen, facts = needed(observations_of(plan, observed)), plan.model.facts
    method = ranking_method(plan)
    found: dict[int, Kept] = {}
    refusal: UsageError | None = None
    for count in plan.counts:
        target = Target(facts.n_experts, count)
        if not target.prunes:
            found[count] = dict.fromkeys(facts.moe_layers, tuple(range(count)))
            continue
        try:
            protected = protected_experts(plan.options.protection, seen, target, facts).all
        except UsageError as error:  # super experts are known only now
            refusal = error
            continue
        found[count] = select_experts(seen, method, target, facts, protected)
    if not found and refusal is not None:
        raise refusal
    return found


def weigh_experts(run: Run, texts: ReadTexts | None, observed: Observe | None) -> Plan:
    """The plan with the number of experts that loses least; the run goes on with it.

    All processes call this.
    """
    plan = run.plan
    if texts is not None:
        _ = texts.result  # of this plan: the next one may read less
    kept = run.agree(lambda: kept_by_count(plan, observed))
    stage = run.do(Weigh(run, observed, kept))
    record = run.agree(lambda: stage.result)
    for line in budget_lines(record.counts, record.n_scored):
        run.progress.note(line)
    best = record.best
    run.progress.note(
        f"weigh: {best.n_experts} of {plan.target.n_experts} experts stay, at "
        f"{needed(best.bits_per_weight):.2f} bits per weight"
    )
    if best.n_experts == plan.target.n_experts and plan.options.repair != "none":
        run.progress.note(
            f"--repair {plan.options.repair} is left out: all experts stay, so there is nothing to "
            "repair"
        )
    found = run.settle(settled(plan, record, lambda tensors: matrix_for(plan, observed, tensors)))
    if run.is_first and not found.writes_hf:
        run.work.keep_all()
    return found


def known_budget(plan: Plan, keys: BuildKeys, work: Workdir) -> BudgetRecord | None:
    """What a finished bundle of this name and of the same inputs was divided by, if it is there."""
    finished = None if plan.options.fresh else work.finished()
    if not plan.weighs or finished is None or finished.inputs.base != keys.inputs.base:
        return None
    try:
        return Manifest.load(work.final_gguf).budget
    except ArtifactError:
        return None
