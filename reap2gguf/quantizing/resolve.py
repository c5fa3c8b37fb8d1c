"""A recipe applied to a model: the type of every tensor, decided before any is read."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from gguf import GGMLQuantizationType as Type
from gguf import LlamaFileType

from reap2gguf.errors import RecipeError
from reap2gguf.ggml import NEEDS_IMPORTANCE, UNWEIGHTED_TYPES
from reap2gguf.gguf_files.tensor_types import block_of, row_bytes
from reap2gguf.models.description import is_of_experts
from reap2gguf.models.roles import spots
from reap2gguf.quantizing.deciding import fixed_type, refuse_idle_rules, winner
from reap2gguf.quantizing.file_types import Part
from reap2gguf.quantizing.mixture import MixtureChooser, mixture_part, type_that_fits

if TYPE_CHECKING:
    from reap2gguf.models.description import GgufTensor, ModelFacts
    from reap2gguf.quantizing.minimum import Minimum
    from reap2gguf.quantizing.recipe import Recipe, Rule

_SMALLEST_BLOCK = 32
_MAX_STEPS = 4_000_000  # what rules cost (`Selector.cost`), for each tensor: some seconds


@dataclass(frozen=True)
class ResolvedTensor:
    """A tensor, its type, and the rule that gave it (None: the file type's mixture)."""

    tensor: GgufTensor
    tensor_type: Type
    by: Rule | None
    # the type that was meant, if rows do not fill its blocks, or the checkpoint's own are kept
    wanted: Type | None = None
    minimum: Minimum | None = None  # of importance that the recipe asks for

    @property
    def rule(self) -> str | None:
        """What the rule matches."""
        return None if self.by is None else self.by.selector.words

    @property
    def is_copied(self) -> bool:
        """Whether the file holds the checkpoint's own blocks."""
        return self.tensor.is_copied_as(self.tensor_type)

    @property
    def is_as_stored(self) -> bool:
        """Whether they are of a type that stays where one of no fewer bits was meant."""
        return self.tensor_type is self.tensor.block_type

    @property
    def is_sliced(self) -> bool:
        """Whether these are those of a GGUF source."""
        return self.tensor.is_sliced_as(self.tensor_type)

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

    @property
    def n_sliced(self) -> int:
        """Tensors that keep the blocks of a GGUF source."""
        return sum(entry.is_sliced for entry in self.table)

    @property
    def asks_importance(self) -> bool:
        """Whether it asks for a minimum of importance."""
        return any(entry.minimum is not None and entry.minimum.share > 0 for entry in self.table)

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
            if not entry.is_copied
            and (
                entry.tensor_type in NEEDS_IMPORTANCE
                or (
                    entry.tensor_type in of_file_type
                    and mixture_part(entry.tensor.name) not in (Part.TOKEN_EMBD, Part.OUTPUT)
                )
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
    _check_steps(recipe, len(tensors))
    places = spots([tensor.name for tensor in tensors])
    winners: set[int] = set()
    resolved: dict[str, ResolvedTensor] = {}
    # the mixture's choice for a tensor depends on those before it
    for tensor in sorted(tensors, key=_quantize_order):
        fixed = fixed_type(tensor, recipe)
        first = winner(recipe, places[tensor.name], fixed)
        rule = None if first is None else recipe.rules[first]
        if first is not None:
            winners.add(first)
        resolved[tensor.name] = _resolved(tensor, recipe, rule, fixed, chooser)
    refuse_idle_rules(recipe, winners, tensors, places)
    return ResolvedRecipe(recipe, tuple(resolved[tensor.name] for tensor in tensors))


def _resolved(
    tensor: GgufTensor,
    recipe: Recipe,
    rule: Rule | None,
    fixed: Type | None,
    chooser: MixtureChooser,
) -> ResolvedTensor:
    """The type that `rule` gives a tensor; without one, `fixed` or what the mixture chooses."""
    if rule is not None:
        wanted = tensor_type = rule.tensor_type
        if rule.fallback:
            tensor_type = type_that_fits(wanted, tensor.n_columns)
        else:
            _check_rows(tensor, rule, recipe)
    elif fixed is not None:
        wanted = tensor_type = fixed
    else:
        wanted = chooser.choose(tensor)
        tensor_type = chooser.fitted(tensor, wanted)
    if rule is None or rule.fallback:
        tensor_type = _kept(tensor, tensor_type)
    meant = None if wanted is tensor_type else wanted
    minimum = _minimum(tensor, tensor_type, rule, recipe)
    return ResolvedTensor(tensor, tensor_type, rule, meant, minimum)


def _check_steps(recipe: Recipe, n_tensors: int) -> None:
    """Raise RecipeError for a recipe whose rules would take too long to match."""
    n_steps = sum(rule.selector.cost for rule in recipe.rules) * n_tensors
    if n_steps > _MAX_STEPS:
        raise RecipeError(
            f"recipe {recipe.name!r}: {len(recipe.rules):,} rules for {n_tensors:,} tensors, "
            "too many to match; use fewer rules, with few stars or short regular expressions"
        )


def _kept(tensor: GgufTensor, tensor_type: Type) -> Type:
    """The type in which the checkpoint has a tensor's blocks, unless `tensor_type` is smaller.

    More bits than were stored would hold nothing more.
    """
    kept, n_columns = tensor.block_type, tensor.n_columns
    if kept is None or row_bytes(tensor_type, n_columns) < row_bytes(kept, n_columns):
        return tensor_type
    return kept


def _minimum(
    tensor: GgufTensor, tensor_type: Type, by: Rule | None, recipe: Recipe
) -> Minimum | None:
    """What a recipe asks of a tensor's importance; nothing where that changes no byte."""
    if tensor_type.name in UNWEIGHTED_TYPES or tensor.is_copied_as(tensor_type):
        return None
    if by is not None and by.minimum is not None:
        return by.minimum
    return recipe.minimum if is_of_experts(tensor.name) else None


def _n_blocks(tensors: Sequence[GgufTensor]) -> int:
    layers = (re.match(r"blk\.(\d+)\.", tensor.name) for tensor in tensors)
    return 1 + max((int(match[1]) for match in layers if match), default=0)


def _quantize_order(tensor: GgufTensor) -> tuple[int, str]:
    """The order in which llama.cpp meets tensors: by layer number, then by name."""
    layer = re.match(r"blk\.(\d+)\.", tensor.name)
    return (int(layer[1]) if layer else -1, tensor.name)


def _check_rows(tensor: GgufTensor, rule: Rule, recipe: Recipe) -> None:
    block = block_of(rule.tensor_type)[0]
    if tensor.n_columns % block:
        fits = tensor.n_columns % _SMALLEST_BLOCK == 0
        other = "F16, BF16 or F32"
        if fits:
            other = "a type with blocks of 32, such as Q8_0 or IQ4_NL, or add `fallback = true`"
        raise RecipeError(
            f"{rule.place(recipe.name)}: {rule.title}: {rule.tensor_type.name} has blocks of "
            f"{block}, and {tensor.name} has rows of {tensor.n_columns}; choose {other}"
        )
