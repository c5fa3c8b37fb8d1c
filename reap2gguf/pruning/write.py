"""Writes the pruned checkpoint: the tensors of the pruned view, its config, and small files.

Works on bytes: nothing is converted, and names, layouts and dtypes are the source's, except that
kept experts get new numbers. Memory: at most two parts of 64 MiB of a tensor.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from reap2gguf.atomic import copy_whole, write_whole
from reap2gguf.bundle.layout import MANIFEST_FILE
from reap2gguf.checkpoint.companions import Purpose, companions
from reap2gguf.checkpoint.index import INDEX_NAME
from reap2gguf.checkpoint.writer import (
    DEFAULT_SHARD_BYTES,
    plan_shards,
    shard_names,
    write_checkpoint,
)

if TYPE_CHECKING:
    from reap2gguf.checkpoint.safetensors_header import StoredTensor
    from reap2gguf.checkpoint.weights import Weights
    from reap2gguf.progress import Progress

_READ_BYTES = 2**26
HELD_BYTES = 2 * _READ_BYTES  # by `write_pruned`: one part is read while the one before is freed
KEPT_FILE = "kept_experts.json"  # what `prune` on its own leaves beside the weights
_WRITTEN_HERE = {"config.json", INDEX_NAME, MANIFEST_FILE, KEPT_FILE}


def write_pruned(
    pruned: Weights, folder: Path, progress: Progress, max_shard_bytes: int = DEFAULT_SHARD_BYTES
) -> None:
    """Write shards, index, config, tokenizer and the source's other small files into `folder`.

    Shards that an interrupted call with the same arguments finished are not written again. Raises
    OutputError if the disk refuses.
    """
    with progress.task("Writing safetensors", pruned.n_bytes, "bytes") as task:
        write_checkpoint(
            folder,
            list(pruned.tensors.values()),
            lambda tensor: _contents(pruned, tensor),
            max_shard_bytes,
            wrote=task.advance,
        )
    write_whole(folder / "config.json", config_text(pruned.config))
    for file in companion_files(pruned.folder):
        copy_whole(file, folder / file.name)


def config_text(config: Mapping[str, Any]) -> str:
    """What `config.json` holds."""
    return json.dumps(config, indent=2, ensure_ascii=False) + "\n"


def written_names(pruned: Weights) -> set[str]:
    """The names of the files that `write_pruned` writes with its default size of shards."""
    n_shards = len(plan_shards(pruned.tensors.values()))
    names = {"config.json", *shard_names(n_shards)} | ({INDEX_NAME} if n_shards > 1 else set())
    return names | {file.name for file in companion_files(pruned.folder)}


def companion_files(folder: Path) -> list[Path]:
    """Tokenizer, template, generation config and licence files of a checkpoint."""
    found = companions(folder, Purpose.BUNDLE)
    return [file for file in found if file.is_file() and file.name not in _WRITTEN_HERE]


def _contents(weights: Weights, tensor: StoredTensor) -> Iterator[memoryview]:
    """The bytes of a tensor, at most 64 MiB at a time."""
    for first in range(0, tensor.n_bytes, _READ_BYTES):
        buffer = np.empty(min(_READ_BYTES, tensor.n_bytes - first), dtype=np.uint8)
        weights.read_bytes(tensor.name, first, buffer)
        yield buffer.data
