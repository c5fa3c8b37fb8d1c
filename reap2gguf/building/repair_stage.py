"""The stage that repairs the kept experts, where that is asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

from reap2gguf.artifacts.made_with import COMPUTING
from reap2gguf.atomic import remove, rename
from reap2gguf.building.repair_record import REPAIRED_CANDIDATE, record_of
from reap2gguf.building.stage import Run, Stage, needed
from reap2gguf.pruning.layer_files import identity_of
from reap2gguf.pruning.replaced import ReplacedView
from reap2gguf.repairing.limits import repaired_layers
from reap2gguf.repairing.record import RepairedLayer, RepairFolder

if TYPE_CHECKING:
    from reap2gguf.artifacts.texts import ObservationRows
    from reap2gguf.building.plan import Plan
    from reap2gguf.building.text_stage import ReadTexts
    from reap2gguf.bundle.records import RepairRecord
    from reap2gguf.pruning.view import PrunedView
    from reap2gguf.repairing.layer import RepairKind


@dataclass(frozen=True)
class Repaired:
    """The repaired model, and what each layer's repair came to."""

    view: ReplacedView
    layers: Mapping[int, RepairedLayer]


class Repair(Stage[Repaired]):
    """Fits the kept experts' `down_proj` to what the original layers give.

    Its files are what safetensors and GGUF are written from and compared with.
    """

    name = "repair"
    libraries: ClassVar[Sequence[str]] = COMPUTING

    @classmethod
    def is_asked(cls, plan: Plan) -> bool:
        return plan.chooses or plan.repairs

    def __init__(self, run: Run, pruned: PrunedView, texts: ReadTexts) -> None:
        super().__init__(run)
        self._pruned = pruned
        self._texts = texts

    @property
    def _rows(self) -> ObservationRows:
        return needed(self._texts.result.rows)

    def make_key(self) -> str:
        return self.run.keys.repair(self._pruned, self._rows, self.run.plan.repair)

    @property
    def path(self) -> Path:
        """The folder of its files."""
        return self.run.work.root / ".repaired"  # no name of a bundle begins with a dot

    @property
    def candidate(self) -> Path:
        """The folder of a choice with the files of the candidate that it repaired."""
        return self.run.work.root / REPAIRED_CANDIDATE

    @property
    def outputs(self) -> Sequence[Path]:
        return (self.path,)

    def clear(self) -> None:
        remove(self.path)

    @property
    def _folder(self) -> RepairFolder:
        return RepairFolder(self.path, self.key)

    def compute(self) -> Mapping[str, Any]:
        from reap2gguf.repairing.sweep import repair  # loads torch

        if not self.path.exists() and self.candidate.is_dir():
            rename(self.candidate, self.path)  # a choice has repaired it already
        if self.is_intact():
            return {}
        kind = cast("RepairKind", self.run.plan.repair)
        options, progress = self.compute_options, self.run.progress
        repair(self._pruned, self._rows.rows, kind, self._folder, options, progress)
        return {}

    def load(self) -> Repaired:
        layers = repaired_layers(self._pruned.model)
        found = self._folder.load_all(layers)
        identity = identity_of(found.values())
        view = ReplacedView(self._pruned, self._folder.open(layers), None, identity)
        self.run.held.callback(view.close)
        return Repaired(view, found)

    def is_intact(self) -> bool:
        layers = repaired_layers(self._pruned.model)
        return all(self._folder.load(layer) is not None for layer in layers)

    @cached_property
    def record(self) -> RepairRecord:
        """What the manifest says of it."""
        kind, found = self.run.plan.repair, self.result
        return record_of(kind, self._rows, found.layers, len(found.view.replaced))
