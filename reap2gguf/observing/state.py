"""Saves the state of a sweep between two layers, so that an interrupted sweep can resume.

A state is a safetensors file: the hidden states, tokens and lengths of every batch, and the sums of
the finished layers. It is as large as the spool, so it is written only if that takes little time
compared with the layers since the last save; on a GPU that computes a layer in a second, never.
Memory: one batch on the host.

Each of several processes saves a state of its own, on its machine, and keeps the last one until all
have saved the next. So at any moment there is a layer that all of them can resume from.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from reap2gguf.artifacts.made_with import MADE_WITH, computing, decode, encode, other_versions
from reap2gguf.atomic import output_errors, part_of, remove, rename
from reap2gguf.checkpoint.safetensors_header import StoredTensor, read_header, read_metadata
from reap2gguf.checkpoint.tensor_files import TensorFiles
from reap2gguf.checkpoint.writer import array_bytes, stored_array, write_safetensors
from reap2gguf.errors import CheckpointError
from reap2gguf.observing.batches import Batch
from reap2gguf.observing.budget import MOST_OF_TIME, save_seconds

if TYPE_CHECKING:
    from reap2gguf.observing.compute.ranks import Ranks
    from reap2gguf.observing.observer import Arrays, LayerObserver
    from reap2gguf.observing.spool import Spool
    from reap2gguf.options import Resume

_STORED = {torch.bfloat16: "BF16", torch.float32: "F32"}


@dataclass(frozen=True)
class SweepState:
    """A sweep before its layer `layer`."""

    layer: int
    batches: list[Batch]
    sums: Arrays
    _file: TensorFiles

    def hidden(self, index: int, dtype: torch.dtype) -> Tensor:
        """The hidden states of batch `index`, (n, H), on the host."""
        raw = torch.from_numpy(self._file.read(f"batch.{index}.hidden"))
        return raw.view(dtype) if raw.dtype == torch.uint16 else raw

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class StateKeeper:
    """Loads the state of an interrupted sweep, and saves that of this one from time to time."""

    def __init__(
        self,
        resume: Resume | None,
        observer: LayerObserver,
        ranks: Ranks,
        batch_tokens: int,
        note: Callable[[str], None],
    ) -> None:
        several = f".{ranks.rank}-of-{ranks.size}" if ranks.size > 1 else ""
        self._path = resume.path.with_name(resume.path.name + several) if resume else None
        # where one of several processes writes the next state
        self._following = self._path.with_name(f"{self._path.name}.next") if self._path else None
        # batches of another size make other sums than a sweep that was not interrupted
        self._identity = {
            "key": resume.key if resume else "",
            "batch_tokens": str(batch_tokens),
        }
        self._made_with = computing(resume.made_with) if resume else {}
        self._observer = observer
        self._ranks = ranks
        self._note = note
        self._saved_at = time.monotonic()
        self._cost: float | None = None  # seconds that the last save took

    def load(self, width: int, dtype: torch.dtype) -> SweepState | None:
        """The saved state, if all processes have one of the same layer; the caller closes it.

        `width`: hidden size. The observer takes over the sums of the finished layers.
        """
        if self._path is not None and not self._is_seen_by_all(self._path.parent):
            self._note(
                f"not every process sees {self._path.parent}, so the progress between layers is "
                "not saved; an interrupted pass starts again"
            )
            self._path = None
        self._choose()
        state = self._read(width, dtype)
        layer = state.layer if state else 0
        first, last = self._ranks.least(layer), -self._ranks.least(-layer)
        if state is not None and (first != last or not layer):
            state.close()
            state = None
        return state

    def _is_seen_by_all(self, folder: Path) -> bool:
        """Whether the folder is there for processes on other machines too."""
        return self._ranks.size == 1 or bool(self._ranks.least(int(folder.is_dir())))

    def _choose(self) -> None:
        """Keep the last state that all processes have: a kill may come between two renames."""
        if self._path is None or self._ranks.size == 1:
            return
        assert self._following is not None
        remove(part_of(self._following))
        own = {self._layer(path): path for path in (self._following, self._path)}
        saved = self._ranks.gather([layer for layer in own if layer])
        common = set(saved[0]).intersection(*saved[1:])
        if common and own[max(common)] == self._following:
            rename(self._following, self._path)
        remove(self._following)

    def _layer(self, path: Path) -> int:
        """The layer that a state of this sweep is before; 0 if it is none."""
        try:
            metadata = read_metadata(path) if path.is_file() else {}
            is_own = {name: metadata.get(name) for name in self._identity} == self._identity
            return int(metadata["layer"]) if is_own else 0
        except (CheckpointError, KeyError, ValueError):
            return 0  # `_read` reports it

    def _read(self, width: int, dtype: torch.dtype) -> SweepState | None:
        if self._path is None:
            return None
        remove(part_of(self._path))
        if not self._path.is_file():
            return None
        try:
            tensors, metadata = read_header(self._path), read_metadata(self._path)
            if {name: metadata.get(name) for name in self._identity} != self._identity:
                return None
            if others := other_versions(decode(metadata[MADE_WITH]), self._made_with):
                self._note(
                    f"{self._path.name}: the saved state was {others}; starting from the first "
                    "layer, so that one version computes all layers"
                )
                return None
            with ExitStack() as stack:
                file = TensorFiles(self._path.parent, {}, tensors, (self._path,))
                stack.callback(file.close)
                state = _state(file, metadata, width, dtype)
                # a sweep that starts from the first layer replaces them, layer by layer
                self._observer.restore(state.sums)
                stack.pop_all()  # the file remains open for the hidden states
            return state
        except (CheckpointError, KeyError, ValueError) as error:
            self._note(
                f"{self._path.name}: saved state is unreadable ({error}); starting from the first "
                "layer"
            )
            return None

    def is_due(self, batches: Sequence[Batch], spool: Spool) -> bool:
        """Whether saving takes little of the time since the last save, for all processes."""
        cost = self._cost or save_seconds(_hidden_bytes(batches, spool))
        is_due = time.monotonic() - self._saved_at >= cost / MOST_OF_TIME
        return bool(self._ranks.least(int(is_due and self._path is not None)))

    def save(self, layer: int, batches: Sequence[Batch], spool: Spool) -> None:
        """Save the sweep as it is before `layer`, if the disk has room for it."""
        assert self._path is not None
        n_bytes = _hidden_bytes(batches, spool)
        with output_errors(self._path):
            free = shutil.disk_usage(self._path.parent).free
        if not self._ranks.least(int(free > 1.1 * n_bytes * self._ranks.on_machine)):
            self._note("not enough disk space to save progress between layers")
            self._saved_at = time.monotonic()
            return
        begun = time.monotonic()
        metadata = self._identity | {
            "layer": str(layer),
            MADE_WITH: encode(self._made_with),
            "observed": "".join(str(int(batch.observed)) for batch in batches),
        }
        path = self._path
        if self._ranks.size > 1:
            assert self._following is not None
            path = self._following
        _write(path, batches, spool, self._observer.finished_sums(), metadata)
        if path != self._path:
            self._ranks.least(1)  # all have written it
            rename(path, self._path)
        self._saved_at = time.monotonic()
        self._cost = self._saved_at - begun


def _hidden_bytes(batches: Sequence[Batch], spool: Spool) -> int:
    n_positions = sum(batch.tokens.numel() for batch in batches)
    return n_positions * spool.shape[1] * spool.dtype.itemsize


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
            loaded = spool.load(hidden[tensor.name].span).cpu().contiguous()
            yield loaded.view(torch.uint8).numpy().reshape(-1).data

    planned = [stored_array(name, array) for name, array in arrays.items()] + planned
    write_safetensors(path, planned, contents, metadata)


def _state(
    file: TensorFiles, metadata: dict[str, str], width: int, dtype: torch.dtype
) -> SweepState:
    """The state in a file. Raises ValueError or KeyError if its parts do not fit together."""
    tensors = file.tensors
    batches: list[Batch] = []
    for index, flag in enumerate(metadata["observed"]):
        tokens = _long(file, f"batch.{index}.tokens", 2)
        lengths = _long(file, f"batch.{index}.lengths", 1)
        hidden = tensors[f"batch.{index}.hidden"]
        _expect(hidden, _STORED[dtype], (tokens.numel(), width))
        if len(lengths) != len(tokens) or bool((lengths > tokens.shape[1]).any()):
            raise ValueError(f"the tensors of batch {index} do not fit together")
        batches.append(Batch(tokens, lengths, 0, flag == "1"))
    sums = {
        name.removeprefix("sums."): file.read(name) for name in tensors if name.startswith("sums.")
    }
    return SweepState(int(metadata["layer"]), batches, sums, file)


def _long(file: TensorFiles, name: str, n_axes: int) -> Tensor:
    tensor = file.tensors[name]
    _expect(tensor, "I64", tensor.shape)
    if len(tensor.shape) != n_axes:
        raise ValueError(f"{name} has the shape {tensor.shape}")
    return torch.from_numpy(file.read(name).astype(np.int64))


def _expect(tensor: StoredTensor, dtype: str, shape: tuple[int, ...]) -> None:
    if (tensor.dtype, tensor.shape) != (dtype, shape):
        raise ValueError(f"{tensor.name} is {tensor.dtype} {tensor.shape}, not {dtype} {shape}")
