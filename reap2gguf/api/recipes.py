"""What recipes give a model, tensor by tensor, decided from headers alone."""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

from reap2gguf.api.opening import PathLike, ProgressLike, to_progress
from reap2gguf.errors import UnsupportedModelError
from reap2gguf.options import check_bool
from reap2gguf.progress import working
from reap2gguf.quantizing.named import check_tensor_types, one_recipe

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from reap2gguf.comparing.opening import Opened
    from reap2gguf.models.contract import MoeModel
    from reap2gguf.models.description import GgufTensor
    from reap2gguf.progress import Progress
    from reap2gguf.quantizing.recipe import Recipe
    from reap2gguf.quantizing.resolve import ResolvedRecipe
    from reap2gguf.quantizing.role_table import RecipeDifference, RecipeTable


def recipe_table(
    recipe: PathLike,
    model: PathLike | None = None,
    *,
    tensor_types: Sequence[str] | Mapping[str, str] = (),
    weighted: bool = True,
    progress: ProgressLike = None,
) -> RecipeTable:
    """The type that a recipe gives each tensor of MODEL, by role and layers, and the file's size.

    `model` is a folder, a GGUF file, a folder of GGUF files of one model, or either on the Hub; by
    default the bundled example. Of several files the first counts. `tensor_types` come before the
    recipe's rules. Some file types depend on whether an importance matrix is used: `weighted`.
    Raises RecipeError, UnsupportedModelError for a GGUF file of an unknown model, and what opening
    a model raises.
    """
    overrides = check_tensor_types(tensor_types)
    asked = _load(recipe, overrides)
    check_bool("weighted", weighted)
    with ExitStack() as stack:
        opened = open_described(model, stack, to_progress(progress))
        return _table(opened, opened.resolve(asked, weighted))


def compare_recipes(
    first: PathLike,
    second: PathLike,
    model: PathLike | None = None,
    *,
    weighted: bool = True,
    progress: ProgressLike = None,
) -> RecipeDifference:
    """The tensors of MODEL that two recipes give different types, by role and layers.

    `model` and `weighted` are as in `recipe_table`, which says what is raised.
    """
    asked = _load(first), _load(second)
    check_bool("weighted", weighted)
    with ExitStack() as stack:
        opened = open_described(model, stack, to_progress(progress))
        resolved = opened.resolve(asked[0], weighted), opened.resolve(asked[1], weighted)
        tables = _table(opened, resolved[0]), _table(opened, resolved[1])
    from reap2gguf.quantizing.role_table import difference

    return difference(resolved, tables)


def _load(recipe: PathLike, overrides: Sequence[str] = ()) -> Recipe:
    from reap2gguf.quantizing.overrides import read_overrides
    from reap2gguf.quantizing.recipe import load_recipe

    return load_recipe(one_recipe(recipe)).with_overrides(read_overrides(overrides))


@dataclass(frozen=True)
class Described:
    """A model whose tensors are known."""

    opened: Opened
    model: MoeModel
    tensors: Sequence[GgufTensor]

    def resolve(self, recipe: Recipe, weighted: bool) -> ResolvedRecipe:
        from reap2gguf.quantizing.resolve import resolve

        facts = self.model.facts
        return resolve(recipe, self.tensors, facts, facts.n_experts, weighted)

    def file_bytes(self, recipe: ResolvedRecipe) -> int:
        """The size of a recipe's file; a GGUF file's own header stays as it is."""
        from reap2gguf.fitting.fitted import tensor_bytes
        from reap2gguf.gguf_files.writer import padded

        header, checkpoint = self.opened.header, self.opened.checkpoint
        if header is None:
            assert checkpoint is not None
            from reap2gguf.exporting.file_size import planned_file

            label = self.opened.label.rpartition("/")[2]
            return planned_file(checkpoint, self.model, label, recipe).n_bytes
        stored = sum(padded(one.n_bytes, header.alignment) for one in header.tensors.values())
        made = sum(tensor_bytes(entry.tensor, entry.tensor_type) for entry in recipe.table)
        return header.n_bytes - stored + made


def open_described(model: PathLike | None, stack: ExitStack, progress: Progress) -> Described:
    """The first model that a name stands for, with its tensors."""
    from reap2gguf.comparing.opening import open_all
    from reap2gguf.resources import example_checkpoint

    name = str(example_checkpoint()) if model is None else os.fspath(model)
    with working(progress, f"Reading {name}"):
        opened = open_all([name], stack, progress)[0]
    if opened.model is None:
        raise UnsupportedModelError(
            f"{opened.label}: its tensors are not known, so no recipe can be applied to them: "
            f"{opened.problem}"
        )
    if opened.in_gguf is not None:
        stored = opened.in_gguf.template
    else:
        assert opened.checkpoint is not None
        stored = opened.checkpoint.tensors
    return Described(opened, opened.model, opened.model.gguf_tensors(stored))


def _table(opened: Described, resolved: ResolvedRecipe) -> RecipeTable:
    from reap2gguf.quantizing.role_table import table_of

    return table_of(resolved, opened.opened.label, opened.file_bytes(resolved))
