"""What a sweep has done, kept between two layers, so that an interrupted one goes on from there.

A state is a safetensors file: the hidden states, tokens and lengths of every batch, and the sums of
the finished layers. It is as large as the spool, so it is written only where that costs little
beside the layers computed since the last one; on a GPU that passes a layer in a second, never.
Memory: one batch on the host. Several processes keep one state each, and all go on from the same
layer or begin anew.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from reap2gguf.atomic import output_errors, part_of, remove
from reap2gguf.checkpoint.checkpoint import Checkpoint
from reap2gguf.checkpoint.safetensors_header import StoredTensor, read_header, read_metadata
from reap2gguf.checkpoint.writer import array_bytes, stored_array, write_safetensors
from reap2gguf.errors import CheckpointError
from reap2gguf.observing.batches import Batch
from reap2gguf.observing.compute.ranks import Ranks
from reap2gguf.observing.observer import Arrays, LayerObserver
from reap2gguf.observing.spool import Spool
from reap2gguf.options import Resume

MOST_OF_TIME = 0.05  # that keeping states may take
_SECONDS = 0.05  # to write a state, at least
_BYTES_A_SECOND = 5e8
_STORED = {torch.bfloat16: "BF16", torch.float32: "F32"}


@dataclass(frozen=True)
class SweepState:
    """A sweep before its layer `layer`."""

    layer: int
    batches: list[Batch]
    sums: Arrays
    _file: Checkpoint

    def hidden(self, index: int, dtype: torch.dtype) -> Tensor:
        """The hidden states of batch `index`, (n, H), on the host."""
        raw = torch.from_numpy(self._file.read(f"batch.{index}.hidden"))
        return raw.view(dtype) if raw.dtype == torch.uint16 else raw

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class StateKeeper:
    """Loads the state of an interrupted sweep, and keeps that of this one now and then."""

    def __init__(self, resume: Resume | None, ranks: Ranks, note: Callable[[str], None]) -> None:
        several = f".{ranks.rank}-of-{ranks.size}" if ranks.size > 1 else ""
        self._path = resume.path.with_name(resume.path.name + several) if resume else None
        self._key = resume.key if resume else ""
        self._ranks = ranks
        self._note = note
        self._kept_at = time.monotonic()
        self._cost: float | None = None  # seconds that the last one took

    def load(
        self, observer: LayerObserver, width: int, dtype: torch.dtype, most_tokens: int
    ) -> SweepState | None:
        """The state to go on from, if all processes have one of the same layer.

        Batches of other sizes than `most_tokens` would make other sums than a sweep that was not
        interrupted, so they are not gone on with. `observer` takes up the sums.
        """
        state = self._read(observer, width, dtype, most_tokens)
        layer = state.layer if state else 0
        first, last = self._ranks.least(layer), -self._ranks.least(-layer)
        if state is not None and (first != last or not layer):
            state.close()
            state = None
        return state

    def _read(
        self, observer: LayerObserver, width: int, dtype: torch.dtype, most_tokens: int
    ) -> SweepState | None:
        if self._path is None:
            return None
        remove(part_of(self._path))
        if not self._path.is_file():
            return None
        try:
            tensors, metadata = read_header(self._path), read_metadata(self._path)
            if (metadata.get("key"), metadata.get("batch_tokens")) != (self._key, str(most_tokens)):
                return None
            file = Checkpoint(self._path.parent, {}, tensors, (self._path,))
            state = _state(file, metadata, width, dtype)
            observer.restore(state.sums)  # a sweep that begins anew replaces them, layer by layer
            return state
        except (CheckpointError, KeyError, ValueError) as error:
            self._note(f"{self._path.name}: not the state that it was ({error}); begun anew")
            return None

    def keep(
        self, layer: int, batches: Sequence[Batch], spool: Spool, observer: LayerObserver,
        most_tokens: int,
    ) -> None:  # fmt: skip
        """Keep the sweep as it is before `layer`, if that is worth its time."""
        n_bytes = (
            sum(batch.tokens.numel() for batch in batches) * spool.shape[1] * spool.dtype.itemsize
        )
        cost = self._cost or _SECONDS + n_bytes / _BYTES_A_SECOND
        is_due = time.monotonic() - self._kept_at >= cost / MOST_OF_TIME
        if not self._ranks.least(int(is_due and self._path is not None)):
            return
        assert self._path is not None
        with output_errors(self._path):
            free = shutil.disk_usage(self._path.parent).free
        if not self._ranks.least(int(free > 1.1 * n_bytes * self._ranks.size)):
            self._note("the disk has no room to keep what the sweep has done")
            self._kept_at = time.monotonic()
            return
        begun = time.monotonic()
        metadata = {
            "key": self._key,
            "layer": str(layer),
            "batch_tokens": str(most_tokens),
            "observed": "".join(str(int(batch.observed)) for batch in batches),
        }
        _write(self._path, batches, spool, observer.kept(), metadata)
        self._kept_at = time.monotonic()
        self._cost = self._kept_at - begun


def _write(
    path: Path, batches: Sequence[Batch], spool: Spool, sums: Arrays, metadata: dict[str, str]
) -> None:
    arrays: dict[str, npt.NDArray[np.generic]] = {f"sums.{k}": v for k, v in sums.items()}
    hidden: dict[str, Batch] = {}
    planned: list[StoredTensor] = []
    for index, batch in enumerate(batches):
        arrays[f"batch.{index}.tokens"] = batch.tokens.numpy()
        arrays[f"batch.{index}.lengths"] = batch.lengths.numpy()
        name = f"batch.{index}.hidden"
        hidden[name] = batch
        shape = (batch.tokens.numel(), spool.shape[1])
        planned.append(StoredTensor(name, _STORED[spool.dtype], shape))

    def contents(tensor: StoredTensor) -> Iterator[memoryview]:
        if tensor.name in arrays:
            yield array_bytes(arrays[tensor.name])
        else:
            loaded = spool.load(hidden[tensor.name].place).cpu().contiguous()
            yield loaded.view(torch.uint8).numpy().reshape(-1).data

    planned = [stored_array(name, array) for name, array in arrays.items()] + planned
    write_safetensors(path, planned, contents, metadata)


def _state(
    file: Checkpoint, metadata: dict[str, str], width: int, dtype: torch.dtype
) -> SweepState:
    """The state in a file; ValueError or KeyError if its parts do not fit one another."""
    tensors = file.tensors
    batches: list[Batch] = []
    for index, flag in enumerate(metadata["observed"]):
        tokens = _long(file, f"batch.{index}.tokens", 2)
        lengths = _long(file, f"batch.{index}.lengths", 1)
        hidden = tensors[f"batch.{index}.hidden"]
        _expect(hidden, _STORED[dtype], (tokens.numel(), width))
        if len(lengths) != len(tokens) or bool((lengths > tokens.shape[1]).any()):
            raise ValueError(f"batch {index} of uneven parts")
        batches.append(Batch(tokens, lengths, 0, flag == "1"))
    sums = {
        name.removeprefix("sums."): file.read(name) for name in tensors if name.startswith("sums.")
    }
    return SweepState(int(metadata["layer"]), batches, sums, file)


def _long(file: Checkpoint, name: str, n_axes: int) -> Tensor:
    tensor = file.tensors[name]
    _expect(tensor, "I64", tensor.shape)
    if len(tensor.shape) != n_axes:
        raise ValueError(f"{name} has the shape {tensor.shape}")
    return torch.from_numpy(file.read(name).astype(np.int64))


def _expect(tensor: StoredTensor, dtype: str, shape: tuple[int, ...]) -> None:
    if (tensor.dtype, tensor.shape) != (dtype, shape):
        raise ValueError(f"{tensor.name} is {tensor.dtype} {tensor.shape}, not {dtype} {shape}")
