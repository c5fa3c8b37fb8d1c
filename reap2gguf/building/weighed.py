"""A plan of which the number of experts is open: what can be known before it is weighed, and after.

Until then a plan counts with the most experts that would be pruned and fit: its safetensors are of
the largest size that they can have.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from reap2gguf.building.given import given_imatrix, read_imatrix
from reap2gguf.building.sized import with_sized
from reap2gguf.errors import ArtifactError, UsageError
from reap2gguf.fitting.counts import usual_counts
from reap2gguf.fitting.solving import planned_header
from reap2gguf.fitting.trading import Source, Weighing, size_target
from reap2gguf.pruning.counts import WEIGHED
from reap2gguf.pruning.protection import check_protection
from reap2gguf.pruning.select import Target, choose_target
from reap2gguf.pruning.view import PrunedView
from reap2gguf.quantizing.overrides import read_overrides
from reap2gguf.quantizing.resolve import resolve

if TYPE_CHECKING:
    from reap2gguf.building.given import GivenImatrix, GivenObservations
    from reap2gguf.building.plan import Plan
    from reap2gguf.bundle.budget import BudgetRecord
    from reap2gguf.checkpoint.checkpoint import Checkpoint
    from reap2gguf.models.contract import MoeModel
    from reap2gguf.models.description import GgufTensor, ModelFacts
    from reap2gguf.options import BuildOptions
    from reap2gguf.pruning.history import History
    from reap2gguf.pruning.select import Kept

Matrix = Callable[[Sequence["GgufTensor"]], "GivenImatrix"]  # fitted to a model's tensors


@dataclass(frozen=True)
class Opened:
    """A model before pruning."""

    checkpoint: Checkpoint
    model: MoeModel
    name: str
    history: History | None = None  # what was pruned of it before

    def header(self, view: PrunedView) -> int:
        """Bytes before the first tensor of a file of a view of it, as far as a plan knows."""
        return planned_header(view, self.name, self.history)


def sized_options(options: BuildOptions, opened: Opened) -> BuildOptions:
    """The options with the size that all numbers of experts share, in place of bits per weight."""
    asked = options.target
    if not options.weighs or asked is None or asked.bpw is None:
        return options
    target = size_target(asked, Source(opened.checkpoint, opened.model, opened.name, _no_matrix))
    return replace(options, target_bpw=None, target_size=target.size)


def counts_of(options: BuildOptions, opened: Opened) -> tuple[int, ...]:
    """The numbers of experts that are weighed, the most first: those that fit the target.

    Raises UsageError if none of them fits, or none of them is less than all.
    """
    facts, target = opened.model.facts, options.target
    assert target is not None  # `check_weighed` has refused options without one
    first: dict[int, Kept] = {
        count: dict.fromkeys(facts.moe_layers, tuple(range(count)))
        for count in usual_counts(facts)
        if _may_stay(options, Target(facts.n_experts, count), facts)
    }
    source = Source(
        opened.checkpoint,
        opened.model,
        opened.name,
        _no_matrix,
        read_overrides(options.tensor_types),
        opened.history,
    )
    weighing = Weighing(source, first, target)
    if first:
        weighing.check()
    found = tuple(weighing.fitting)
    if not any(count < facts.n_experts for count in found):
        raise UsageError(
            f"--compression {WEIGHED}: there is nothing to weigh, as no expert can be removed: the "
            f"model has {facts.n_experts} of them, needs {facts.experts_per_token} for each token, "
            "and --protect may keep some; leave --compression out, or protect fewer"
        )
    return found


def asked_target(
    options: BuildOptions, opened: Opened
) -> tuple[BuildOptions, tuple[int, ...], Target]:
    """The options with a size, the numbers that are weighed, and what a plan counts with first.

    Where a number was named there are none to weigh. Raises what `counts_of` and `choose_target`
    raise.
    """
    facts = opened.model.facts
    if not options.weighs:
        return options, (), choose_target(facts, options.keep_experts, options.ratio)
    options = sized_options(options, opened)
    counts = counts_of(options, opened)
    most = max(count for count in counts if count < facts.n_experts)
    return options, counts, Target(facts.n_experts, most)


def check_matrix(options: BuildOptions, opened: Opened, seen: GivenObservations | None) -> None:
    """Refuse given files by which nothing can be weighed.

    Raises UsageError for observations without sums, and ArtifactError for an importance matrix that
    is not of the model with all its experts.
    """
    facts = opened.model.facts
    if options.imatrix is not None:
        tensors = opened.model.gguf_tensors(opened.checkpoint.tensors)
        try:
            read_imatrix(options.imatrix, tensors, facts.n_experts, facts.mtp_layer)
        except ArtifactError as error:
            raise ArtifactError(
                f"{error}; --compression {WEIGHED} needs one of MODEL with all its experts"
            ) from error
    elif seen is not None and seen.seen.imatrix is None:
        raise UsageError(
            f"--observations {options.observations}: carry no sums for an importance matrix, by "
            f"which --compression {WEIGHED} predicts what quantizing costs; make them again with "
            "`reap2gguf observe --imatrix-sums`, or pass an --imatrix of MODEL"
        )


def settled(plan: Plan, record: BudgetRecord, matrix: Matrix | None = None) -> Plan:
    """The plan with the number of experts that loses least.

    With all experts, an importance matrix that was to be taken before pruning is that of the
    result, and `matrix` gives it; options that only a pruned model has are left out.
    """
    if not plan.options.weighs:
        return plan
    target = Target(plan.target.n_experts, record.best.n_experts)
    found = replace(plan, options=_settled_options(plan, target), budget=record, unweighed=plan)
    if target.prunes:
        return _with_target(found, target, None)
    from_source = plan.options.imatrix_from == "source" and plan.imatrix is None
    is_observed = plan.imatrix is not None and plan.imatrix.is_observed
    found = replace(found, observations=None)
    return _with_target(found, target, matrix if from_source or is_observed else None)


def _settled_options(plan: Plan, target: Target) -> BuildOptions:
    """The options as if this number of experts had been asked for."""
    options = plan.options
    known = {"compression": None, "keep_experts": target.n_kept}
    if target.prunes:
        text = options.choose_text if plan.chooses else None
        return replace(options, **known, choose_text=text)  # type: ignore[arg-type]
    return replace(
        options,
        **known,  # type: ignore[arg-type]
        choose_text=None,
        observations=None,
        candidates=None,
        repair="none",
        protect="",
        protect_super_experts=False,
        dequantize=None,
    )


def _with_target(plan: Plan, target: Target, matrix: Matrix | None) -> Plan:
    """A plan with another number of experts, and what follows from it."""
    options, facts = plan.options, plan.model.facts
    pruned = with_first_experts(plan.checkpoint, plan.model, target)
    tensors = pruned.model.gguf_tensors(pruned.tensors)
    recipes = tuple(
        resolve(one.recipe, tensors, facts, target.n_kept, has_imatrix=True)
        for one in plan.recipes[:-1]
    )
    imatrix = given_imatrix(options, facts, tensors, plan.observations)
    if matrix is not None:
        imatrix = matrix(tensors)
    weighted = pruned.model.weighted_matrices() if imatrix is None else imatrix.imatrix.entries
    opened = Opened(plan.checkpoint, plan.model, plan.source.short_name, plan.history)
    sized, recipes = with_sized(options, pruned, opened.header(pruned), weighted, recipes)
    return replace(
        plan, target=target, pruned=pruned, recipes=recipes, imatrix=imatrix, sized=sized
    )


def with_first_experts(checkpoint: Checkpoint, model: MoeModel, target: Target) -> PrunedView:
    """The model with the first experts of each layer: of the sizes that any choice has."""
    first_ones: Kept = {layer: tuple(range(target.n_kept)) for layer in model.facts.moe_layers}
    return PrunedView(checkpoint, model, first_ones)


def _may_stay(options: BuildOptions, target: Target, facts: ModelFacts) -> bool:
    """Whether so many experts hold all that are protected."""
    if not target.prunes:
        return True
    try:
        check_protection(options.protection, None, options.method, target, facts)
    except UsageError as error:
        if "are protected and" not in str(error):
            raise  # they do not exist
        return False
    return True


def _no_matrix(tensors: Sequence[GgufTensor]) -> GivenImatrix:
    raise AssertionError("a plan quantizes nothing")
