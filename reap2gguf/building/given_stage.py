"""The stage that takes a given importance matrix into a bundle, in place of a calibration pass."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from reap2gguf.atomic import make_folder
from reap2gguf.building.keys import stage_key
from reap2gguf.building.stages import Importance
from reap2gguf.gguf_files.imatrix import save_both
from reap2gguf.gguf_files.imatrix_coverage import hits_line, layer_hits

if TYPE_CHECKING:
    from reap2gguf.building.given import GivenImatrix
    from reap2gguf.building.stage import Run
    from reap2gguf.building.stages import ReadTexts
    from reap2gguf.pruning.view import PrunedView


class GivenImportance(Importance):
    """Writes a matrix that the user has in both formats."""

    libraries = ()
    is_sweep = False  # it computes nothing, so the other processes of torchrun do not take part

    def __init__(
        self, run: Run, pruned: PrunedView, texts: ReadTexts | None, given: GivenImatrix
    ) -> None:
        super().__init__(run, pruned, texts)
        self._given = given

    @property
    def label(self) -> str:
        return self._given.file

    def make_key(self) -> str:
        return stage_key(self.run.keys.pruned(self._pruned.kept), self._given.sha256)

    def compute(self) -> Mapping[str, Any]:
        make_folder(self.run.work.gguf)
        imatrix = self._given.of(self._pruned.kept)
        n_unseen = sum(imatrix.unseen_experts().values())
        hits = layer_hits(imatrix)
        if n_unseen and self._given.cut_from is not None:
            self.run.progress.note(
                f"{self._given.file}: {n_unseen:,} of the experts that stay were never hit; they "
                "are quantized with equal weights"
            )
        if hits and self._given.cut_from is not None:
            self.run.progress.note(f"{self._given.file}: of those that stay, {hits_line(hits)}")
        save_both(imatrix, self.path)
        return {
            "seals": self.run.seal(self.outputs),
            "unseen_experts": n_unseen,
            "expert_tokens": hits,
        }
