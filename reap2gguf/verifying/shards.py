"""Checks how a safetensors folder is written: names of shards, their headers, index and config."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from reap2gguf.checkpoint.index import INDEX_NAME
from reap2gguf.checkpoint.writer import (
    SHARD_METADATA,
    header_bytes,
    index_text,
    shard_names,
)
from reap2gguf.files import is_own_file, open_entry
from reap2gguf.messages import shown
from reap2gguf.pruning.write import config_text
from reap2gguf.verifying.differences import compare_text, where_of

if TYPE_CHECKING:
    from pathlib import Path

    from reap2gguf.checkpoint.checkpoint import Checkpoint
    from reap2gguf.checkpoint.safetensors_header import FileTensor


def check_config_text(checkpoint: Checkpoint) -> Iterator[str]:
    """Violations in the text of config.json: its spaces, and the order of its keys."""
    path = checkpoint.folder / "config.json"
    text = path.read_bytes().decode("utf-8", "replace")
    yield from compare_text(path, text, config_text(checkpoint.stored.config))


def check_shards(checkpoint: Checkpoint) -> Iterator[str]:
    """Violations in the shards' names, in their headers, and in the index."""
    folder = checkpoint.folder
    names = [shard.name for shard in checkpoint.shards]
    expected = shard_names(len(names))
    if names != expected:
        yield f"{folder.name}: the shards are {shown(names)}, expected {shown(expected)}"
        return
    tensors = checkpoint.files
    for shard in checkpoint.shards:
        yield from _check_header(shard, [t for t in tensors.values() if t.path == shard])
    path = folder / INDEX_NAME
    if len(names) == 1:
        if path.exists():
            yield f"{where_of(path)} is there, expected none for one file of safetensors"
        return
    if not is_own_file(path):
        yield f"{folder.name}: {path.name} is missing"
        return
    weight_map = {name: tensor.path.name for name, tensor in tensors.items()}
    wanted = index_text(list(tensors.values()), weight_map)
    yield from compare_text(path, path.read_bytes().decode("utf-8", "replace"), wanted)


def _check_header(path: Path, stored: list[FileTensor]) -> Iterator[str]:
    """The bytes before the first tensor, which programs read in many ways."""
    in_order = sorted(stored, key=lambda tensor: tensor.offset)
    wanted = header_bytes(in_order, SHARD_METADATA)
    with open_entry(path) as file:
        found = file.read(len(wanted))
    if found != wanted:
        yield f"{where_of(path)}: its header has other metadata or spaces than this program writes"
