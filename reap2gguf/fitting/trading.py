"""Experts against bits: what a budget loses with each number of experts that stays.

The damage has two parts, both in nats per token. What pruning costs is the mean KL divergence of
the pruned model from its source, measured on a text; all numbers of experts go through the layers
in one sweep, as views of the source. What quantizing costs is predicted: the errors of the types
that the solver chooses, weighted by `sensitivity.py`, whose weights are KL divergences of a small
model (bench/RESULTS.md compares predictions with measurements). The parts are added, as if neither
changed what the other does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from reap2gguf.building.given import read_imatrix
from reap2gguf.errors import UsageError
from reap2gguf.evaluating.variants import Variant
from reap2gguf.exporting.header_facts import HeaderNames
from reap2gguf.exporting.row_ranges import BlockMaker
from reap2gguf.fitting.errors_table import measure
from reap2gguf.fitting.fitted import Named, Problem, fit, tensor_bytes
from reap2gguf.fitting.solving import budget_of, header_bytes
from reap2gguf.pruning.view import PrunedView
from reap2gguf.quantizing.quantizer import load_quantizer

if TYPE_CHECKING:
    from pathlib import Path

    from reap2gguf.checkpoint.weights import Weights
    from reap2gguf.evaluating.scores import ScoredRow
    from reap2gguf.fitting.errors_table import Errors, Where
    from reap2gguf.fitting.target import SizeTarget
    from reap2gguf.models.contract import MoeModel
    from reap2gguf.options import ComputeOptions
    from reap2gguf.progress import Progress
    from reap2gguf.pruning.select import Kept

_ROOM = 2**12  # bytes of a header that are not known here


@dataclass(frozen=True)
class Candidate:
    """A number of experts that stays in each layer, and what it costs in all."""

    n_experts: int
    pruning: float  # KL divergence from the source, nats per token: measured
    pruning_error: float  # standard error
    quantizing: float | None = None  # the same for quantizing: predicted; None: it does not fit
    bits_per_weight: float | None = None
    n_bytes: int | None = None  # of the file
    problem: str = ""  # why it does not fit

    @property
    def damage(self) -> float:
        """Both together; infinite if no types make it small enough."""
        return float("inf") if self.quantizing is None else self.pruning + self.quantizing


@dataclass(frozen=True)
class Source:
    """A model before pruning, and what is known of it."""

    weights: Weights
    model: MoeModel
    name: str
    imatrix: Path  # of this model

    def view(self, kept: Kept) -> PrunedView:
        return PrunedView(self.weights, self.model, kept)


def weigh(
    source: Source,
    choices: Mapping[int, Kept],
    target: SizeTarget,
    rows: Sequence[ScoredRow],
    compute: ComputeOptions,
    where: Where,
    progress: Progress,
) -> list[Candidate]:
    """The damage of each number of experts, which `choices` maps to the experts that stay.

    Raises UsageError if none of them fits the target, ArtifactError for an imatrix of another
    model, and what `evaluate_variants` raises.
    """
    views = {count: source.view(kept) for count, kept in choices.items()}
    # what is too large is known before anything is measured
    problems = {count: _Problem.of(source, view, target) for count, view in views.items()}
    if all(one.refusal for one in problems.values()):
        raise UsageError(next(iter(problems.values())).refusal)
    costs = _pruning_costs(source, views, rows, compute, progress)
    known: Errors = {}
    found = []
    for count, problem in problems.items():
        candidate = Candidate(count, *costs[count], problem=problem.refusal)
        if not problem.refusal:
            candidate, known = problem.solved(candidate, known, where, progress)
        found.append(candidate)
    return found


def _pruning_costs(
    source: Source,
    views: Mapping[int, PrunedView],
    rows: Sequence[ScoredRow],
    compute: ComputeOptions,
    progress: Progress,
) -> dict[int, tuple[float, float]]:
    """Mean KL divergence of each view from the source, and its standard error."""
    from reap2gguf.evaluating.engine import evaluate_variants  # loads torch
    from reap2gguf.evaluating.figures import divergence

    n_all = source.model.facts.n_experts
    pruned = {count: view for count, view in views.items() if count < n_all}
    costs = {n_all: (0.0, 0.0)}
    if not pruned:
        return costs
    variants = [Variant("source", "source", source.weights, source.model, 0, 16.0)]
    variants += [
        Variant(str(count), "pruned", view, view.model, 0, 16.0) for count, view in pruned.items()
    ]
    pairs = [("source", str(count)) for count in pruned]
    scores = evaluate_variants(variants, rows, pairs, compute, progress)
    for count in pruned:
        mean = divergence(scores.pair("source", str(count))).mean
        costs[count] = mean.value, mean.error
    return costs


@dataclass(frozen=True)
class _Problem:
    """The choice of types for one number of experts."""

    view: PrunedView
    problem: Problem
    target: SizeTarget
    source: Source
    header: int
    refusal: str = ""  # why no types are small enough

    @classmethod
    def of(cls, source: Source, view: PrunedView, target: SizeTarget) -> _Problem:
        """The problem, with what is known from headers."""
        model, weighted = view.model, view.model.weighted_matrices()
        tensors = model.gguf_tensors(view.tensors)
        problem = Problem(tensors, model.facts, view.n_kept, weighted)
        header = _ROOM + header_bytes(view, model, HeaderNames(source.name), "fit", None)
        try:
            budget_of(target, problem, model, header)
        except UsageError as error:
            return cls(view, problem, target, source, header, str(error))
        return cls(view, problem, target, source, header)

    def solved(
        self, candidate: Candidate, known: Errors, where: Where, progress: Progress
    ) -> tuple[Candidate, Errors]:
        """The candidate with its types chosen, and the errors that hold for other ones too."""
        view, facts = self.view, self.source.model.facts
        tensors = self.problem.tensors
        given = read_imatrix(self.source.imatrix, tensors, facts.n_experts, facts.mtp_layer)
        imatrix = given.of(view.kept)
        problem = Problem(tensors, view.model.facts, view.n_kept, imatrix.entries)
        budget = budget_of(self.target, problem, view.model, self.header)
        host = BlockMaker(view, load_quantizer(0), imatrix.entries)
        todo = problem.to_measure()
        errors = measure(host, todo, budget.types, where, progress, known)
        named = Named("fit", self.target.label, self.target)
        found = fit(named, problem, errors, budget.types, budget.n_bytes)
        n_bytes = self.header + sum(
            tensor_bytes(one.tensor, one.tensor_type) for one in found.resolved.table
        )
        done = Candidate(
            candidate.n_experts,
            candidate.pruning,
            candidate.pruning_error,
            found.damage,
            found.resolved.bits_per_weight,
            n_bytes,
        )
        # tensors without experts are the same, whichever experts stay
        shared = {one.name for one in todo if one.n_matrices == 1}
        return done, {name: found for name, found in errors.items() if name in shared}
