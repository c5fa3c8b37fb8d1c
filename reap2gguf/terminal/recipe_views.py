"""Recipes as text and as JSON: the list, one recipe, and its types for a model."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from reap2gguf.messages import parameters, size
from reap2gguf.models.reference import REFERENCE_FACTS, REFERENCE_NAME, reference_tensors
from reap2gguf.quantizing.file_types import MIXTURES
from reap2gguf.quantizing.recipe import Recipe, load_recipe, shipped_recipes
from reap2gguf.quantizing.resolve import ResolvedRecipe, resolve

_PER_LINE = 6  # file types


@dataclass
class TypeGroup:
    """Tensors of one name, in whatever layer, that get the same type for the same reason."""

    name: str  # blk.*.NAME for those of layers
    tensor_type: str
    rule: str | None
    n_tensors: int = 0
    n_weights: int = 0
    n_bytes: int = 0

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.n_bytes / self.n_weights


def type_groups(recipe: ResolvedRecipe) -> Sequence[TypeGroup]:
    """The type table with layer numbers collapsed, in the order of the tensors."""
    groups: dict[tuple[str, str, str | None], TypeGroup] = {}
    for entry in recipe.table:
        name = re.sub(r"^blk\.\d+\.", "blk.*.", entry.tensor.name)
        key = (name, entry.tensor_type.name, entry.rule)
        group = groups.setdefault(key, TypeGroup(*key))
        group.n_tensors += 1
        group.n_weights += prod(entry.tensor.shape)
        group.n_bytes += entry.n_bytes
    names = list(dict.fromkeys(name for name, _, _ in groups))
    return sorted(groups.values(), key=lambda group: names.index(group.name))


def reference_bits(recipe: Recipe) -> float:
    """Bits per weight of the reference model, unpruned and with an importance matrix."""
    facts = REFERENCE_FACTS
    tensors = reference_tensors()
    return resolve(recipe, tensors, facts, facts.n_experts, has_imatrix=True).bits_per_weight


def list_lines() -> Iterable[str]:
    """The shipped recipes, and llama.cpp's file types in a second block."""
    shipped = [load_recipe(name) for name in shipped_recipes()]
    width = max(len(recipe.name) for recipe in shipped)
    yield f"{'RECIPE':<{width}}  BITS  WHAT IT IS"
    for recipe in shipped:
        yield f"{recipe.name:<{width}}  {reference_bits(recipe):>4.1f}  {recipe.title}"
    yield ""
    yield "FILE TYPES OF LLAMA.CPP, with bits; each is a recipe as well (any case, - or _)"
    longest = max(map(len, MIXTURES))
    cells = [f"{name:<{longest}} {reference_bits(load_recipe(name)):>4.1f}" for name in MIXTURES]
    for start in range(0, len(cells), _PER_LINE):
        yield "   ".join(cells[start : start + _PER_LINE])
    yield ""
    yield f"BITS are per weight, for {REFERENCE_NAME}; `reap2gguf recipes check` has other models'."


def list_as_json() -> dict[str, Any]:
    """The same for programs."""
    return {
        "reference": REFERENCE_NAME,
        "recipes": [_summary(load_recipe(name)) for name in shipped_recipes()],
        "file_types": [{**_summary(load_recipe(name)), "name": name} for name in MIXTURES],
    }


def _summary(recipe: Recipe) -> dict[str, Any]:
    return {
        "name": recipe.name,
        "title": recipe.title,
        "label": recipe.label,
        "file_type": recipe.file_type,
        "bits_per_weight": round(reference_bits(recipe), 4),
    }


def recipe_lines(recipe: Recipe) -> Iterable[str]:
    """A recipe rule by rule."""
    yield f"{recipe.name}: {recipe.title}"
    yield f"  file type {recipe.file_type}, files end in -{recipe.label}.gguf"
    for rule in recipe.rules:
        only = "  (if the model has it)" if rule.optional else ""
        yield f"  {rule.selector.words:<28} {rule.tensor_type.name}{only}"


def recipe_as_json(recipe: Recipe) -> dict[str, Any]:
    """The same for programs, with the TOML text."""
    return {
        "name": recipe.name,
        "title": recipe.title,
        "label": recipe.label,
        "file_type": recipe.file_type,
        "rules": [
            {
                rule.selector.key: rule.match,
                "type": rule.tensor_type.name,
                "optional": rule.optional,
            }
            for rule in recipe.rules
        ],
        "toml": recipe.source,
    }


def check_lines(recipe: ResolvedRecipe, model: str) -> Iterable[str]:
    """The types that a model's tensors get, one line per name and type, and the total."""
    groups = type_groups(recipe)
    name_width = max(len(group.name) for group in groups)
    type_width = max(len(group.tensor_type) for group in groups)
    for group in groups:
        times = f"x{group.n_tensors}" if group.name.startswith("blk.") else ""
        because = f"  rule {group.rule}" if group.rule else ""
        yield (
            f"  {group.name:<{name_width}}  {group.tensor_type:<{type_width}}  {times:>5}  "
            f"{size(group.n_bytes):>10}  {group.bits_per_weight:>6.3f}{because}"
        )
    n_weights = sum(group.n_weights for group in groups)
    yield (
        f"{recipe.name}: fits {model}: {size(recipe.n_bytes)} for {parameters(n_weights)} weights, "
        f"{recipe.bits_per_weight:.2f} bits per weight"
    )


def check_as_json(recipe: ResolvedRecipe, model: str, notes: Sequence[str]) -> dict[str, Any]:
    """The same for programs, and the type of every tensor."""
    return {
        "recipe": recipe.name,
        "title": recipe.title,
        "label": recipe.label,
        "file_type": recipe.file_type,
        "model": model,
        "bytes": recipe.n_bytes,
        "bits_per_weight": round(recipe.bits_per_weight, 4),
        "groups": [
            {
                "tensors": group.name,
                "type": group.tensor_type,
                "rule": group.rule,
                "count": group.n_tensors,
                "weights": group.n_weights,
                "bytes": group.n_bytes,
                "bits_per_weight": round(group.bits_per_weight, 4),
            }
            for group in type_groups(recipe)
        ],
        "types": {name: found.name for name, found in recipe.tensor_types().items()},
        "notes": list(notes),
    }
