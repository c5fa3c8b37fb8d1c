"""Experts against bits: what a budget loses with each number of experts that stays.

The damage has two parts, both in nats per token. What pruning costs is the mean KL divergence of
the pruned model from its source, measured on a text; all numbers of experts go through the layers
in one sweep, as views of the source. What quantizing costs is predicted: the errors of the types
that the solver chooses, each times how much it counts: by `sensitivity.py`, whose weights are KL
divergences of a small model, or as `probing.py` measures it on the source, with all its experts
(bench/RESULTS.md compares predictions with measurements). The parts are added, as if neither
changed what the other does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

from reap2gguf.bundle.budget import CountRecord
from reap2gguf.errors import UsageError
from reap2gguf.evaluating.figures import divergence
from reap2gguf.evaluating.variants import Variant
from reap2gguf.exporting.row_ranges import BlockMaker
from reap2gguf.fitting.errors_table import measure
from reap2gguf.fitting.fitted import Named, Problem, fit, fixed_types, tensor_bytes
from reap2gguf.fitting.probing import PROBE_TYPES
from reap2gguf.fitting.solving import HEADER_ROOM, TooSmall, budget_of, either, planned_header
from reap2gguf.fitting.target import SizeTarget, rounded_down
from reap2gguf.pruning.select import choose_target
from reap2gguf.pruning.view import PrunedView
from reap2gguf.quantizing.quantizer import load_quantizer

if TYPE_CHECKING:
    from reap2gguf.building.given import GivenImatrix
    from reap2gguf.checkpoint.weights import Weights
    from reap2gguf.evaluating.scores import Pair, Scores
    from reap2gguf.fitting.errors_table import Cache, Errors, Where
    from reap2gguf.fitting.probing import Probing
    from reap2gguf.fitting.solving import Budget
    from reap2gguf.gguf_files.imatrix import Imatrix
    from reap2gguf.models.contract import MoeModel
    from reap2gguf.models.description import GgufTensor
    from reap2gguf.progress import Progress
    from reap2gguf.pruning.history import History
    from reap2gguf.pruning.select import Kept
    from reap2gguf.quantizing.recipe import Rule

# what variants give, and how far pairs of their names are apart
Evaluates = Callable[[Sequence[Variant], Sequence["Pair"]], "Scores"]
Costs = Mapping[int, tuple[float, float]]  # by number of experts, KL divergence and its error
CacheOf = Callable[[int], "Cache"]  # where the errors are kept that hold for a number of experts
Probes = Callable[["GivenImatrix"], "Probing"]  # by the source's own importance matrix


@dataclass(frozen=True)
class Source:
    """A model before pruning, and what is known of it."""

    weights: Weights
    model: MoeModel
    name: str
    # the importance matrix of this model, for the tensors of a view of it
    matrix: Callable[[Sequence[GgufTensor]], GivenImatrix]
    overrides: tuple[Rule, ...] = ()  # of tensors whose types are no choice
    history: History | None = None  # what was pruned of it before

    def view(self, kept: Kept) -> PrunedView:
        return PrunedView(self.weights, self.model, kept)

    def problem(self, weights: Weights, model: MoeModel) -> Problem:
        """The choice of types of this model, or of a view of it."""
        tensors, facts = model.gguf_tensors(weights.tensors), model.facts
        problem = Problem(tensors, facts, facts.n_experts, model.weighted_matrices())
        return replace(problem, fixed=fixed_types(self.overrides, problem))


@dataclass(frozen=True)
class Weighing:
    """Numbers of experts, mapped to the experts that stay, for one target."""

    source: Source
    choices: Mapping[int, Kept]
    target: SizeTarget

    @cached_property
    def views(self) -> Mapping[int, PrunedView]:
        """The model with each number of experts."""
        return {count: self.source.view(kept) for count, kept in self.choices.items()}

    @cached_property
    def _problems(self) -> Mapping[int, _Problem]:
        """The choice of types with each number of experts."""
        target = size_target(self.target, self.source)
        return {n: _Problem.of(self.source, view, target) for n, view in self.views.items()}

    def check(self) -> None:
        """Raise UsageError if none fits the target, before anything is measured."""
        refusals = {n: one.refusal for n, one in self._problems.items() if one.refusal is not None}
        if len(refusals) == len(self._problems):
            fewest = min(refusals, key=lambda count: refusals[count].n_bytes)
            raise UsageError(self._too_small(fewest, refusals[fewest]))

    def _too_small(self, count: int, refusal: TooSmall) -> str:
        """What is said of a target that even this number of experts does not meet."""
        facts = self.source.model.facts
        ways = [f"pass at least {refusal.least}", *refusal.others]
        try:
            choose_target(facts, count - facts.n_groups, None)
        except UsageError:
            pass  # the model needs them
        else:
            ways.append(
                "fewer experts by --keep-experts, for a build in place of --compression auto"
            )
        return (
            f"with {count} of {facts.n_experts} experts, the fewest that are weighed, "
            f"{refusal.found}; {either(ways)}"
        )

    @property
    def fitting(self) -> list[int]:
        """The numbers of experts for which there are types that fit."""
        return [count for count, one in self._problems.items() if not one.refusal]

    def costs(self, evaluate: Evaluates) -> Costs:
        """Mean KL divergence of each view from the source, and its standard error.

        What evaluates is passed in, since it loads torch. Raises what it raises.
        """
        source = self.source
        n_all = source.model.facts.n_experts
        pruned = {count: view for count, view in self.views.items() if count < n_all}
        costs = {n_all: (0.0, 0.0)}
        if not pruned:
            return costs
        variants = [Variant("source", "source", source.weights, source.model, 0, 16.0)]
        variants += [
            Variant(str(count), "pruned", view, view.model, 0, 16.0)
            for count, view in pruned.items()
        ]
        pairs = [("source", str(count)) for count in pruned]
        scores = evaluate(variants, pairs)
        for count in pruned:
            mean = divergence(scores.pair("source", str(count))).mean
            costs[count] = mean.value, mean.error
        return costs

    def weigh(
        self,
        costs: Costs,
        where: Where,
        progress: Progress,
        cache_of: CacheOf | None = None,
        probes: Probes | None = None,
    ) -> list[CountRecord]:
        """The damage of each number of experts; `probes` measure how much an error in each tensor
        counts, on the source, which is by the table without them.

        Raises ArtifactError for an imatrix of another model, and what measuring errors raises.
        """
        n_all = self.source.model.facts.n_experts
        weights: Mapping[str, float] | None = None
        whole: Errors = {}  # of all experts
        if probes is not None:
            weights, whole = self._measured(probes, where, progress)
        shared: Errors = {}  # of tensors without experts, which all numbers have
        found = []
        for count, problem in self._problems.items():
            refusal = "" if problem.refusal is None else str(problem.refusal)
            record = CountRecord(count, *costs[count], problem=refusal)
            if not refusal:
                known = {**shared, **whole} if count == n_all else shared
                cache = None if cache_of is None else cache_of(count)
                errors = problem.errors(known, where, progress, cache)
                record = problem.solved(record, errors, weights)
                shared = problem.shared(errors)
            found.append(record)
        return found

    def _measured(
        self, probes: Probes, where: Where, progress: Progress
    ) -> tuple[Mapping[str, float], Errors]:
        """The weight of each tensor's error in the source, and errors of its types in probes."""
        source = self.source
        problem = source.problem(source.weights, source.model)
        imatrix = source.matrix(problem.tensors)
        problem = replace(problem, weighted=imatrix.imatrix.entries)
        host = BlockMaker(source.weights, load_quantizer(0), imatrix.imatrix.entries)
        errors = measure(host, problem.to_measure(), PROBE_TYPES, where, progress, {})
        return probes(imatrix).sensitivities(problem, errors, progress), errors


def size_target(target: SizeTarget, source: Source) -> SizeTarget:
    """The target as a size that all numbers of experts share.

    Bits per weight are those of the model with all its experts: per weight that stays, fewer
    experts would save bytes and gain nothing.
    """
    if target.bpw is None:
        return target
    model = source.model
    problem = source.problem(source.weights, model)
    view = source.view(dict.fromkeys(model.facts.moe_layers, tuple(range(model.facts.n_experts))))
    header = planned_header(view, source.name, source.history) - HEADER_ROOM
    return SizeTarget(size=rounded_down(header + int(target.bpw * problem.n_weights / 8)))


@dataclass(frozen=True)
class _Problem:
    """The choice of types for one number of experts."""

    view: PrunedView
    problem: Problem
    target: SizeTarget
    source: Source
    header: int
    refusal: TooSmall | None = None  # why no types are small enough

    @classmethod
    def of(cls, source: Source, view: PrunedView, target: SizeTarget) -> _Problem:
        """The problem, with what is known from headers."""
        problem = source.problem(view, view.model)
        header = planned_header(view, source.name, source.history)
        try:
            budget_of(target, problem, view.model, header)
        except TooSmall as error:
            return cls(view, problem, target, source, header, error)
        return cls(view, problem, target, source, header)

    @cached_property
    def _imatrix(self) -> Imatrix:
        """The importance matrix of the view."""
        return self.source.matrix(self.problem.tensors).of(self.view.kept)

    @property
    def _weighted(self) -> Problem:
        return replace(self.problem, weighted=self._imatrix.entries)

    @property
    def _budget(self) -> Budget:
        return budget_of(self.target, self._weighted, self.view.model, self.header)

    def errors(
        self, known: Errors, where: Where, progress: Progress, cache: Cache | None
    ) -> Errors:
        """What each type loses of each tensor; `known` is not measured again."""
        host = BlockMaker(self.view, load_quantizer(0), self._imatrix.entries)
        todo, types = self.problem.to_measure(), self._budget.types
        if cache is None:
            return measure(host, todo, types, where, progress, known)
        known = {**known, **cache.load(progress.note)}
        errors = measure(host, todo, types, where, progress, known, cache.save)
        cache.save(errors)
        return errors

    def solved(
        self, record: CountRecord, errors: Errors, weights: Mapping[str, float] | None
    ) -> CountRecord:
        """The record with its types chosen."""
        named, budget = Named("fit", self.target.label, self.target), self._budget
        found = fit(named, self._weighted, errors, budget.types, budget.n_bytes, weights)
        n_bytes = self.header + sum(
            tensor_bytes(one.tensor, one.tensor_type) for one in found.resolved.table
        )
        return replace(
            record,
            quantizing=found.damage,
            bits_per_weight=found.resolved.bits_per_weight,
            n_bytes=n_bytes,
        )

    def shared(self, errors: Errors) -> Errors:
        """Those of tensors without experts, which are the same whichever experts stay."""
        names = {one.name for one in self.problem.to_measure() if one.n_matrices == 1}
        return {name: found for name, found in errors.items() if name in names}
