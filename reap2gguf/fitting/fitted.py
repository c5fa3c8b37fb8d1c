"""A recipe of a given size: the type of every tensor chosen from what each type loses of it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING

import numpy as np
from gguf import GGMLQuantizationType as Type

from reap2gguf.errors import RecipeError
from reap2gguf.fitting.knapsack import choose
from reap2gguf.fitting.rules import rules_of
from reap2gguf.fitting.sensitivity import sensitivities
from reap2gguf.gguf_files.reader import row_bytes
from reap2gguf.gguf_files.writer import padded
from reap2gguf.quantizing.deciding import fixed_type
from reap2gguf.quantizing.file_types import MIXTURES
from reap2gguf.quantizing.recipe import MAX_RULES, Recipe, load_recipe
from reap2gguf.quantizing.resolve import ResolvedRecipe, resolve

if TYPE_CHECKING:
    from reap2gguf.fitting.errors_table import Errors
    from reap2gguf.models.description import GgufTensor, ModelFacts

ALIGNMENT = 32  # of a tensor in a file
_UNQUANTIZED = ("F32", "F16", "BF16")
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


def free_tensors(tensors: Sequence[GgufTensor]) -> list[GgufTensor]:
    """Those whose type a recipe chooses: not the ones that llama.cpp never quantizes."""
    some = load_recipe(_SOME)
    return [tensor for tensor in tensors if fixed_type(tensor, some) is None]


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
    name: str,
    tensors: Sequence[GgufTensor],
    facts: ModelFacts,
    errors: Errors,
    types: Sequence[Type],
    budget: int,
) -> Fitted:
    """The recipe called `name` with the least damage, whose tensors have at most `budget` bytes.

    `errors` has the tensors that are free, and each one's possible types among `types`. Raises
    UsageError if the budget is too small, and RecipeError if the types do not fit into rules.
    """
    free = free_tensors(tensors)
    weights = sensitivities(tensor.name for tensor in free)
    shape = len(free), len(types)
    sizes, damages = np.zeros(shape, np.int64), np.full(shape, np.inf)
    for row, tensor in enumerate(free):
        for column, one in enumerate(types):
            error = errors[tensor.name].get(one.name, math.inf)
            if math.isfinite(error):
                sizes[row, column] = tensor_bytes(tensor, one)
                damages[row, column] = weights[tensor.name] * error
    found = choose(sizes, damages, budget - fixed_bytes(tensors))
    chosen = {tensor.name: types[column] for tensor, column in zip(free, found.chosen, strict=True)}
    recipe, resolved = _as_recipe(name, tensors, facts, chosen)
    return Fitted(recipe, resolved, found.damage, found.gap)


def _as_recipe(
    name: str, tensors: Sequence[GgufTensor], facts: ModelFacts, chosen: Mapping[str, Type]
) -> tuple[Recipe, ResolvedRecipe]:
    """Types as a recipe that gives them, and that recipe applied."""
    rules = rules_of(chosen)
    if len(rules) > MAX_RULES:
        raise RecipeError(
            f"recipe {name!r}: needs {len(rules):,} rules, and a recipe has at most {MAX_RULES:,}; "
            "the layers of this model got too many different types; pass another target"
        )
    n_bytes = sum(tensor_bytes(tensor, chosen[tensor.name]) for tensor in free_tensors(tensors))
    n_weights = sum(prod(tensor.shape) for tensor in tensors)
    bits = 8 * (n_bytes + fixed_bytes(tensors)) / n_weights
    base = _nearest(tensors, facts, bits)
    recipe = Recipe(
        name,
        f"Fitted to {bits:.2f} bits per weight",
        f"FIT-{bits:.2f}BPW",
        base,
        rules,
        "",
    )
    recipe = replace(recipe, source=recipe.as_toml())
    resolved = resolve(recipe, tensors, facts, facts.n_experts, has_imatrix=True)
    for tensor, tensor_type in resolved.tensor_types().items():
        expected = chosen.get(tensor, tensor_type)
        assert tensor_type is expected, f"{tensor}: {tensor_type.name}, chose {expected.name}"
    return recipe, resolved


def _nearest(tensors: Sequence[GgufTensor], facts: ModelFacts, bits: float) -> str:
    """The file type whose own mixture has the most similar size."""
    return min(
        _quantizing_mixtures(),
        key=lambda name: abs(
            resolve(load_recipe(name), tensors, facts, facts.n_experts, True).bits_per_weight - bits
        ),
    )


def _quantizing_mixtures() -> Iterator[str]:
    """File types that quantize, without those that ask for importance where others do not."""
    for name, mixture in MIXTURES.items():
        if name not in _UNQUANTIZED and not mixture.needs_importance and name not in _SPECIAL:
            yield name
