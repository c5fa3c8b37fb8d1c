"""Disk space of a build: its files, and what lies beside them while it runs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from reap2gguf.gguf_files.tensor_types import row_bytes
from reap2gguf.models.description import Expert
from reap2gguf.observing.budget import MOST_OF_TIME, save_seconds
from reap2gguf.pruning.write import companion_files

if TYPE_CHECKING:
    from collections.abc import Mapping

    from reap2gguf.building.needs.amount import Amount
    from reap2gguf.building.needs.memory import SweepNeeds
    from reap2gguf.building.plan import Plan
    from reap2gguf.models.description import SideFile

_CARD_BYTES = 2**20  # cards, pictures, manifests and marks
_OBSERVED_BYTES = 5 * 8  # per expert
_COUNTED = 16  # other matrices of a layer in an importance matrix, at most
_STATES = 2  # a new state of a sweep is written beside the one before


@dataclass(frozen=True)
class DiskNeeds:
    """Bytes on the disk of the output, for a build from scratch."""

    hf: int  # safetensors, and what travels with them
    gguf: int  # GGUF files, with projectors and importance matrices
    shared: int  # texts and observations, which stay for other builds
    spool: int  # hidden states that wait on the disk
    state: int  # one saved state of a calibration pass
    scoring: int = 0  # hidden states of all variants, on the disk while quality is measured
    repaired: int = 0  # new weights of experts, beside the files until these are finished
    depth: int = 1  # layers that a batch goes through before its hidden states wait again

    @property
    def final_bytes(self) -> int:
        """What is there in the end."""
        return self.hf + self.gguf + self.shared

    @property
    def room_bytes(self) -> int:
        """What a build cannot do without, at its peak: saved states are left out."""
        most = max(self.final_bytes + self.scoring, self.hf + self.shared + self.spool)
        return most + self.repaired

    @property
    def state_bytes(self) -> int:
        """More space, to save the progress of a calibration pass at any time."""
        sweeping = self.hf + self.shared + self.spool + _STATES * self.state + self.repaired
        return max(0, sweeping - self.room_bytes)

    @property
    def overlapping_bytes(self) -> int:
        """What stages need that overlap: the GGUF files are there while the second pass runs."""
        return self.final_bytes + self.spool + self.states_bytes + self.repaired

    @property
    def states_bytes(self) -> int:
        """The most that saved states of a pass take at a time."""
        return _STATES * self.state

    def peak_bytes(self, sweeps: Mapping[str, tuple[float, int]], overlaps: bool = False) -> int:
        """The most that is there at a time, given the seconds and layers of each pass."""
        peak = self.final_bytes + self.scoring
        for name, (seconds, n_layers) in sweeps.items():
            beside = self.spool + self.state * states_kept(seconds, n_layers, self.state)
            written = self.hf + (self.gguf if overlaps else 0)
            made = 0 if name in ("observe", "merge", "repair") else written
            peak = max(peak, self.shared + beside + made)
        return peak + self.repaired


def states_kept(seconds: float, n_layers: int, n_bytes: int) -> int:
    """How many states a pass has on the disk at a time: none, or one and the next one.

    By the pass's own rule: it saves where that takes little of the time since the last save.
    """
    every = save_seconds(n_bytes) / MOST_OF_TIME
    per_layer = seconds / max(1, n_layers)
    layers_between = max(1, math.ceil(every / per_layer)) if per_layer > 0 else n_layers
    return min(_STATES, (n_layers - 1) // layers_between)


def disk_needs(
    plan: Plan,
    amount: Amount,
    sweeps: SweepNeeds,
    evaluation: SweepNeeds | None,
    choosing: SweepNeeds | None = None,
    repairing: SweepNeeds | None = None,
) -> DiskNeeds:
    """Sizes of tensors are exact, all others close upper bounds.

    `evaluation` is what the last stage takes; None if quality is not measured. `choosing` is the
    same of the stage that chooses a method, and `repairing` of the one that repairs.
    """
    facts = plan.model.facts
    companions = sum(file.stat().st_size for file in companion_files(plan.source.folder))
    companions += plan.source.later_bytes
    columns = 2 * facts.expert_io_width + facts.expert_width
    imatrix = 2 * 4 * len(facts.moe_layers) * (plan.target.n_kept + _COUNTED) * columns
    files = sum(sum(plan.file_sizes(recipe)) for recipe in plan.recipes)
    files += sum(side_bytes(side) for side in plan.side_files)
    observed = _OBSERVED_BYTES * facts.n_experts * len(facts.moe_layers)
    if plan.takes_sums:  # gate and up share theirs
        width = facts.expert_io_width + facts.expert_width
        observed += 4 * len(facts.moe_layers) * (facts.n_experts + _COUNTED) * width
    # a header holds the tokenizer
    gguf = files + companions * len(plan.recipes) + imatrix + amount.text_bytes + _CARD_BYTES
    gguf += observed if plan.target.prunes else 0
    texts = 8 * (amount.n_tokens + amount.n_chunk_tokens) + amount.text_bytes
    return DiskNeeds(
        hf=plan.hf_bytes + companions + _CARD_BYTES if plan.writes_hf else 0,
        gguf=gguf,
        shared=texts + (observed if plan.observes else 0),
        spool=_spool_bytes(sweeps, repairing) if plan.n_sweeps else 0,
        repaired=_repaired_bytes(plan),
        scoring=max(0 if one is None else one.spool_bytes for one in (evaluation, choosing)),
        depth=1 if sweeps.budget is None else sweeps.budget.depth,
        state=sweeps.hidden_bytes if plan.n_sweeps else 0,
    )


def _spool_bytes(sweeps: SweepNeeds, repairing: SweepNeeds | None) -> int:
    """What waits on the disk; a repair keeps inputs and errors of one layer's rows as well."""
    return max(sweeps.spool_bytes, 0 if repairing is None else repairing.spool_bytes)


def _repaired_bytes(plan: Plan) -> int:
    """Bytes of the weights that a repair gives, or that a merge may give at most."""
    if not plan.repairs and not plan.merges:
        return 0
    return sum(
        tensor.n_bytes
        for name, tensor in plan.pruned.tensors.items()
        if isinstance(role := plan.pruned.model.role(name), Expert)
        and (plan.merges or role.projection == "down")
    )


def side_bytes(side: SideFile) -> int:
    """Bytes of a side file's tensors."""
    tensor_types = side.tensor_types()
    return sum(
        math.prod(tensor.shape[:-1]) * row_bytes(tensor_types[tensor.name], tensor.n_columns)
        for tensor in side.tensors
    )
