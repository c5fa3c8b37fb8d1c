"""Candidates whose experts are merged: each is made in a sweep of its own.

The experts that stay, and their weights, come out of that sweep (`merging/sweep.py`): one layer of
the source after another, on the rows that rank experts. Every expert computes every token there, so
it takes about E / K times the observation, of E experts of which K are used. The new weights wait
in files, and the model is a view of the source with these: it is never in memory as a whole. It is
measured in the sweep that measures the criteria.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from reap2gguf.errors import UsageError
from reap2gguf.merging.limits import check_merge
from reap2gguf.pruning.methods import GROUP_SIZE

if TYPE_CHECKING:
    from reap2gguf.artifacts.texts import ObservationRows
    from reap2gguf.checkpoint.checkpoint import Checkpoint
    from reap2gguf.models.contract import MoeModel
    from reap2gguf.options import ComputeOptions
    from reap2gguf.progress import Progress
    from reap2gguf.pruning.protection import Protection
    from reap2gguf.pruning.select import Kept, Target
    from reap2gguf.pruning.view import PrunedView


def check_group_size(group_size: object, methods: Sequence[str]) -> None:
    """Raise UsageError for what is no size of REAM's groups, or where no candidate is REAM."""
    if group_size is None:
        return
    if type(group_size) is not int or group_size < 2:
        raise UsageError(f"group_size is {group_size!r}, expected a whole number from 2")
    if "ream" not in methods:
        raise UsageError(
            "group_size is for the candidate ream; name it in candidates, or leave this out"
        )


@dataclass(frozen=True)
class Merging:
    """What experts of a model are merged by, for each of some methods."""

    checkpoint: Checkpoint
    model: MoeModel
    target: Target
    methods: Sequence[str]  # of methods.MERGING
    group_size: int
    protected: Kept  # nothing is merged into these

    @classmethod
    def of(
        cls,
        checkpoint: Checkpoint,
        model: MoeModel,
        target: Target,
        methods: Sequence[str],
        group_size: int | None,
        protection: Protection,
    ) -> Merging:
        """Raises UsageError or UnsupportedModelError for what no merge is defined for."""
        if methods and protection.super_experts:
            raise UsageError(
                f"protect_super_experts does not go with the candidate {methods[0]}: a merge does "
                "not look for them; leave one of both out, or name experts with protect"
            )
        size, protected = group_size or GROUP_SIZE, dict[int, tuple[int, ...]]()
        for method in methods:
            how = method, target, protection, size
            protected = dict(check_merge(checkpoint, model, *how).all)
        return cls(checkpoint, model, target, methods, size, protected)

    def views(
        self,
        rows: ObservationRows,
        folder: Path,
        compute: ComputeOptions,
        stack: ExitStack,
        progress: Progress,
    ) -> tuple[dict[str, PrunedView], dict[str, float]]:
        """By method the merged model, and the seconds that it took.

        The files are in `folder`, from which an interrupted call goes on, and are open as long as
        the stack. Raises what a merge raises.
        """
        from reap2gguf.merging.folder import MergeFolder, view_of
        from reap2gguf.merging.layer import MergeSpec
        from reap2gguf.merging.sweep import merge  # loads torch

        found: dict[str, PrunedView] = {}
        seconds: dict[str, float] = {}
        for method in self.methods:
            begun, key = time.monotonic(), self._key(method, rows, compute)
            progress.note(f"candidate {method}: its experts are merged in a sweep of their own")
            files = MergeFolder(folder / method, key)
            spec = MergeSpec(method, self.target, self.group_size, self.protected)
            where = _with_key(compute, key)
            layers = merge(self.checkpoint, self.model, rows.rows, spec, files, where, progress)
            view = view_of(self.checkpoint, self.model, layers, files)
            found[method] = stack.enter_context(closing(view))
            seconds[method] = time.monotonic() - begun
        return found, seconds

    def _key(self, method: str, rows: ObservationRows, compute: ComputeOptions) -> str:
        from reap2gguf.evaluating.scoring import key_of

        return key_of(
            (self.checkpoint.fingerprint(), self.checkpoint.stamps(), self.model.facts.mtp_layer),
            (method, self.target.n_kept, self.group_size if method == "ream" else None),
            (sorted(self.protected.items()), rows.sha256),
            (compute.likely_device, compute.likely_dtype),
        )


def _with_key(compute: ComputeOptions, key: str) -> ComputeOptions:
    """The state between layers is of this merge alone."""
    resume = compute.resume
    return compute if resume is None else replace(compute, resume=replace(resume, key=key))
