"""Writes the pruned checkpoint: expert and router tensors sliced as stored, all else copied.

Works on bytes: nothing is converted, and names, layouts and dtypes stay the source's, except that
kept experts are numbered anew. Memory: one expert's matrix, or 64 MiB of a larger tensor.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from reap2gguf.atomic import copy_whole, write_whole
from reap2gguf.bundle.manifest import MANIFEST_FILE
from reap2gguf.checkpoint.checkpoint import Checkpoint
from reap2gguf.checkpoint.index import INDEX_NAME
from reap2gguf.checkpoint.safetensors_header import StoredTensor
from reap2gguf.checkpoint.writer import DEFAULT_SHARD_BYTES, PlannedTensor, write_checkpoint
from reap2gguf.models.contract import MoeModel
from reap2gguf.models.description import Dropped, Expert, Router
from reap2gguf.progress import Progress
from reap2gguf.pruning.select import Kept

_PIECE_BYTES = 2**26
# What travels with a model besides its weights and its config.
_COMPANIONS = (
    "tokenizer*.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.*", "generation_config.json",
    "*processor_config.json", "LICENSE*", "NOTICE*",
)  # fmt: skip
KEPT_FILE = "kept_experts.json"  # what `prune` on its own leaves beside the weights
_WRITTEN_HERE = {"config.json", INDEX_NAME, MANIFEST_FILE, KEPT_FILE}


@dataclass(frozen=True)
class PrunedTensor:
    """A tensor of the pruned checkpoint and the entries on axis 0 that it takes from the source."""

    planned: PlannedTensor
    source: StoredTensor
    entries: tuple[int, ...] | None  # None: the whole tensor


def plan_pruned(
    model: MoeModel, stored: Mapping[str, StoredTensor], kept: Kept
) -> list[PrunedTensor]:
    """Every tensor of the pruned checkpoint, in the source's order.

    Raises UnknownTensorError for a stored tensor that no rule explains.
    """
    planned: list[PrunedTensor] = []
    for name, tensor in stored.items():
        role = model.role(name)
        entries: tuple[int, ...] | None = None
        if isinstance(role, Dropped):
            continue
        if isinstance(role, Expert) and role.expert is not None:
            if role.expert not in kept[role.layer]:
                continue
            name = model.renumbered(name, kept[role.layer].index(role.expert))
        elif isinstance(role, Expert | Router):
            entries = tuple(kept[role.layer])
        shape = tensor.shape if entries is None else (len(entries), *tensor.shape[1:])
        planned.append(PrunedTensor(PlannedTensor(name, tensor.dtype, shape), tensor, entries))
    return planned


def write_pruned(
    checkpoint: Checkpoint,
    model: MoeModel,
    kept: Kept,
    n_kept: int,
    folder: Path,
    progress: Progress,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> None:
    """Write shards, index, config, tokenizer and the source's other small files into `folder`.

    Shards that an interrupted call with the same arguments left are not written again. Raises
    OutputError if the disk refuses.
    """
    tensors = plan_pruned(model, checkpoint.tensors, kept)
    by_name = {tensor.planned.name: tensor for tensor in tensors}
    total = sum(tensor.planned.n_bytes for tensor in tensors)
    with progress.task("Writing safetensors", total, "bytes") as task:
        write_checkpoint(
            folder,
            [tensor.planned for tensor in tensors],
            lambda planned: _contents(checkpoint, by_name[planned.name]),
            max_shard_bytes,
            wrote=task.advance,
        )
    config = json.dumps(model.pruned_config(n_kept), indent=2, ensure_ascii=False)
    write_whole(folder / "config.json", config + "\n")
    for file in companion_files(checkpoint.folder):
        copy_whole(file, folder / file.name)


def companion_files(folder: Path) -> list[Path]:
    """Tokenizer, template, generation config and licence files of a checkpoint."""
    found = {file for pattern in _COMPANIONS for file in folder.glob(pattern) if file.is_file()}
    return sorted(file for file in found if file.name not in _WRITTEN_HERE)


def _contents(checkpoint: Checkpoint, tensor: PrunedTensor) -> Iterator[memoryview]:
    """The bytes of a pruned tensor, piece by piece."""
    name, shape = tensor.source.name, tensor.source.shape
    if not shape:
        yield checkpoint.read(name).reshape(1).data
        return
    row_bytes = math.prod(shape[1:]) * tensor.source.item_bytes
    step = max(1, _PIECE_BYTES // max(row_bytes, 1))
    for first, last in _runs(tensor.entries, shape[0], step):
        yield checkpoint.read(name, first, last).reshape(-1).view("u1").data


def _runs(entries: tuple[int, ...] | None, length: int, step: int) -> Iterator[tuple[int, int]]:
    """Ranges on axis 0 that cover `entries` (or everything), none longer than `step`."""
    if entries is None:
        for first in range(0, length, step):
            yield first, min(first + step, length)
        return
    for entry in entries:
        yield entry, entry + 1
