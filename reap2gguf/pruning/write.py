"""Writes the pruned checkpoint: the tensors of the pruned view, its config, and small files.

Works on bytes: nothing is converted, and names, layouts and dtypes are the source's, except that
kept experts get new numbers. Quantized weights stay as they are stored, and so do their scales.
Memory: 1 MiB for each thread, of which there are at most 16.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reap2gguf.atomic import copy_whole, write_whole
from reap2gguf.bundle.layout import KEPT_FILE, MANIFEST_FILE
from reap2gguf.checkpoint.companions import Purpose, companions
from reap2gguf.checkpoint.index import INDEX_NAME
from reap2gguf.checkpoint.writer import (
    DEFAULT_SHARD_BYTES,
    plan_shards,
    shard_names,
    write_checkpoint,
)

if TYPE_CHECKING:
    from reap2gguf.checkpoint.weights import Weights
    from reap2gguf.disk.hashing import Hashes
    from reap2gguf.progress import Progress

HELD_BYTES = 2**25  # by `write_pruned`: the parts of 16 threads, and those that are hashed
_WRITTEN_HERE = {"config.json", INDEX_NAME, MANIFEST_FILE, KEPT_FILE}


def write_pruned(
    pruned: Weights,
    folder: Path,
    progress: Progress,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    *,
    n_threads: int = 1,
    hashes: Hashes | None = None,
) -> None:
    """Write shards, index, config, tokenizer and the source's other small files into `folder`.

    Shards that an interrupted call with the same arguments finished are not written again. With
    `hashes`, the shards are hashed while they are written. Raises OutputError if the disk refuses.
    """
    stored = pruned.stored
    with progress.task("Writing safetensors", stored.n_bytes, "bytes") as task:
        write_checkpoint(
            folder,
            list(stored.tensors.values()),
            stored,
            max_shard_bytes,
            task.advance,
            n_threads,
            hashes,
        )
    write_whole(folder / "config.json", config_text(stored.config))
    for file in companion_files(pruned.folder):
        copy_whole(file, folder / file.name)


def config_text(config: Mapping[str, Any]) -> str:
    """What `config.json` holds."""
    return json.dumps(config, indent=2, ensure_ascii=False) + "\n"


def written_names(pruned: Weights) -> set[str]:
    """The names of the files that `write_pruned` writes with its default size of shards."""
    n_shards = len(plan_shards(pruned.stored.tensors.values()))
    names = {"config.json", *shard_names(n_shards)} | ({INDEX_NAME} if n_shards > 1 else set())
    return names | {file.name for file in companion_files(pruned.folder)}


def companion_files(folder: Path) -> list[Path]:
    """Tokenizer, template, generation config and licence files of a checkpoint."""
    found = companions(folder, Purpose.BUNDLE)
    return [file for file in found if file.is_file() and file.name not in _WRITTEN_HERE]
