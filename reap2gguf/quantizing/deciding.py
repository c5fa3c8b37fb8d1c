"""Which rule of a recipe decides about a tensor, and the rules that decide about none.

A rule that no tensor of a model is left for is an error, but for what a recipe for many models
needs: `optional` rules, for tensors that some models do not have, and inherited ones.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from gguf import GGMLQuantizationType as Type

from reap2gguf.errors import RecipeError

if TYPE_CHECKING:
    from reap2gguf.models.description import GgufTensor
    from reap2gguf.models.roles import Spot
    from reap2gguf.quantizing.recipe import Recipe, Rule

_MANY_LAYERS = 1_000_000  # more than numbers of layers in rules have digits for


def winner(recipe: Recipe, spot: Spot, fixed: Type | None) -> int | None:
    """The first rule for a tensor; a tensor of a fixed type ignores rules for other types."""
    for position, rule in enumerate(recipe.rules):
        if rule.selector.fits(spot) and (fixed is None or rule.tensor_type is fixed):
            return position
    return None


def fixed_type(tensor: GgufTensor, recipe: Recipe) -> Type | None:
    """The type of a tensor that no quantizer touches; None where a type is to be chosen."""
    if tensor.always_f32:
        return Type.F32
    if tensor.never_quantized:
        base = recipe.mixture.base
        return base if base in (Type.F32, Type.F16, Type.BF16) else Type.BF16
    return None


def refuse_idle_rules(
    recipe: Recipe,
    winners: set[int],
    tensors: Sequence[GgufTensor],
    places: Mapping[str, Spot],
) -> None:
    """Raise RecipeError for a rule that is of no use; `winners` are those that decide something."""
    decided = winners | _winners_without_overrides(recipe, tensors, places)
    for position, rule in enumerate(recipe.rules):
        if position in decided:
            continue
        reached = [t for t in tensors if rule.selector.fits(places[t.name])]
        if not reached:
            if not rule.optional:
                raise RecipeError(_unmatched(recipe, rule, list(places.values())))
        elif not (rule.inherited or _is_narrowed(recipe, position, reached, places)):
            raise RecipeError(_without_effect(recipe, rule, reached, places))


def _without_effect(
    recipe: Recipe, rule: Rule, reached: Sequence[GgufTensor], places: Mapping[str, Spot]
) -> str:
    """What is said of a rule that fits tensors, of which none is left for it."""
    where = f"{rule.place(recipe.name)}: {rule.title}"
    free = [tensor for tensor in reached if fixed_type(tensor, recipe) is None]
    if not free:
        return (
            f"{where} asks for {rule.tensor_type.name}, but llama.cpp never quantizes what it "
            f"matches, such as {reached[0].name}; remove it"
        )
    first = winner(recipe, places[free[0].name], None)
    assert first is not None  # the rule itself fits
    other = recipe.rules[first]
    line = other.where.rpartition(", ")[2]
    taker = f"{other.title} of {line}" if line.startswith("line ") else other.title
    return (
        f"{where} is shadowed: earlier rules take every tensor it matches, such as "
        f"{free[0].name}, which {taker} takes; move it up or remove it"
    )


def _is_narrowed(
    recipe: Recipe, position: int, reached: Sequence[GgufTensor], places: Mapping[str, Spot]
) -> bool:
    """Whether an optional rule has lost its tensors only because the model has few layers.

    Asked of the same tensors in a model of very many: at the layers where rules begin and end, and
    between.
    """
    rules = recipe.rules[: position + 1]
    if not rules[-1].optional:
        return False
    some = {re.sub(r"^blk\.\d+\.", "", tensor.name): tensor for tensor in reached}
    return any(
        winner(recipe, spot, fixed_type(tensor, recipe)) == position
        for tensor in some.values()
        for spot in _elsewhere(places[tensor.name], rules)
    )


def _elsewhere(spot: Spot, rules: Sequence[Rule]) -> Iterator[Spot]:
    """The same tensor in other layers of a model of very many; the MTP block follows them."""
    if spot.block is None:
        return
    middle, rest = _MANY_LAYERS // 2, spot.name.split(".", 2)[2]
    blocks = {middle}.union(*(rule.selector.ends(_MANY_LAYERS) for rule in rules))
    for block in [_MANY_LAYERS] if "MTP" in spot.roles else sorted(blocks):
        if block < _MANY_LAYERS or "MTP" in spot.roles:
            name = f"blk.{block}.{rest}"
            yield replace(spot, name=name, block=block, n_layers=_MANY_LAYERS)


def _unmatched(recipe: Recipe, rule: Rule, places: Sequence[Spot]) -> str:
    """What is said of a rule that no tensor of the model fits."""
    hint = f"; {found}" if (found := rule.selector.advice(places)) else ""
    if rule.override:
        return (
            f"{rule.title}: matches no tensor of this model{hint}; PATTERN is a word such as "
            "attn_v, which finds every tensor with it in its name, a glob such as "
            "blk.*.attn_v.weight, or a role such as experts.down"
        )
    return (
        f"{rule.place(recipe.name)}: {rule.title} matches no tensor of this model{hint}; correct "
        "it, or mark it `optional = true` if only other models have such a tensor"
    )


def _winners_without_overrides(
    recipe: Recipe, tensors: Sequence[GgufTensor], places: Mapping[str, Spot]
) -> set[int]:
    """Positions of the recipe's own rules that would decide if nothing were put before them."""
    own = {place: rule for place, rule in enumerate(recipe.rules) if not rule.override}
    if len(own) == len(recipe.rules):
        return set()
    alone, positions = replace(recipe, rules=tuple(own.values())), list(own)
    found = (winner(alone, places[tensor.name], fixed_type(tensor, recipe)) for tensor in tensors)
    return {positions[winner] for winner in found if winner is not None}
