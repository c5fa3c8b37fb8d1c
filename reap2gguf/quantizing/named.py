"""Recipes as a user names them: by name, path or text, with labels and overrides."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from reap2gguf.errors import ParameterError

DEFAULT_RECIPE = "Q4_K_M"
DEFAULT_RECIPES = (DEFAULT_RECIPE,)  # this object: none was named


@dataclass(frozen=True)
class RecipeText:
    """A recipe as TOML text, such as a manifest records it."""

    name: str
    text: str
    label: str | None = None  # in place of the one in the text


def named_recipes(given: object, may_be_none: bool = False) -> tuple[str | RecipeText, ...]:
    """Recipes by name, path or text. Raise UsageError if they are none."""
    if isinstance(given, str | os.PathLike | RecipeText):
        given = (given,)
    if not isinstance(given, Iterable) or isinstance(given, bytes):
        raise ParameterError(f"recipes is {given!r}, expected names or paths of recipes", "recipes")
    recipes = tuple(given)
    if not recipes and not may_be_none:
        raise ParameterError(
            "recipes is empty, expected at least one recipe, such as Q4_K_M", "recipes"
        )
    found: list[str | RecipeText] = []
    for recipe in recipes:
        found += [recipe] if isinstance(recipe, RecipeText) else splitnamed_recipes(recipe)
    return DEFAULT_RECIPES if given is DEFAULT_RECIPES else tuple(found)


def splitnamed_recipes(recipe: object) -> list[str]:
    """The names in a list with commas, such as "Q4_K_M,Q8_0"; an existing path is one name.

    Raise UsageError if it is not a text or a path, or holds NUL, or has nothing between two commas.
    """
    name = check_recipe(recipe)
    if "\0" in name:
        raise ParameterError(f"recipe is {name!r}, expected text without NUL characters", "recipe")
    if "," not in name or os.path.exists(os.path.expanduser(name)):
        return [name]
    names = [part.strip() for part in name.split(",")]
    if "" in names:
        raise ParameterError(
            f"recipe is {name!r}, expected names with commas between them", "recipe"
        )
    return names


def one_recipe(recipe: object) -> str:
    """A recipe's name or path. Raise UsageError if it is neither, and for a list of names."""
    names = splitnamed_recipes(recipe)
    if len(names) > 1:
        raise ParameterError(
            f"recipe is {recipe!r}, expected one recipe for one file; `reap2gguf build` writes "
            "several files",
            "recipe",
        )
    return names[0]


def check_recipe(recipe: object) -> str:
    """A recipe's name or path as text. Raise UsageError if it is neither."""
    if not isinstance(recipe, str | os.PathLike):
        raise ParameterError(
            f"recipe is {recipe!r}, expected the name or path of a recipe", "recipe"
        )
    return str(recipe)


def check_tensor_types(given: object) -> tuple[str, ...]:
    """Texts PATTERN=TYPE, from a list or a mapping. Raise UsageError for anything else."""
    if isinstance(given, Mapping):
        given = [f"{pattern}={name}" for pattern, name in given.items()]
    if isinstance(given, Iterable) and not isinstance(given, str | bytes):
        found = tuple(given)
        if all(isinstance(text, str) for text in found):
            return found
    raise ParameterError(
        f"tensor_types is {given!r}, expected a list such as ['attn_v=Q5_K']", "tensor_types"
    )


def check_labels(labels: object) -> dict[str, str]:
    """Labels by recipe. Raise UsageError if they are not a mapping of texts."""
    if isinstance(labels, Mapping):
        found = dict(labels)
        if all(isinstance(text, str) for entry in found.items() for text in entry):
            return found
    raise ParameterError(
        f"labels is {labels!r}, expected a mapping from recipes to labels", "labels"
    )
