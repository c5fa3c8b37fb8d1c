"""The stage that merges experts, where the method does that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from reap2gguf.artifacts.made_with import COMPUTING
from reap2gguf.atomic import remove
from reap2gguf.building.merge_record import merge_record_of
from reap2gguf.building.stage import Run, Stage, needed
from reap2gguf.merging.folder import MergedLayer, MergeFolder, view_of
from reap2gguf.merging.limits import check_merge

if TYPE_CHECKING:
    from reap2gguf.artifacts.texts import ObservationRows
    from reap2gguf.building.plan import Plan
    from reap2gguf.building.text_stage import ReadTexts
    from reap2gguf.bundle.records import MergeRecord
    from reap2gguf.pruning.replaced import ReplacedView
    from reap2gguf.pruning.select import Kept


@dataclass(frozen=True)
class Merged:
    """The merged model, and what each layer's merge came to."""

    view: ReplacedView
    layers: Mapping[int, MergedLayer]


class Merge(Stage[Merged]):
    """Finds which experts become one, and their weights.

    Its files are what safetensors and GGUF are written from and compared with.
    """

    name = "merge"
    libraries: ClassVar[Sequence[str]] = (*COMPUTING, "scipy")

    @classmethod
    def is_asked(cls, plan: Plan) -> bool:
        return plan.merges

    def __init__(self, run: Run, texts: ReadTexts) -> None:
        super().__init__(run)
        self._texts = texts

    @property
    def _rows(self) -> ObservationRows:
        return needed(self._texts.result.rows)

    @property
    def _protected(self) -> Kept:
        plan = self.run.plan
        of = plan.checkpoint, plan.model, plan.method, plan.target
        return check_merge(*of, plan.options.protection, plan.group_size).all

    def make_key(self) -> str:
        return self.run.keys.merge(self._rows, self._protected)

    @property
    def path(self) -> Path:
        """The folder of its files."""
        return self.run.work.root / ".merged"  # no name of a bundle begins with a dot

    @property
    def outputs(self) -> Sequence[Path]:
        return (self.path,)

    def clear(self) -> None:
        remove(self.path)

    @property
    def _folder(self) -> MergeFolder:
        return MergeFolder(self.path, self.key)

    def compute(self) -> Mapping[str, Any]:
        from reap2gguf.merging.layer import MergeSpec
        from reap2gguf.merging.sweep import merge  # loads torch

        plan, progress = self.run.plan, self.run.progress
        spec = MergeSpec(plan.method, plan.target, plan.group_size, self._protected)
        options, rows = self.compute_options, self._rows.rows
        merge(plan.checkpoint, plan.model, rows, spec, self._folder, options, progress)
        return {}

    def load(self) -> Merged:
        plan = self.run.plan
        found = self._folder.load_all(sorted(plan.model.facts.moe_layers))
        view = view_of(plan.checkpoint, plan.model, found, self._folder)
        self.run.held.callback(view.close)
        return Merged(view, found)

    def is_intact(self) -> bool:
        layers = self.run.plan.model.facts.moe_layers
        return all(self._folder.load(layer) is not None for layer in layers)

    @cached_property
    def record(self) -> MergeRecord:
        """What the manifest says of it."""
        plan, found = self.run.plan, self.result
        how = plan.method, plan.group_size, plan.model
        return merge_record_of(*how, self._rows, found.layers, len(found.view.replaced))
