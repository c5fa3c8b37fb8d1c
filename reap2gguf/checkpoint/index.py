"""The index of a checkpoint, which says in which file each tensor is, compared with the files."""

from __future__ import annotations

from collections.abc import Container, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from reap2gguf.checkpoint.config import MAX_TOKENIZER_BYTES, read_json
from reap2gguf.errors import CheckpointError
from reap2gguf.files import is_plain, is_plain_name
from reap2gguf.messages import shown

if TYPE_CHECKING:
    from reap2gguf.checkpoint.safetensors_header import FileTensor

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
_MAX_SHARDS = 10_000
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


def find_shards(
    folder: Path, elsewhere: Container[str] = ()
) -> tuple[tuple[Path, ...], dict[str, str] | None]:
    """The shard files, and the index's map of tensor to file where there is an index.

    Files whose names are in `elsewhere` need not be in the folder yet. Raises CheckpointError if
    there are no weights, shards are missing, or the index names anything but plain files.
    """
    index_path = folder / INDEX_NAME
    if not index_path.is_file():
        single = folder / SINGLE_NAME
        if single.is_file() or SINGLE_NAME in elsewhere:
            return (single,), None
        if pickled := min((f.name for f in folder.iterdir() if f.suffix in _PICKLED), default=""):
            raise CheckpointError(
                f"{folder}: holds pickled weights ({pickled}), which can run code when opened; "
                "convert them to safetensors first"
            )
        raise CheckpointError(f"{folder}: has neither {SINGLE_NAME} nor {INDEX_NAME}")
    weight_map = read_json(index_path, MAX_TOKENIZER_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index_path}: no weight_map of tensor to file")
    for file_name in weight_map.values():
        if not isinstance(file_name, str) or not is_plain_name(file_name):
            raise CheckpointError(
                f"{index_path}: names the file {shown(file_name)}, expected a plain name in this "
                "folder"
            )
    names = sorted(set(weight_map.values()))
    if len(names) > _MAX_SHARDS:
        raise CheckpointError(
            f"{index_path}: names {len(names):,} files, expected at most {_MAX_SHARDS:,}"
        )
    missing = [n for n in names if n not in elsewhere and not is_plain(folder / n)]
    if missing:
        some = ", ".join(map(shown, missing[:3])) + (" ..." if len(missing) > 3 else "")
        raise CheckpointError(
            f"{folder}: {len(missing)} of {len(names)} shards missing: {some}; download them again"
        )
    return tuple(folder / name for name in names), weight_map


def compare_index(folder: Path, mapped: dict[str, str], tensors: Mapping[str, FileTensor]) -> None:
    """Raise CheckpointError unless the index names the tensors of the shards, each in its file."""
    if absent := sorted(mapped.keys() - tensors.keys()):
        raise CheckpointError(
            f"{folder}: {len(absent)} tensors of the index are in no shard, such as "
            f"{shown(absent[0])}"
        )
    if extra := sorted(tensors.keys() - mapped.keys()):
        raise CheckpointError(
            f"{folder}: {len(extra)} stored tensors are not in the index, such as {shown(extra[0])}"
        )
    for name, file_name in mapped.items():
        if tensors[name].path.name != file_name:
            raise CheckpointError(
                f"{folder}: {shown(name)} is in {tensors[name].path.name}, the index says "
                f"{file_name}"
            )
