"""Writes safetensors files, and a checkpoint of several with their index, a tensor at a time."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from reap2gguf.atomic import whole_file, write_whole
from reap2gguf.checkpoint.index import INDEX_NAME, SINGLE_NAME
from reap2gguf.checkpoint.safetensors_header import StoredTensor
from reap2gguf.checkpoint.shard_writer import Contents, ShardPlan, write_shards
from reap2gguf.files import is_own_file

if TYPE_CHECKING:
    from reap2gguf.checkpoint.weights import Weights
    from reap2gguf.disk.hashing import Hashes

SHARD_METADATA = {"format": "pt"}  # transformers refuses a shard without it
CHECKSUM = "sha256"  # the key in a file's metadata
DEFAULT_SHARD_BYTES = 5 * 10**9  # what huggingface_hub cuts at
_FROM_NUMPY = {
    "float64": "F64",
    "float32": "F32",
    "int64": "I64",
    "int32": "I32",
    "uint8": "U8",
    "bool": "BOOL",
}


def plan_shards(
    tensors: Iterable[StoredTensor], max_bytes: int = DEFAULT_SHARD_BYTES
) -> list[list[StoredTensor]]:
    """Split the tensors, in order, into shards of at most `max_bytes`; a larger one has its own."""
    shards: list[list[StoredTensor]] = []
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
    tensors: Sequence[StoredTensor],
    contents: Contents | Weights,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    wrote: Callable[[int], None] = lambda n_bytes: None,
    n_threads: int = 1,
    hashes: Hashes | None = None,
) -> None:
    """Write all shards and the index into `folder`; `contents` yields each tensor's bytes.

    Where `contents` are weights, their tensors of the same names are copied, and the threads share
    large tensors too. A shard that exists under its final name was finished by an interrupted call
    with the same arguments, and is not written again. `wrote` is called with the bytes of every
    write. With `hashes`, the shards are hashed while they are written. Memory: what `contents`
    yields at a time to each thread, or 1 MiB. Raises OutputError if the disk refuses.
    """
    shards = plan_shards(tensors, max_shard_bytes)
    names = shard_names(len(shards))
    plans = []
    for name, shard in zip(names, shards, strict=True):
        path = folder / name
        if not is_own_file(path):
            plans.append(ShardPlan(path, header_bytes(shard, SHARD_METADATA), shard))
            continue
        wrote(sum(tensor.n_bytes for tensor in shard))
        if hashes is not None:
            hashes.read(path)
    write_shards(plans, contents, wrote, n_threads, hashes)
    if len(shards) > 1:
        weight_map = {t.name: n for n, shard in zip(names, shards, strict=True) for t in shard}
        write_whole(folder / INDEX_NAME, index_text(tensors, weight_map))


def index_text(tensors: Collection[StoredTensor], weight_map: Mapping[str, str]) -> str:
    """The text of the index of a checkpoint in several files; `weight_map` is tensor to file."""
    index = {
        "metadata": {
            "total_parameters": sum(t.n_elements for t in tensors),
            "total_size": sum(t.n_bytes for t in tensors),
        },
        "weight_map": dict(sorted(weight_map.items())),
    }
    return json.dumps(index, indent=2) + "\n"


def write_safetensors(
    path: Path,
    tensors: Sequence[StoredTensor],
    contents: Contents,
    metadata: Mapping[str, str],
    wrote: Callable[[int], None] = lambda n_bytes: None,
) -> None:
    """Write one safetensors file, whole or not at all, tensor after tensor."""
    with whole_file(path) as file:
        file.write(header_bytes(tensors, metadata))
        for tensor in tensors:
            written = 0
            for part in contents(tensor):
                file.write(part)
                written += part.nbytes
                wrote(part.nbytes)
            assert written == tensor.n_bytes, f"{tensor.name}: {written} of {tensor.n_bytes} bytes"


def write_arrays(
    path: Path, arrays: Mapping[str, npt.NDArray[np.generic]], metadata: Mapping[str, str]
) -> None:
    """Write arrays that are in memory as one safetensors file, whole or not at all.

    A SHA-256 of all of it is in its metadata, so that a damaged file is not taken for a whole one.
    """
    planned = [stored_array(name, array) for name, array in arrays.items()]
    checked = {**metadata, CHECKSUM: _checksum(arrays, metadata)}
    write_safetensors(path, planned, lambda tensor: [array_bytes(arrays[tensor.name])], checked)


def _checksum(arrays: Mapping[str, npt.NDArray[np.generic]], metadata: Mapping[str, str]) -> str:
    """SHA-256 of arrays with their names, types and shapes, and of what is said of them."""
    values = {key: text for key, text in metadata.items() if key != CHECKSUM}
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode())
    for name, array in sorted(arrays.items()):
        stored = stored_array(name, array)
        digest.update(f"{name} {stored.dtype} {list(stored.shape)}\n".encode())
        digest.update(array_bytes(array))
    return digest.hexdigest()


def check_arrays(
    metadata: Mapping[str, str], arrays: Mapping[str, npt.NDArray[np.generic]]
) -> None:
    """Raises ValueError if this is not what `write_arrays` wrote into one file.

    A file without a checksum was written by another program, and is accepted.
    """
    expected = metadata.get(CHECKSUM)
    if expected is not None and expected != _checksum(arrays, metadata):
        raise ValueError("what it holds does not have the SHA-256 that is recorded in it")


def stored_array(name: str, array: npt.NDArray[np.generic]) -> StoredTensor:
    """How an array will be stored."""
    return StoredTensor(name, _FROM_NUMPY[array.dtype.name], array.shape)


def array_bytes(array: npt.NDArray[np.generic]) -> memoryview:
    """An array's bytes in safetensors' order."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def header_bytes(tensors: Iterable[StoredTensor], metadata: Mapping[str, str]) -> bytes:
    """Everything before the first tensor of a safetensors file."""
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    position = 0
    for tensor in tensors:
        end = position + tensor.n_bytes
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [position, end],
        }
        position = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # tensors begin at a multiple of eight
    return len(encoded).to_bytes(8, "little") + encoded
