"""Pruning on its own: a safetensors folder that is verified before it gets its name."""

from __future__ import annotations

import json
import secrets
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from reap2gguf.atomic import output_errors, rename, write_whole
from reap2gguf.errors import VerificationError
from reap2gguf.pruning.view import PrunedView
from reap2gguf.pruning.write import KEPT_FILE, write_pruned
from reap2gguf.verifying.hf_folder import check_pruned

if TYPE_CHECKING:
    from reap2gguf.checkpoint.checkpoint import Checkpoint
    from reap2gguf.models.contract import MoeModel
    from reap2gguf.progress import Progress
    from reap2gguf.pruning.select import Kept


def prune_to_folder(
    checkpoint: Checkpoint,
    model: MoeModel,
    kept: Kept,
    method: str,
    folder: Path,
    progress: Progress,
) -> None:
    """Write the pruned safetensors and which experts they keep, verify them, name the folder.

    Raises OutputError if the disk refuses, VerificationError if what was written is not what was
    planned.
    """
    made = folder.with_name(f".{folder.name}.{secrets.token_hex(8)}")
    with output_errors(folder):
        made.mkdir()  # with the permissions that the user's umask gives to folders
    try:
        pruned = PrunedView(checkpoint, model, kept)
        write_pruned(pruned, made, progress)
        record = {"method": method, "kept_experts": {str(k): v for k, v in sorted(kept.items())}}
        write_whole(made / KEPT_FILE, json.dumps(record, indent=1) + "\n")
        if violations := check_pruned(made, pruned, progress):
            raise VerificationError(violations)
        rename(made, folder)
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise
