"""Pruning on its own: a safetensors folder that is verified before it gets its name."""

from __future__ import annotations

import json
import secrets
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reap2gguf.atomic import output_errors, rename, write_whole
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


def prune_to_folder(
    checkpoint: Weights,
    model: MoeModel,
    pruned: PrunedView,
    method: str,
    folder: Path,
    progress: Progress,
    source: str,
    protected: Mapping[int, Sequence[int]] | None = None,
    change: RepairRecord | MergeRecord | None = None,
    original: EarlierPruning | None = None,
) -> None:
    """Write the pruned safetensors and which experts they keep, verify them, name the folder.

    `source` is the name of the checkpoint; a short card says it, with the source's licence.
    `protected` are those of the experts that stay whatever they score; `change` is what was done to
    those of `pruned`: a repair or a merge. `original` is what the folder's experts come from.

    Raises OutputError if the disk refuses, VerificationError if what was written is not what was
    planned.
    """
    made = folder.with_name(f".{folder.name}.{secrets.token_hex(8)}")
    with output_errors(folder):
        made.mkdir()  # with the permissions that the user's umask gives to folders
    try:
        threads = available_threads()
        write_pruned(pruned, made, progress, n_threads=threads)
        record = _record(pruned, method, protected, change, original)
        write_whole(made / KEPT_FILE, json.dumps(record, indent=1) + "\n")
        has_vision = bool(model.side_files(checkpoint.folder, checkpoint.tensors))
        about = PrunedFrom(
            source,
            model.facts.architecture,
            has_vision,
            methods=methods_of(method, original),
            is_repaired=isinstance(change, RepairRecord),
        )
        merged_by = method if isinstance(change, MergeRecord) else None
        card = short_card(folder.name, checkpoint.folder / CARD_FILE, about, KEPT_FILE, merged_by)
        write_whole(made / CARD_FILE, card)
        if violations := check_pruned(made, pruned, progress, threads):
            raise VerificationError(violations)
        rename(made, folder)
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)  # the error that is being raised says more
        raise


def _record(
    pruned: PrunedView,
    method: str,
    protected: Mapping[int, Sequence[int]] | None,
    change: RepairRecord | MergeRecord | None,
    original: EarlierPruning | None,
) -> dict[str, Any]:
    """What KEPT_FILE says of a folder."""
    record: dict[str, Any] = {
        "method": method,
        "kept_experts": {str(k): v for k, v in sorted(pruned.kept.items())},
    }
    if protected:
        record["protected"] = {str(k): v for k, v in sorted(protected.items())}
    if original is not None:
        record[ORIGINAL] = asdict(original)
    if change is not None:
        record[change.what] = asdict(change)
    return record
