"""The stage that takes an importance matrix that is there into a bundle, without a pass of its own.

It was given as a file, or its sums come with the observations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from reap2gguf.atomic import make_folder
from reap2gguf.building.given import check_given_minimum, imatrix_of
from reap2gguf.building.keys import stage_key
from reap2gguf.building.stage import needed
from reap2gguf.building.stages import Importance
from reap2gguf.gguf_files.imatrix import save_both
from reap2gguf.gguf_files.imatrix_coverage import hits_line, layer_hits

if TYPE_CHECKING:
    from pathlib import Path

    from reap2gguf.building.given import GivenImatrix
    from reap2gguf.building.seals import Seal
    from reap2gguf.building.stage import Run
    from reap2gguf.building.stages import Observe
    from reap2gguf.building.text_stage import ReadTexts
    from reap2gguf.pruning.view import PrunedView


def importance_of(
    run: Run, pruned: PrunedView, texts: ReadTexts | None, observed: Observe | None
) -> Importance:
    """The stage that makes the importance matrix of a build."""
    if run.plan.computes_imatrix:
        return Importance(run, pruned, texts)
    if run.plan.imatrix is None and not run.plan.takes_sums:
        return NoImportance(run, pruned, texts)
    return GivenImportance(run, pruned, texts, observed)


class GivenImportance(Importance):
    """Writes a matrix that is there in both formats."""

    libraries = ()
    is_sweep = False  # it computes nothing, so the other processes of torchrun do not take part

    def __init__(
        self, run: Run, pruned: PrunedView, texts: ReadTexts | None, observed: Observe | None
    ) -> None:
        super().__init__(run, pruned, texts)
        self._observed = observed

    @cached_property
    def given(self) -> GivenImatrix:
        """The matrix as it is there: a given one, or that of the observations."""
        plan = self.run.plan
        if plan.imatrix is not None:
            return plan.imatrix
        observed, facts = needed(self._observed), plan.model.facts
        tensors = plan.pruned.model.gguf_tensors(plan.pruned.tensors)
        of = facts.n_experts, facts.mtp_layer
        return imatrix_of(observed.result, observed.sha256, str(observed.path), tensors, *of)

    @property
    def label(self) -> str:
        return self.given.file

    def check_minimum(self) -> None:
        check_given_minimum(self.run.plan.recipes, self.given, self._pruned.kept)

    def make_key(self) -> str:
        return stage_key(self.run.keys.pruned(self._pruned), self.given.sha256)

    def compute(self) -> Mapping[str, Any]:
        make_folder(self.run.work.gguf)
        imatrix = self.given.of(self._pruned.kept)
        n_unseen = sum(imatrix.unseen_experts().values())
        hits = layer_hits(imatrix)
        if n_unseen and self.given.cut_from is not None:
            self.run.progress.note(
                f"{self.given.file}: {n_unseen:,} of the experts that stay were never hit; they "
                "are quantized with equal weights"
            )
        if hits and self.given.cut_from is not None:
            self.run.progress.note(f"{self.given.file}: of those that stay, {hits_line(hits)}")
        save_both(imatrix, self.path)
        return {
            "seals": self.run.seal(self.outputs),
            "unseen_experts": n_unseen,
            "expert_tokens": hits,
        }


class NoImportance(Importance):
    """In place of an importance matrix, where nothing is quantized and none was given."""

    libraries = ()
    is_sweep = False

    def make_key(self) -> str:
        return stage_key(self.run.keys.pruned(self._pruned), "no importance")

    @property
    def outputs(self) -> Sequence[Path]:
        return ()

    def compute(self) -> Mapping[str, Any]:
        return {}

    @property
    def seals(self) -> Mapping[str, Seal]:
        return {}

    def is_intact(self) -> bool:
        return True
