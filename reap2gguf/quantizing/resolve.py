"""A recipe applied to a model: the type of every tensor, decided before any is read."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING

from gguf import GGML_QUANT_SIZES, LlamaFileType
from gguf import GGMLQuantizationType as Type

from reap2gguf.errors import RecipeError
from reap2gguf.ggml import NEEDS_IMPORTANCE
from reap2gguf.gguf_files.reader import row_bytes
from reap2gguf.models.roles import Spot, spots
from reap2gguf.quantizing.file_types import Part
from reap2gguf.quantizing.mixture import MixtureChooser, fitting, part_of
from reap2gguf.quantizing.selector import advice

if TYPE_CHECKING:
    from reap2gguf.models.description import GgufTensor, ModelFacts
    from reap2gguf.quantizing.recipe import Recipe, Rule

_SMALLEST_BLOCK = 32
_MAX_STEPS = 4_000_000  # what rules cost (`Selector.cost`), for each tensor: some seconds


@dataclass(frozen=True)
class ResolvedTensor:
    """A tensor, its type, and the rule that gave it (None: the file type's mixture)."""

    tensor: GgufTensor
    tensor_type: Type
    rule: str | None
    wanted: Type | None = None  # the type that was meant, if rows do not fill its blocks

    @property
    def n_bytes(self) -> int:
        return prod(self.tensor.shape[:-1]) * row_bytes(self.tensor_type, self.tensor.n_columns)


@dataclass(frozen=True)
class ResolvedRecipe:
    """A recipe with its per-tensor table, in the order the tensors are written."""

    recipe: Recipe
    table: tuple[ResolvedTensor, ...]

    @property
    def name(self) -> str:
        return self.recipe.name

    @property
    def title(self) -> str:
        return self.recipe.title

    @property
    def label(self) -> str:
        """What ends the file's name."""
        return self.recipe.label

    @property
    def file_type(self) -> str:
        """llama.cpp's name of the mixture, such as Q4_K_M."""
        return self.recipe.file_type

    @property
    def llama_file_type(self) -> LlamaFileType:
        """The same as the number that `general.file_type` holds."""
        return self.recipe.mixture.file_type

    @property
    def source(self) -> str:
        """The recipe's TOML text."""
        return self.recipe.source

    @property
    def n_bytes(self) -> int:
        return sum(entry.n_bytes for entry in self.table)

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.n_bytes / sum(prod(entry.tensor.shape) for entry in self.table)

    def tensor_types(self) -> dict[str, Type]:
        """Tensor name to type."""
        return {entry.tensor.name: entry.tensor_type for entry in self.table}

    def needs_importance(self) -> list[str]:
        """Tensors whose type is garbage without an importance matrix.

        As in llama-quantize, Q2_K is such a type in a file of Q2_K_S, but for the embeddings and
        the output.
        """
        of_file_type = self.recipe.mixture.needs_importance
        return [
            entry.tensor.name
            for entry in self.table
            if entry.tensor_type in NEEDS_IMPORTANCE
            or (
                entry.tensor_type in of_file_type
                and part_of(entry.tensor.name) not in (Part.TOKEN_EMBD, Part.OUTPUT)
            )
        ]


def resolve(
    recipe: Recipe,
    tensors: Sequence[GgufTensor],
    facts: ModelFacts,
    n_experts: int,
    has_imatrix: bool,
) -> ResolvedRecipe:
    """The type of every tensor of a model that keeps `n_experts` experts.

    Raises RecipeError for a rule that matches nothing, is shadowed by earlier rules, or asks for a
    type that the tensor cannot have.
    """
    chooser = MixtureChooser(
        recipe.mixture,
        tensors,
        n_layers=_n_blocks(tensors),
        n_experts=n_experts,
        gqa=facts.gqa,
        has_imatrix=has_imatrix,
    )
    n_steps = sum(rule.selector.cost for rule in recipe.rules) * len(tensors)
    if n_steps > _MAX_STEPS:
        raise RecipeError(
            f"recipe {recipe.name!r}: {len(recipe.rules):,} rules for {len(tensors):,} tensors, "
            "too many to match; use fewer rules, with few stars or short regular expressions"
        )
    places = spots([tensor.name for tensor in tensors])
    winners: set[int] = set()
    resolved: dict[str, ResolvedTensor] = {}
    for tensor in sorted(tensors, key=_quantize_order):
        whole = fixed_type(tensor, recipe)
        winner = _winner(recipe, places[tensor.name], whole)
        if winner is not None:
            winners.add(winner)
            rule = recipe.rules[winner]
            wanted = rule.tensor_type
            if rule.fallback:
                tensor_type = fitting(wanted, tensor.n_columns)
            else:
                _check_rows(tensor, rule, recipe)
                tensor_type = wanted
            match: str | None = rule.selector.words
        else:
            wanted = chooser.choose(tensor) if whole is None else whole
            tensor_type = chooser.fitted(tensor, wanted) if whole is None else whole
            match = None
        meant = None if wanted is tensor_type else wanted
        resolved[tensor.name] = ResolvedTensor(tensor, tensor_type, match, meant)
    _refuse_idle_rules(recipe, winners, tensors, places)
    return ResolvedRecipe(recipe, tuple(resolved[tensor.name] for tensor in tensors))


def _winner(recipe: Recipe, spot: Spot, fixed: Type | None) -> int | None:
    """The first rule for a tensor; a tensor of a fixed type ignores rules for other types."""
    for position, rule in enumerate(recipe.rules):
        if rule.selector.fits(spot) and (fixed is None or rule.tensor_type is fixed):
            return position
    return None


def _n_blocks(tensors: Sequence[GgufTensor]) -> int:
    layers = (re.match(r"blk\.(\d+)\.", tensor.name) for tensor in tensors)
    return 1 + max((int(match[1]) for match in layers if match), default=0)


def _quantize_order(tensor: GgufTensor) -> tuple[int, str]:
    """The order in which llama.cpp meets tensors: by layer number, then by name."""
    layer = re.match(r"blk\.(\d+)\.", tensor.name)
    return (int(layer[1]) if layer else -1, tensor.name)


def fixed_type(tensor: GgufTensor, recipe: Recipe) -> Type | None:
    """The type of a tensor that no quantizer touches; None where a type is to be chosen."""
    if tensor.always_f32:
        return Type.F32
    if tensor.never_quantized:
        base = recipe.mixture.base
        return base if base in (Type.F32, Type.F16, Type.BF16) else Type.BF16
    return None


def _check_rows(tensor: GgufTensor, rule: Rule, recipe: Recipe) -> None:
    block = GGML_QUANT_SIZES[rule.tensor_type][0]
    if tensor.n_columns % block:
        fits = tensor.n_columns % _SMALLEST_BLOCK == 0
        other = "F16, BF16 or F32"
        if fits:
            other = "a type with blocks of 32, such as Q8_0 or IQ4_NL, or add `fallback = true`"
        raise RecipeError(
            f"{rule.place(recipe.name)}: {rule.title}: {rule.tensor_type.name} has blocks of "
            f"{block}, and {tensor.name} has rows of {tensor.n_columns}; choose {other}"
        )


def _refuse_idle_rules(
    recipe: Recipe,
    winners: set[int],
    tensors: Sequence[GgufTensor],
    places: Mapping[str, Spot],
) -> None:
    decided = winners | _winners_without_overrides(recipe, tensors, places)
    for position, rule in enumerate(recipe.rules):
        if position in decided:
            continue
        reached = [t for t in tensors if rule.selector.fits(places[t.name])]
        narrowed = rule.optional and any(one.layers for one in recipe.rules[:position])
        if reached and (rule.inherited or narrowed):
            continue  # a model of few layers may leave nothing
        where = f"{rule.place(recipe.name)}: {rule.title}"
        if reached and all(fixed_type(tensor, recipe) is not None for tensor in reached):
            raise RecipeError(
                f"{where} asks for {rule.tensor_type.name}, but llama.cpp never quantizes what it "
                f"matches, such as {reached[0].name}; remove it"
            )
        if reached:
            raise RecipeError(
                f"{where} is shadowed: earlier rules take every tensor it matches, such as "
                f"{reached[0].name}; move it up or remove it"
            )
        if not rule.optional:
            raise RecipeError(_unmatched(rule, where, list(places.values())))


def _unmatched(rule: Rule, where: str, places: Sequence[Spot]) -> str:
    """What is said of a rule that no tensor of the model fits."""
    hint = f"; {found}" if (found := advice(rule.selector, places)) else ""
    if rule.override:
        return (
            f"{rule.title}: matches no tensor of this model{hint}; PATTERN is a word such as "
            "attn_v, which finds every tensor with it in its name, a glob such as "
            "blk.*.attn_v.weight, or a role such as experts.down"
        )
    return (
        f"{where} matches no tensor of this model{hint}; correct it, or mark it "
        "`optional = true` if only other models have such a tensor"
    )


def _winners_without_overrides(
    recipe: Recipe, tensors: Sequence[GgufTensor], places: Mapping[str, Spot]
) -> set[int]:
    """Positions of the recipe's own rules that would decide if nothing were put before them."""
    own = {place: rule for place, rule in enumerate(recipe.rules) if not rule.override}
    if len(own) == len(recipe.rules):
        return set()
    alone, positions = replace(recipe, rules=tuple(own.values())), list(own)
    found = (_winner(alone, places[tensor.name], fixed_type(tensor, recipe)) for tensor in tensors)
    return {positions[winner] for winner in found if winner is not None}
