"""The last stage of a build: both formats are read back from the disk and compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reap2gguf.atomic import remove
from reap2gguf.building.exact import exact_recipes
from reap2gguf.building.keys import VERIFY_FORMAT, stage_key
from reap2gguf.building.seals import Seal, read_seals, stamps
from reap2gguf.building.stage import Run, Stage
from reap2gguf.building.stages import Export, Prune
from reap2gguf.bundle.layout import CARD_FILE, MANIFEST_FILE
from reap2gguf.bundle.members import check_members
from reap2gguf.errors import VerificationError
from reap2gguf.pruning.write import written_names
from reap2gguf.verifying.gguf_file import ExpectedGguf, check_gguf, check_side_file
from reap2gguf.verifying.hf_folder import check_pruned
from reap2gguf.verifying.report import Level, passed_file, passed_folder

if TYPE_CHECKING:
    from reap2gguf.pruning.view import PrunedView


@dataclass(frozen=True)
class Verified:
    """What was checked, one line each, and the files as they were then."""

    passed: list[str]
    seals: Mapping[str, Seal]  # by path below the work folder


class Verify(Stage[Verified]):
    """Reads both formats back from the disk and compares them with the plan and the source.

    Its result says what was checked, and seals the files, so that nothing else is published. Raises
    VerificationError if anything differs.
    """

    name = "verify"

    def __init__(self, run: Run, pruned: PrunedView, export: Export) -> None:
        super().__init__(run)
        self._pruned = pruned
        self._export = export

    def make_key(self) -> str:
        return stage_key("verify", VERIFY_FORMAT, self._export.key)

    @property
    def outputs(self) -> Sequence[Path]:
        made = (self.run.work.hf,) if self.run.plan.writes_hf else ()
        return (*made, *self._export.outputs)

    def compute(self) -> Mapping[str, Any]:
        for name in (CARD_FILE, MANIFEST_FILE):
            remove(self.run.work.hf / name)  # of an interrupted record, made again after this
        before = stamps(self.run.work.root, self.outputs)
        violations, passed = self._check()
        if violations:
            raise VerificationError(
                violations,
                "run it again with --fresh; if the same tensors differ again, give them a type "
                "with more bits in the recipe",
            )
        # of the bytes that were verified, or it is refused
        return {"passed": passed, "seals": self.run.seal(self.outputs, before)}

    def is_intact(self) -> bool:
        """Raises VerificationError for a file whose bytes are not those that were verified."""
        run = self.run
        if not (names := run.unsealed(self.result.seals)):
            return bool(self.result.seals)
        for stage in (Prune, Export, Verify):
            run.marks.void(stage.name)
        raise VerificationError(
            [
                f"{run.work.root / name}: its SHA-256 is not that of what was verified"
                for name in names
            ],
            "run the same command again: these files are written and verified again",
        )

    def _check(self) -> tuple[list[str], list[str]]:
        """What differs from the plan, and what was checked."""
        run, pruned, model = self.run, self._pruned, self._pruned.model
        threads, progress = run.plan.options.compute.threads, run.progress
        violations: list[str] = []
        passed: list[str] = []
        if run.plan.writes_hf:
            violations += check_members(run.work.hf, written_names(pruned))
            violations += check_pruned(run.work.hf, pruned, progress, threads)
            passed.append(passed_folder(len(pruned.tensors)))
        exact = exact_recipes(run.plan, run.plan.options.compute.likely_device == "cuda")
        for path, recipe in self._export.files.items():
            expected = self._export.expected(recipe)
            exactness = self._export.exactness(recipe.name in exact)
            opened = pruned, model
            violations += check_gguf(path, expected, opened, threads, progress, exactness)
            level = Level.EXACT if exactness.every_type else Level.VALUES
            passed.append(passed_file(path.name, len(recipe.table), level))
        for path, side in self._export.sides.items():
            expected = ExpectedGguf(side.tensor_types(), names=self._export.names())
            source = (pruned, model, [side])
            violations += check_side_file(path, expected, source, threads, progress)
            passed.append(passed_file(path.name, len(side.tensors), Level.EXACT))
        return violations, passed

    def load(self) -> Verified:
        return Verified(list(self.facts["passed"]), read_seals(self.facts.get("seals")))
