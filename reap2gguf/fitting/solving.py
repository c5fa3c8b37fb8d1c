"""From a size that is asked for to a recipe: the budget, what is measured, and the choice.

A budget is known from headers, so that a target that no types meet is refused before anything is
measured. `recipes fit` and the stage of a build share all of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import floor
from typing import TYPE_CHECKING

from reap2gguf.errors import UsageError
from reap2gguf.exporting.header import lay_out
from reap2gguf.exporting.header_facts import FileTypes, HeaderNames, model_facts, pruning_values
from reap2gguf.exporting.row_ranges import BlockMaker
from reap2gguf.fitting.card import CardUse, card_use
from reap2gguf.fitting.errors_table import SMALLEST_TYPES, TYPES, measure
from reap2gguf.messages import size
from reap2gguf.pruning.methods import METHODS
from reap2gguf.quantizing.quantizer import load_quantizer
from reap2gguf.quantizing.recipe import load_recipe
from reap2gguf.quantizing.resolve import resolve

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType as Type

    from reap2gguf.checkpoint.weights import Weights
    from reap2gguf.fitting.errors_table import Cache, Errors, Where
    from reap2gguf.fitting.fitted import Problem
    from reap2gguf.fitting.target import SizeTarget
    from reap2gguf.gguf_files.imatrix import Imatrix
    from reap2gguf.models.contract import MoeModel
    from reap2gguf.progress import Progress
    from reap2gguf.pruning.history import History
    from reap2gguf.pruning.view import PrunedView

_FEW_BITS = 2.6  # below it, types of less than 2 bits are measured too
_SOME = "Q4_K_M"
_PLANNED = "fit"  # the recipe's name in a header that is counted before there is a file
HEADER_ROOM = 2**12  # bytes of a header that a plan does not know, such as the names of datasets


class TooSmall(UsageError):
    """A target that no types meet: what was found, and which one would be met."""

    def __init__(self, found: str, least: str, n_bytes: int, others: Sequence[str] = ()) -> None:
        """`least` is the option that would do, `n_bytes` the smallest file, `others` more ways."""
        ways = (f"pass at least {least}", *others, "prune more experts")
        super().__init__(f"{found}; {either(ways)}")
        self.found, self.least, self.n_bytes, self.others = found, least, n_bytes, others


def either(ways: Sequence[str]) -> str:
    """Several ways out of a refusal, with "or" before the last."""
    *others, last = ways
    return ", ".join((*others, f"or {last}")) if others else last


@dataclass(frozen=True)
class Budget:
    """What the tensors of a file may have."""

    n_bytes: int
    types: tuple[Type, ...]  # to choose from
    card: CardUse | None = None  # what was counted, for a GPU


def header_bytes(
    weights: Weights,
    model: MoeModel,
    names: HeaderNames,
    recipe: str,
    weighted_by: tuple[Imatrix, str] | None,
) -> int:
    """Bytes before the first tensor of a file, for a recipe of this name.

    `weighted_by` is an importance matrix and the name of its file. Numbers of types have a fixed
    width, so the types do not count.
    """
    tensors = model.gguf_tensors(weights.tensors)
    facts, some = model.facts, load_recipe(_SOME)
    resolved = resolve(some, tensors, facts, facts.n_experts, has_imatrix=True)
    types = FileTypes(recipe, resolved.llama_file_type, resolved.tensor_types())
    imatrix, file = (None, "") if weighted_by is None else weighted_by
    values = model_facts(weights, model, names, types, imatrix, file)
    return len(lay_out(weights.folder, tensors, values).header)


def planned_header(view: PrunedView, label: str, history: History | None) -> int:
    """Bytes before the first tensor of a build's file, with room for what only the build knows.

    `label` is the source's, `history` what was pruned of it before. The target does not count,
    though files are named by it: the least size that a refusal names has to be enough.
    """
    earlier = None if history is None else history.after(view.kept)
    own = pruning_values(label, METHODS[0], view.n_kept, view.kept, earlier=earlier)
    names = HeaderNames(label, None, tuple(own))
    return HEADER_ROOM + header_bytes(view, view.model, names, _PLANNED, None)


def budget_of(target: SizeTarget, problem: Problem, model: MoeModel, header: int) -> Budget:
    """What a target leaves for the tensors of a model whose files have such headers.

    Raises TooSmall if the tensors are larger in their smallest types.
    """
    card = None
    if target.bpw is not None:
        n_bytes = int(target.bpw * problem.n_weights / 8)
    elif target.size is not None:
        n_bytes = target.size - header
    else:
        card = card_use(model, target.card or 0, target.within(model.facts.context_length).context)
        n_bytes = card.left - header
    is_small = 8 * n_bytes < _FEW_BITS * problem.n_weights or problem.least_bytes(TYPES) > n_bytes
    types = (*TYPES, *SMALLEST_TYPES) if is_small else TYPES
    least = problem.least_bytes(types)
    if least > n_bytes:
        raise _too_small(target, problem, n_bytes, least, header, card)
    return Budget(n_bytes, types, card)


def beyond(target: SizeTarget, problem: Problem, budget: Budget, header: int) -> str | None:
    """What is said of a target that is larger than any file of the model; None if it is not."""
    most = problem.most_bytes(budget.types)
    if budget.n_bytes <= most:
        return None
    bits = 8 * most / problem.n_weights
    return (
        f"{target.words}: the largest file of this model has {size(most + header)} "
        f"({bits:.2f} bits per weight); nothing is gained above that"
    )


def _too_small(
    target: SizeTarget,
    problem: Problem,
    n_bytes: int,
    least: int,
    header: int,
    card: CardUse | None,
) -> TooSmall:
    """What is said of a target that no types meet."""
    bits = 8 * least / problem.n_weights
    found = (
        f"{target.words} leaves {size(max(n_bytes, 0))} for the tensors, and in their smallest "
        f"types they have {size(least)} ({bits:.2f} bits per weight)"
    )
    n_file = least + header
    if card is not None:
        enough = f"--fit {n_file + card.taken}B"
        found = f"{found}; counted {card.words}"
        return TooSmall(found, enough, n_file, ("a smaller --fit-context",))
    if target.size is not None:
        return TooSmall(found, f"--target-size {n_file}B", n_file)
    # rounded up; a hundredth more where it is exact, as floats may be below it
    return TooSmall(found, f"--target-bpw {(floor(100 * bits) + 1) / 100:.2f}", n_file)


@dataclass(frozen=True)
class Measuring:
    """What the errors of types are measured on, and where they are kept."""

    weights: Weights
    imatrix: Imatrix
    cache: Cache
    where: Where

    def errors(self, problem: Problem, budget: Budget, progress: Progress) -> Errors:
        """The errors of all types that are a choice: measured, but for what the cache holds.

        Raises CheckpointError for values that are not finite, OutputError if the cache cannot be
        written.
        """
        known = self.cache.load(progress.note)
        # nothing is written of what is quantized here: it needs no comparison with libggml
        host = BlockMaker(self.weights, load_quantizer(0), self.imatrix.entries)
        todo = problem.to_measure()
        found = measure(host, todo, budget.types, self.where, progress, known, self.cache.save)
        if found != known:
            self.cache.save(found)
        return found
