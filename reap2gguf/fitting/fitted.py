"""A recipe of a given size: the type of every tensor chosen from what each type loses of it."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING

import numpy as np
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Type

from reap2gguf.errors import RecipeError
from reap2gguf.fitting.errors_table import types_for
from reap2gguf.fitting.knapsack import choose
from reap2gguf.fitting.rules import rules_of
from reap2gguf.fitting.sensitivity import sensitivities
from reap2gguf.gguf_files.tensor_types import row_bytes
from reap2gguf.gguf_files.writer import padded
from reap2gguf.quantizing.deciding import fixed_type
from reap2gguf.quantizing.file_types import MIXTURES
from reap2gguf.quantizing.recipe import MAX_RULES, Recipe, Rule, load_recipe
from reap2gguf.quantizing.resolve import ResolvedRecipe, resolve

if TYPE_CHECKING:
    from reap2gguf.fitting.errors_table import Errors
    from reap2gguf.fitting.target import SizeTarget
    from reap2gguf.models.description import GgufTensor, ModelFacts

ALIGNMENT = 32  # of a tensor in a file
_UNQUANTIZED = ("F32", "F16", "BF16")
# the one of these whose tensors that no recipe decides about are those of the types that quantize
_UNQUANTIZED_BASE = "BF16"
# no choices for any model: MXFP4 and NVFP4 are for experts alone, and three values need training
_SPECIAL = ("MXFP4_MOE", "NVFP4", "TQ1_0", "TQ2_0")
_SOME = "Q4_K_M"  # a file type that quantizes, to ask which tensors no recipe decides about


@dataclass(frozen=True)
class Fitted:
    """A recipe that was chosen, and how well."""

    recipe: Recipe
    resolved: ResolvedRecipe
    damage: float  # weighted relative errors, added up
    gap: float  # by which share no choice can be better, at most


@dataclass(frozen=True)
class Problem:
    """A model whose tensors are to get types."""

    tensors: Sequence[GgufTensor]
    facts: ModelFacts
    n_experts: int  # of a layer of the result
    weighted: Collection[str]  # tensors that have importance
    fixed: Mapping[str, Type] = field(default_factory=dict)  # types that are not to be chosen

    @cached_property
    def free(self) -> list[GgufTensor]:
        """The tensors whose type a recipe gives."""
        return free_tensors(self.tensors)

    @property
    def n_weights(self) -> int:
        return sum(prod(tensor.shape) for tensor in self.tensors)

    def types_for(self, tensor: GgufTensor, types: Sequence[Type]) -> list[Type]:
        """The types that a tensor may get."""
        if (one := self.fixed.get(tensor.name)) is not None:
            return [one]
        return types_for(tensor, tensor.name in self.weighted, types)

    def to_measure(self) -> list[GgufTensor]:
        """The tensors whose types are a choice."""
        return [tensor for tensor in self.free if tensor.name not in self.fixed]

    def resolve(self, recipe: Recipe) -> ResolvedRecipe:
        """A recipe applied to the model."""
        return resolve(recipe, self.tensors, self.facts, self.n_experts, has_imatrix=True)

    def least_bytes(self, types: Sequence[Type]) -> int:
        """Bytes of all tensors, each in its smallest type."""
        sizes = (
            min(tensor_bytes(tensor, one) for one in self.types_for(tensor, types))
            for tensor in self.free
        )
        return fixed_bytes(self.tensors) + sum(sizes)

    def most_bytes(self, types: Sequence[Type]) -> int:
        """Bytes of all tensors, each in its largest type."""
        sizes = (
            max(tensor_bytes(tensor, one) for one in self.types_for(tensor, types))
            for tensor in self.free
        )
        return fixed_bytes(self.tensors) + sum(sizes)

    def nominal_errors(self, types: Sequence[Type]) -> dict[str, dict[str, float]]:
        """Errors of values that were not looked at: a bit of a type halves them."""
        of_type = {}
        for one in types:
            block, n_bytes = GGML_QUANT_SIZES[one]
            of_type[one.name] = 2.0 ** (-16 * n_bytes / block)
        return {
            tensor.name: {
                one.name: 0.0 if tensor.is_copied_as(one) else of_type[one.name]
                for one in self.types_for(tensor, types)
            }
            for tensor in self.to_measure()
        }


def free_tensors(tensors: Sequence[GgufTensor]) -> list[GgufTensor]:
    """Those whose type a recipe chooses: not the ones that llama.cpp never quantizes."""
    some = load_recipe(_SOME)
    return [tensor for tensor in tensors if fixed_type(tensor, some) is None]


def fixed_types(overrides: tuple[Rule, ...], problem: Problem) -> dict[str, Type]:
    """The tensors that the user's own rules give types, and these types."""
    if not overrides:
        return {}
    given = problem.resolve(load_recipe(_SOME).with_overrides(overrides))
    return {one.tensor.name: one.tensor_type for one in given.table if one.rule is not None}


def fixed_bytes(tensors: Sequence[GgufTensor]) -> int:
    """Bytes of all other tensors, with what lies between them in a file."""
    some = load_recipe(_SOME)
    found = ((tensor, fixed_type(tensor, some)) for tensor in tensors)
    return sum(tensor_bytes(tensor, one) for tensor, one in found if one is not None)


def tensor_bytes(tensor: GgufTensor, tensor_type: Type) -> int:
    """Bytes of a tensor in a file, up to where the next one begins."""
    rows = prod(tensor.shape[:-1])
    return padded(rows * row_bytes(tensor_type, tensor.n_columns), ALIGNMENT)


def fit(
    named: Named,
    problem: Problem,
    errors: Errors,
    types: Sequence[Type],
    budget: int,
    weights: Mapping[str, float] | None = None,
) -> Fitted:
    """The recipe with the least damage, whose tensors have at most `budget` bytes.

    `weights` are those of each tensor's error; None: of its kind. `errors` has the tensors whose
    types are a choice, and each one's possible types among `types`. Raises UsageError if the budget
    is too small, and RecipeError if the types do not fit into rules.
    """
    free = problem.free
    kept = {tensor.block_type for tensor in free if tensor.block_type is not None}
    columns = [*types, *sorted({*problem.fixed.values(), *kept} - {*types})]
    if weights is None:
        weights = sensitivities(tensor.name for tensor in free)
    shape = len(free), len(columns)
    sizes, damages = np.zeros(shape, np.int64), np.full(shape, np.inf)
    for row, tensor in enumerate(free):
        for one in problem.types_for(tensor, types):
            column = columns.index(one)
            error = 0.0  # of a type that is no choice
            if tensor.name not in problem.fixed:
                error = errors[tensor.name].get(one.name, math.inf)
            if math.isfinite(error):
                sizes[row, column] = tensor_bytes(tensor, one)
                damages[row, column] = weights[tensor.name] * error
    found = choose(sizes, damages, budget - fixed_bytes(problem.tensors))
    chosen = {
        tensor.name: columns[column] for tensor, column in zip(free, found.chosen, strict=True)
    }
    recipe, resolved = _as_recipe(named, problem, chosen)
    return Fitted(recipe, resolved, found.damage, found.gap)


def guess(named: Named, problem: Problem, types: Sequence[Type], budget: int) -> Fitted:
    """A recipe of the size, before anything is measured: for plans."""
    return fit(named, problem, problem.nominal_errors(types), types, budget)


@dataclass(frozen=True)
class Named:
    """What a recipe is called."""

    name: str
    label: str
    target: SizeTarget  # that it is fitted to

    def title(self, bits: float) -> str:
        """What it is, in a few words, if its file has so many bits per weight."""
        words = f"{bits:.2f} bits per weight"
        return "Fitted to " + (
            words if self.target.bpw is not None else f"{self.target.words}, {words}"
        )


def _as_recipe(
    named: Named, problem: Problem, chosen: Mapping[str, Type]
) -> tuple[Recipe, ResolvedRecipe]:
    """Types as a recipe that gives them, and that recipe applied."""
    rules = tuple(Rule(*one) for one in rules_of(chosen))
    if len(rules) > MAX_RULES:
        raise RecipeError(
            f"recipe {named.name!r}: needs {len(rules):,} rules, and a recipe has at most "
            f"{MAX_RULES:,}; the layers of this model got too many different types; pass another "
            "target"
        )
    n_bytes = sum(tensor_bytes(tensor, chosen[tensor.name]) for tensor in problem.free)
    bits = 8 * (n_bytes + fixed_bytes(problem.tensors)) / problem.n_weights
    base = _nearest(problem, bits)
    recipe = Recipe(named.name, named.title(bits), named.label, base, rules, "")
    recipe = replace(recipe, source=recipe.as_toml())
    resolved = problem.resolve(recipe)
    for tensor, tensor_type in resolved.tensor_types().items():
        expected = chosen.get(tensor, tensor_type)
        assert tensor_type is expected, f"{tensor}: {tensor_type.name}, chose {expected.name}"
    return recipe, resolved


def _nearest(problem: Problem, bits: float) -> str:
    """The file type whose own mixture has the most similar size."""
    return min(
        [_UNQUANTIZED_BASE, *_quantizing_mixtures()],
        key=lambda name: abs(problem.resolve(load_recipe(name)).bits_per_weight - bits),
    )


def _quantizing_mixtures() -> Iterator[str]:
    """File types that quantize, without those that ask for importance where others do not."""
    for name, mixture in MIXTURES.items():
        if name not in _UNQUANTIZED and not mixture.needs_importance and name not in _SPECIAL:
            yield name
