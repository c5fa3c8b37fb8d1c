"""The index of a checkpoint, which says in which file each tensor is, compared with the files."""

from __future__ import annotations

import re
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
_SHARD_NAME = re.compile(r"(.+)-([0-9]{5})-of-([0-9]{5})\.safetensors")
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


def find_shards(
    folder: Path, elsewhere: Container[str] = ()
) -> tuple[tuple[Path, ...], dict[str, str] | None]:
    """The shard files, and the index's map of tensor to file where there is an index.

    Without an index, shards that are numbered without a gap are enough: their headers say which
    tensors they hold. Where there is `model.safetensors`, transformers reads no index, and so it
    is here. Files whose names are in `elsewhere` need not be in the folder yet. Raises
    CheckpointError if there are no weights, shards are missing, or the index names anything but
    plain files.
    """
    single = folder / SINGLE_NAME
    if single.is_file() or SINGLE_NAME in elsewhere:
        return (single,), None
    index_path = folder / INDEX_NAME
    if not index_path.is_file():
        return _numbered_shards(folder), None
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


def _numbered_shards(folder: Path) -> tuple[Path, ...]:
    """The shards of a folder without an index: `model-00001-of-00003.safetensors` and so on."""
    names = sorted(file.name for file in folder.iterdir())
    matches = [match for name in names if (match := _SHARD_NAME.fullmatch(name))]
    if not matches:
        raise _no_weights(folder, names)
    sets = sorted({(match[1], match[3]) for match in matches})
    if len(sets) > 1:
        some = ", ".join(f"{shown(stem)} of {int(total)}" for stem, total in sets[:3])
        raise CheckpointError(
            f"{folder}: holds shards of {len(sets)} sets ({some}) and no {INDEX_NAME} that says "
            "which of them are the model; remove the others, or download the index"
        )
    total = int(sets[0][1])
    numbers = [int(match[2]) for match in matches]
    if numbers != list(range(1, total + 1)):
        absent = min(set(range(1, total + 1)) - set(numbers), default=0)
        problem = f"number {absent} is missing" if absent else f"number {numbers[0]} is there too"
        raise CheckpointError(
            f"{folder}: holds {len(numbers)} shards and no {INDEX_NAME}, expected numbers 1 to "
            f"{total} ({problem}); download them again"
        )
    return tuple(folder / match[0] for match in matches)


def _no_weights(folder: Path, names: list[str]) -> CheckpointError:
    """The error for a folder without weights: what it holds instead."""
    if pickled := next((name for name in names if name.endswith(_PICKLED)), ""):
        return CheckpointError(
            f"{folder}: holds pickled weights ({pickled}), which can run code when opened; convert "
            "them to safetensors first"
        )
    others = [name for name in names if name.endswith(".safetensors")]
    more = f"; rename {shown(others[0])} if it holds the weights" if others else ""
    return CheckpointError(f"{folder}: has neither {SINGLE_NAME} nor {INDEX_NAME}{more}")


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
