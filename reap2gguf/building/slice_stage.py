"""The stage that writes the GGUF file of a build that slices another one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reap2gguf.atomic import make_folder, remove
from reap2gguf.building.seals import written_seals
from reap2gguf.building.stages import Export
from reap2gguf.disk.hashing import Hashes
from reap2gguf.exporting.header_facts import pruning_values
from reap2gguf.gguf_source.checking import violations_in
from reap2gguf.gguf_source.checkpoint import GgufCheckpoint
from reap2gguf.gguf_source.writing import PrunedGguf, planned, write_pruned_gguf
from reap2gguf.verifying.report import Level, passed_file

if TYPE_CHECKING:
    from reap2gguf.building.stage import Stage

_HELD_BYTES = 2**25  # what copies and compares holds


class Slice(Export):
    """Copies the blocks that stay into a GGUF file, or into as many parts as the source has."""

    @property
    def _plan(self) -> PrunedGguf:
        plan = self.run.plan
        checkpoint = plan.checkpoint
        assert isinstance(checkpoint, GgufCheckpoint)
        kept = self._pruned.kept
        earlier = None if plan.history is None else plan.history.after(kept)
        own = pruning_values(
            plan.source.gguf_name, plan.method, plan.target.n_experts, kept, earlier=earlier
        )
        (output,) = self.files
        return planned(checkpoint, self._pruned, output, plan.name, own)

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
