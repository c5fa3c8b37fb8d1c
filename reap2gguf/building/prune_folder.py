"""Pruning on its own: a safetensors folder that is verified before it gets its name."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reap2gguf.atomic import output_errors, remove, rename, write_whole
from reap2gguf.bundle.card import short_card
from reap2gguf.bundle.front_matter import PrunedFrom, methods_of
from reap2gguf.bundle.layout import CARD_FILE, KEPT_FILE
from reap2gguf.bundle.records import MergeRecord, RepairRecord
from reap2gguf.errors import VerificationError
from reap2gguf.machine import available_threads
from reap2gguf.pruning.history import ORIGINAL
from reap2gguf.pruning.write import write_pruned
from reap2gguf.verifying.hf_folder import check_pruned

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from reap2gguf.bundle.records import EarlierPruning
    from reap2gguf.checkpoint.weights import Weights
    from reap2gguf.models.contract import MoeModel
    from reap2gguf.progress import Progress
    from reap2gguf.pruning.view import PrunedView


@dataclass(frozen=True)
class PrunedBy:
    """What is recorded of a pruning beside the experts that stay."""

    method: str
    source: str  # the name of the checkpoint; a short card says it, with the source's licence
    protected: Mapping[int, Sequence[int]] = field(default_factory=dict)  # stay whatever they score
    change: RepairRecord | MergeRecord | None = None  # what was done to the kept experts
    original: EarlierPruning | None = None  # what they come from, if the source was pruned before

    def record(self, kept: Mapping[int, Sequence[int]]) -> str:
        """The contents of the file of kept experts."""
        found: dict[str, Any] = {
            "method": self.method,
            "kept_experts": {str(k): v for k, v in sorted(kept.items())},
        }
        if self.protected:
            found["protected"] = {str(k): v for k, v in sorted(self.protected.items())}
        if self.original is not None:
            found[ORIGINAL] = asdict(self.original)
        if self.change is not None:
            found[self.change.what] = asdict(self.change)
        return json.dumps(found, indent=1) + "\n"


def prune_to_folder(
    checkpoint: Weights,
    model: MoeModel,
    pruned: PrunedView,
    by: PrunedBy,
    folder: Path,
    progress: Progress,
) -> None:
    """Write the pruned safetensors and which experts they keep, verify them, name the folder.

    Nothing else writes it meanwhile: what an interrupted call has left beside it is removed. Raises
    OutputError if the disk refuses, VerificationError if what was written is not what was planned.
    """
    made = folder.with_name(f".{folder.name}.unfinished")
    remove(made)
    with output_errors(folder):
        made.mkdir()  # with the permissions that the user's umask gives to folders
    try:
        threads = available_threads()
        write_pruned(pruned, made, progress, n_threads=threads)
        write_whole(made / KEPT_FILE, by.record(pruned.kept))
        has_vision = bool(model.side_files(checkpoint.folder, checkpoint.tensors))
        about = PrunedFrom(
            by.source,
            model.facts.architecture,
            has_vision,
            methods=methods_of(by.method, by.original),
            is_repaired=isinstance(by.change, RepairRecord),
        )
        merged_by = by.method if isinstance(by.change, MergeRecord) else None
        card = short_card(folder.name, checkpoint.folder / CARD_FILE, about, KEPT_FILE, merged_by)
        write_whole(made / CARD_FILE, card)
        if violations := check_pruned(made, pruned, progress, threads):
            raise VerificationError(violations)
        rename(made, folder)
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)  # the error that is being raised says more
        raise
