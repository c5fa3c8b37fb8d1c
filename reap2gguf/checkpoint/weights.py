"""How the weights of a model are read, wherever they come from: lazily, and a part at a time."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from reap2gguf.errors import CheckpointError

if TYPE_CHECKING:
    from reap2gguf.checkpoint.safetensors_header import StoredTensor
    from reap2gguf.gguf_files.blocks import Blocks
    from reap2gguf.gguf_files.reader import GgufHeader

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]

FLOATS = ("F32", "F16", "BF16")
_VALUES = 2**22  # read at a time
_COMPARED_BYTES = 2**24  # of each tensor, at a time
# BF16 has no numpy type: its bits travel as uint16.
NUMPY_TYPES = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "BF16": "<u2",
    "I64": "<i8",
    "U64": "<u8",
    "I32": "<i4",
    "U32": "<u4",
    "I16": "<i2",
    "U16": "<u2",
    "I8": "<i1",
    "U8": "<u1",
    "BOOL": "<u1",
    "F8_E4M3": "<u1",
    "F8_E5M2": "<u1",
}


class Weights(ABC):
    """The weights of one model: their names and shapes, and reads of any part of them.

    A `Checkpoint` reads them from its files. A `PrunedView` has those of the pruned model before
    they are written. Stages that come after the observations take either. Threads may share one.
    Memory: what a read returns.
    """

    folder: Path  # holds the tokenizer and the other small files of the model
    config: dict[str, Any]  # config.json; not to be changed
    tensors: Mapping[str, StoredTensor]  # a quantized weight is one of its decoded values

    @property
    def gguf(self) -> GgufHeader | None:
        """The header of the GGUF file that the weights are read from; None for safetensors."""
        return None

    @property
    def blocks(self) -> Blocks | None:
        """The tensors that such a file has, or will have without experts that go; None likewise."""
        return None

    @property
    def stored(self) -> Weights:
        """The same model as its files have it: quantized weights in their parts, and their config.

        Where nothing is quantized, these weights themselves.
        """
        return self

    def parts(self, name: str) -> tuple[str, ...]:
        """The tensors of `stored` that hold a tensor."""
        return (name,)

    def weight_name(self, part: str) -> str:
        """The tensor that a tensor of `stored` is a part of."""
        return part

    def kind(self, name: str) -> str:
        """What type a tensor's values are stored as, such as "BF16" or "MXFP4"."""
        return self.tensors[name].dtype

    def stored_bytes(self, name: str) -> int:
        """Bytes of a tensor as it is stored, with its scales."""
        return sum(self.stored.tensors[part].n_bytes for part in self.parts(name))

    @abstractmethod
    def read_bytes(self, name: str, first: int, buffer: npt.NDArray[np.uint8]) -> None:
        """Fill the 1D `buffer` with the bytes of a tensor from byte `first` on.

        Raises CheckpointError on a missing tensor, bytes beyond its end, or a short read.
        """

    @abstractmethod
    def expect_bytes(self, name: str, first: int, n_bytes: int) -> None:
        """Prefetch bytes that `read_bytes` will be asked for; returns at once."""

    @abstractmethod
    def fetch_ahead(self, names: Iterable[str]) -> None:
        """Begin to download the files of tensors that will be read soon; returns at once."""

    @abstractmethod
    def without_fetching(self) -> AbstractContextManager[None]:
        """A block in which nothing is downloaded: a read that needs it raises CancelledError."""

    def origin(self, name: str, entry: int = 0) -> tuple[str, int]:
        """The name in the files of `folder`, and the entry on axis 0, of a tensor's entry."""
        return name, entry

    @property
    def shown(self) -> Path:
        """What errors name: the folder, or the GGUF file that the user named."""
        return self.folder

    def shown_name(self, name: str, entry: int = 0) -> str:
        """A tensor's entry in quotes, as errors name it: by its name in the files."""
        return repr(self.origin(name, entry)[0])

    def have_same_values(self, one: str, other: str) -> bool:
        """Whether two tensors have the same shape and values; both are read, once.

        Memory: 80 MiB at most. Raises CheckpointError as `read_bytes` does, or if the values are
        no floats.
        """
        key = (one, other)
        if key not in self._compared:
            first, second = self._tensor(one), self._tensor(other)
            self._compared[key] = first.shape == second.shape and self._have_equal_parts(*key)
        return self._compared[key]

    @cached_property
    def _compared(self) -> dict[tuple[str, str], bool]:
        return {}

    def _have_equal_parts(self, one: str, other: str) -> bool:
        step = _COMPARED_BYTES // 4
        for first in range(0, self.tensors[one].n_elements, step):
            parts: list[Floats] = []
            for name in (one, other):
                count = min(step, self.tensors[name].n_elements - first)
                parts.append(self.read_values(name, first, count))
            if not np.array_equal(parts[0], parts[1]):
                return False
        return True

    @cached_property
    def n_bytes(self) -> int:
        """Bytes of all tensors together, as they are stored."""
        return sum(tensor.n_bytes for tensor in self.stored.tensors.values())

    @cached_property
    def n_parameters(self) -> int:
        """How many numbers they are; scales of quantized weights do not count."""
        return sum(tensor.n_elements for tensor in self.tensors.values())

    def read(
        self, name: str, first: int = 0, last: int | None = None, index: int | None = None
    ) -> npt.NDArray[np.generic]:
        """Rows `first` up to `last` along axis 0, as stored (BF16 as uint16 bits).

        With `index`, the rows are those of that entry along axis 0: expert `index` of a 3D tensor.
        Raises CheckpointError as `read_bytes` does.
        """
        shape, first_byte = self._locate(name, first, last, index)
        result = np.empty(shape, dtype=NUMPY_TYPES[self.tensors[name].dtype])
        self.read_bytes(name, first_byte, result.reshape(-1).view(np.uint8))
        return result

    def read_float32(
        self, name: str, first: int = 0, last: int | None = None, index: int | None = None
    ) -> npt.NDArray[np.float32]:
        """The same rows converted exactly to float32."""
        return to_float32(self.read(name, first, last, index), self.tensors[name].dtype, name)

    def read_values(self, name: str, first: int, count: int) -> Floats:
        """`count` neighbouring values as float32, from number `first` of the whole tensor on."""
        tensor = self._tensor(name)
        raw = np.empty(count * tensor.item_bytes, dtype=np.uint8)
        self.read_bytes(name, first * tensor.item_bytes, raw)
        return to_float32(raw.view(NUMPY_TYPES[tensor.dtype]), tensor.dtype, name)

    def expect(
        self, name: str, first: int = 0, last: int | None = None, index: int | None = None
    ) -> None:
        """Prefetch the rows that `read` will be asked for; returns at once."""
        shape, first_byte = self._locate(name, first, last, index)
        self.expect_bytes(name, first_byte, math.prod(shape) * self.tensors[name].item_bytes)

    def _locate(
        self, name: str, first: int, last: int | None, index: int | None
    ) -> tuple[tuple[int, ...], int]:
        """The shape of the rows that `read` describes, and the byte that they begin at."""
        tensor = self._tensor(name)
        shape, position = tensor.shape, 0
        if index is not None:
            shape = shape[1:]
            position = index * math.prod(shape)
        if shape:
            position += first * math.prod(shape[1:])
            shape = ((shape[0] if last is None else last) - first, *shape[1:])
        return shape, position * tensor.item_bytes

    def _tensor(self, name: str) -> StoredTensor:
        tensor = self.tensors.get(name)
        if tensor is None:
            raise CheckpointError(f"{self.folder}: no tensor {name!r}")
        return tensor

    def _check_range(self, name: str, first: int, n_bytes: int) -> None:
        """Raises CheckpointError if a tensor does not have bytes `first` to `first + n_bytes`."""
        size = self._tensor(name).n_bytes
        if first < 0 or first + n_bytes > size:
            raise CheckpointError(
                f"{self.folder}: tensor {name!r} has {size:,} bytes, not {first + n_bytes:,}"
            )


def values_of(weights: Weights, name: str) -> Iterator[Floats]:
    """All values of a stored tensor as float32, at most 16 MiB at a time, or one row."""
    stored = weights.tensors[name]
    if not stored.shape:
        yield weights.read_float32(name).reshape(1)
        return
    step = max(1, _VALUES // max(1, math.prod(stored.shape[1:])))
    for first in range(0, stored.shape[0], step):
        yield weights.read_float32(name, first, min(first + step, stored.shape[0]))


def first_not_finite(weights: Weights, names: Iterable[str]) -> str | None:
    """The first of these tensors that holds NaN or infinite values, as errors name it."""
    for name in names:
        if weights.tensors[name].dtype in FLOATS and not all(
            np.isfinite(values).all() for values in values_of(weights, name)
        ):
            return weights.shown_name(name)
    return None


def to_float32(raw: npt.NDArray[np.generic], dtype: str, name: str) -> npt.NDArray[np.float32]:
    """Stored F32, F16 or BF16 values as float32; CheckpointError for any other dtype."""
    if dtype == "F32":
        return raw.astype(np.float32, copy=False)
    if dtype == "F16":
        return raw.astype(np.float32)
    if dtype == "BF16":
        # bfloat16 is the upper half of a float32
        widened: npt.NDArray[np.uint32] = np.left_shift(raw, np.uint32(16), dtype=np.uint32)
        return widened.view(np.float32)
    raise CheckpointError(
        f"tensor {name!r} is stored as {dtype}, expected F32, F16 or BF16; dequantize the "
        "checkpoint first"
    )
