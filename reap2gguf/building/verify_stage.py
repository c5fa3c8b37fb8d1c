"""The last stage of a build: both formats are read back from the disk and compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reap2gguf.atomic import remove
from reap2gguf.building.exact import exact_recipes
from reap2gguf.building.keys import VERIFY_FORMAT, stage_key
from reap2gguf.building.seals import Seal, read_seals, stamps
from reap2gguf.building.stage import Run, Stage
from reap2gguf.building.stages import Export, Prune
from reap2gguf.bundle.layout import CARD_FILE, HF_PICTURES, MANIFEST_FILE
from reap2gguf.bundle.members import check_members
from reap2gguf.errors import VerificationError
from reap2gguf.pruning.write import written_names
from reap2gguf.verifying.gguf_file import (
    ExpectedGguf,
    GgufCheck,
    check_ggufs,
    check_side_file,
)
from reap2gguf.verifying.hf_folder import check_pruned
from reap2gguf.verifying.memory import COMPARING_BYTES, comparing_bytes
from reap2gguf.verifying.report import Level, passed_file, passed_folder

if TYPE_CHECKING:
    from reap2gguf.pruning.view import PrunedView


Found = tuple[list[str], list[str]]  # violations, and what was checked


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

    def __init__(
        self, run: Run, pruned: PrunedView, export: Export, prune: Prune | None = None
    ) -> None:
        """`prune` writes the safetensors, where the build has any."""
        super().__init__(run)
        self._pruned = pruned
        self._export = export
        self._prune = prune

    def make_key(self) -> str:
        return stage_key("verify", VERIFY_FORMAT, self._export.key)

    @property
    def outputs(self) -> Sequence[Path]:
        made = (self.run.work.hf,) if self.run.plan.writes_hf else ()
        return (*made, *self._export.outputs)

    @property
    def after(self) -> Sequence[Stage[Any]]:
        return (self._export,) if self._prune is None else (self._prune,)

    @property
    def held_bytes(self) -> int:
        compute = self.run.plan.options.compute
        values = comparing_bytes(compute.threads, compute.likely_device == "cuda")
        # GGUF files are compared when the export, which is beside it until then, has ended
        return max(COMPARING_BYTES * compute.threads, values - self._export.held_bytes)

    def compute(self) -> Mapping[str, Any]:
        """The safetensors are checked while the GGUF files are still written."""
        work, passed = self.run.work, list[str]()
        seals: dict[str, Mapping[str, Any]] = {}
        for name in (CARD_FILE, MANIFEST_FILE, *HF_PICTURES):
            remove(work.hf / name)  # of an interrupted record, made again after this
        for outputs, check in self._parts:
            before = stamps(work.root, outputs)
            violations, lines = check()
            if violations:
                raise VerificationError(
                    violations,
                    "run it again with --fresh; if the same tensors differ again, give them a type "
                    "with more bits in the recipe",
                )
            # of the bytes that were verified, or it is refused
            seals |= self.run.seal(outputs, before)
            passed += lines
            self.wait_for(self._export)
        return {"passed": passed, "seals": seals}

    @property
    def _parts(self) -> Sequence[tuple[Sequence[Path], Callable[[], Found]]]:
        """Files, and how to check them, in the order in which they are written."""
        hf = ((self.run.work.hf,), self._check_folder)
        gguf = (self._export.outputs, self._check_files)
        return (hf, gguf) if self.run.plan.writes_hf else (gguf,)

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

    def _check_folder(self) -> Found:
        """What of the safetensors differs from the plan, and what was checked."""
        folder, pruned = self.run.work.hf, self._pruned
        violations = list(check_members(folder, written_names(pruned)))
        threads = self.run.plan.options.compute.threads
        violations += check_pruned(folder, pruned, self.run.progress, threads)
        n_stored = len(pruned.stored.tensors)
        what = "merge" if self.run.plan.merges else "repair"
        return violations, [passed_folder(n_stored, len(pruned.replaced), what)]

    def _check_files(self) -> Found:
        """The same of the GGUF files."""
        if (compared := self._export.compared()) is not None:
            return compared
        run, pruned, model = self.run, self._pruned, self._pruned.model
        compute, progress = run.plan.options.compute, run.progress
        threads = compute.threads
        violations: list[str] = []
        passed: list[str] = []
        exact = exact_recipes(run.plan, compute.likely_device == "cuda")
        checks = [
            GgufCheck(
                path, self._export.expected(recipe), self._export.exactness(recipe.name in exact)
            )
            for path, recipe in self._export.files.items()
        ]
        violations += check_ggufs(checks, (pruned, model), threads, progress, compute.device)
        for check, recipe in zip(checks, self._export.files.values(), strict=True):
            level = Level.EXACT if check.exactness.every_type else Level.VALUES
            passed.append(passed_file(check.path.name, len(recipe.table), level))
        for path, side in self._export.sides.items():
            expected = ExpectedGguf(side.tensor_types(), names=self._export.names())
            source = (pruned, model, [side])
            violations += check_side_file(path, expected, source, threads, progress)
            passed.append(passed_file(path.name, len(side.tensors), Level.EXACT))
        return violations, passed

    def load(self) -> Verified:
        return Verified(list(self.facts["passed"]), read_seals(self.facts.get("seals")))
