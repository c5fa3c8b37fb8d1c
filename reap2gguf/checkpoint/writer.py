"""Writes a checkpoint's safetensors shards and their index, one tensor at a time."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

from reap2gguf.checkpoint.checkpoint import INDEX_NAME, SINGLE_NAME
from reap2gguf.checkpoint.safetensors_header import ITEM_BYTES

DEFAULT_SHARD_BYTES = 5 * 10**9  # what huggingface_hub cuts at


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor to be written: name, safetensors dtype and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def n_bytes(self) -> int:
        return prod(self.shape) * ITEM_BYTES[self.dtype]


def plan_shards(
    tensors: Iterable[PlannedTensor], max_bytes: int = DEFAULT_SHARD_BYTES
) -> list[list[PlannedTensor]]:
    """Cut the tensors, in order, into shards of at most `max_bytes` (a larger one stands alone)."""
    shards: list[list[PlannedTensor]] = []
    room = 0
    for tensor in tensors:
        if not shards or tensor.n_bytes > room:
            shards.append([])
            room = max_bytes
        shards[-1].append(tensor)
        room -= tensor.n_bytes
    return shards


def shard_names(count: int) -> list[str]:
    """The names transformers gives to `count` shards."""
    if count == 1:
        return [SINGLE_NAME]
    return [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]


def write_checkpoint(
    folder: Path,
    tensors: Sequence[PlannedTensor],
    contents: Callable[[PlannedTensor], Iterable[memoryview]],
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    wrote: Callable[[int], None] = lambda n_bytes: None,
) -> None:
    """Write all shards and the index into `folder`; `contents` yields each tensor's bytes.

    Holds one piece of one tensor in memory. `wrote` is told of every piece's length.
    """
    shards = plan_shards(tensors, max_shard_bytes)
    names = shard_names(len(shards))
    for name, shard in zip(names, shards, strict=True):
        _write_shard(folder / name, shard, contents, wrote)
    if len(shards) > 1:
        weight_map = {t.name: n for n, shard in zip(names, shards, strict=True) for t in shard}
        index = {
            "metadata": {
                "total_parameters": sum(prod(t.shape) for t in tensors),
                "total_size": sum(t.n_bytes for t in tensors),
            },
            "weight_map": dict(sorted(weight_map.items())),
        }
        (folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_shard(
    path: Path,
    tensors: Sequence[PlannedTensor],
    contents: Callable[[PlannedTensor], Iterable[memoryview]],
    wrote: Callable[[int], None],
) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for tensor in tensors:
        end = position + tensor.n_bytes
        header[tensor.name] = {
            "dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [position, end],
        }  # fmt: skip
        position = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # tensors begin at a multiple of eight
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for tensor in tensors:
            written = 0
            for piece in contents(tensor):
                file.write(piece)
                written += piece.nbytes
                wrote(piece.nbytes)
            assert written == tensor.n_bytes, f"{tensor.name}: {written} of {tensor.n_bytes} bytes"
