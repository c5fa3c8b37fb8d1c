"""The stage that chooses the types of a file for a size, when the importance matrix is there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reap2gguf.atomic import write_whole
from reap2gguf.building.keys import FIT_FORMAT, ggml_identity, stage_key
from reap2gguf.building.sized import choose_types
from reap2gguf.building.stage import Run, Stage
from reap2gguf.quantizing.recipe import parse_recipe
from reap2gguf.quantizing.resolve import ResolvedRecipe

if TYPE_CHECKING:
    from reap2gguf.building.sized import SizedFile
    from reap2gguf.building.stages import Importance
    from reap2gguf.exporting.header_facts import HeaderNames
    from reap2gguf.pruning.view import PrunedView


class Fit(Stage[ResolvedRecipe]):
    """Writes the recipe of a file that is to have a size, as TOML."""

    name = "fit"

    def __init__(
        self, run: Run, pruned: PrunedView, importance: Importance, names: HeaderNames
    ) -> None:
        """`names` are those of the file's header, which counts."""
        super().__init__(run)
        self._pruned = pruned
        self._importance = importance
        self._names = names

    @property
    def _sized(self) -> SizedFile:
        sized = self.run.plan.sized
        assert sized is not None  # a build without a target does not have this stage
        return sized

    def make_key(self) -> str:
        # the guess that stands for the file says what was asked for
        asked = [recipe.source for recipe in self.run.keys.plan.recipes[-1:]]
        named = self._sized.named
        return stage_key(FIT_FORMAT, self._importance.key, ggml_identity(), named, asked)

    @property
    def outputs(self) -> Sequence[Path]:
        return (self.run.work.root / "fit.toml",)

    def compute(self) -> Mapping[str, Any]:
        pruned, imatrix = self._pruned, self._importance.path
        reference = pruned, pruned.model
        found = choose_types(self.run, self._sized, reference, pruned.kept, self._names, imatrix)
        write_whole(self.outputs[0], found.recipe.source)
        return {"damage": found.damage, "gap": found.gap}

    def load(self) -> ResolvedRecipe:
        path = self.outputs[0]
        source = path.read_text(encoding="utf-8")
        recipe = parse_recipe(source, self._sized.named.name, str(path))
        return self._sized.problem((self._pruned, self._pruned.model), ()).resolve(recipe)
