"""The stage that writes the GGUF file of a build that slices another one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reap2gguf.atomic import make_folder, remove
from reap2gguf.building.seals import written_seals
from reap2gguf.building.sliced_files import sliced_files
from reap2gguf.building.stages import Export
from reap2gguf.disk.hashing import Hashes
from reap2gguf.gguf_source.checking import violations_in
from reap2gguf.gguf_source.writing import PrunedGguf, write_pruned_gguf
from reap2gguf.verifying.report import Level, passed_file

if TYPE_CHECKING:
    from reap2gguf.building.stage import Stage

_HELD_BYTES = 2**25  # what copies and compares holds


class Slice(Export):
    """Copies the blocks that stay into a GGUF file, or into as many parts as the source has."""

    @property
    def _plan(self) -> PrunedGguf:
        return sliced_files(self.run.plan, self._pruned, self.run.work.gguf)

    @property
    def outputs(self) -> Sequence[Path]:
        return [file.path for file in self._plan.files]

    @property
    def held_bytes(self) -> int:
        return _HELD_BYTES

    @property
    def after(self) -> Sequence[Stage[Any]]:
        return ()

    def compute(self) -> Mapping[str, Any]:
        run, pruned = self.run, self._plan
        make_folder(run.work.gguf)
        for file in pruned.files:
            remove(file.path)  # of an attempt that was not marked as finished
        (output,) = self.files
        fingerprint = run.plan.checkpoint.fingerprint()
        with Hashes() as hashes:
            write_pruned_gguf(pruned, fingerprint, output, run.progress, hashes, compares=False)
            return {"written": written_seals(run.work.root, hashes)}

    def compared(self) -> tuple[list[str], list[str]]:
        """What differs from the source, block by block, and what was compared."""
        pruned = self._plan
        files = [(file.path, file.source, file.start) for file in pruned.files]
        violations = list(violations_in(pruned.slices, files, self.run.progress))
        ((path, recipe),) = self.files.items()
        return violations, [passed_file(path.name, len(recipe.table), Level.EXACT)]
