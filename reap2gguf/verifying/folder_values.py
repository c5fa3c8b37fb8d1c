"""The values of a safetensors folder: every byte as it must be, and no NaN or infinity.

Threads take parts of tensors, read the file and what it must hold into two small buffers, and
compare them while both are in the processor's cache. Each byte is read once. Violations come in the
order of the file, whatever thread finds them.

Memory: 3 MiB for each thread.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from reap2gguf.models.description import Expert

if TYPE_CHECKING:
    from reap2gguf.checkpoint.checkpoint import Checkpoint
    from reap2gguf.checkpoint.safetensors_header import StoredTensor
    from reap2gguf.checkpoint.weights import Weights
    from reap2gguf.models.contract import MoeModel

_PART_BYTES = 2**23  # that a thread takes at a time
_BLOCK_BYTES = 2**20  # a multiple of every type's size
# the bits of the exponent: all of them are set in NaN and infinity only; of FP8, all but the sign
_NOT_FINITE = {"F32": 0x7F800000, "F16": 0x7C00, "BF16": 0x7F80, "F8_E4M3": 0x7F}
_Raw = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class _Part:
    stored: StoredTensor
    first: int
    n_bytes: int


class Values:
    """The values of an opened folder, with what they must be where that is known."""

    def __init__(
        self, checkpoint: Checkpoint, model: MoeModel, expected: Weights | None = None
    ) -> None:
        """`model` describes the folder. Tensors that `expected` does not have are only checked."""
        self._opened = checkpoint
        self._checkpoint = checkpoint.stored
        self._model = model
        self._expected = None if expected is None else expected.stored
        self._own = threading.local()

    def check(
        self, tensors: Iterable[StoredTensor], n_threads: int, advance: Callable[[float], None]
    ) -> Iterator[str]:
        """One violation at most for each tensor; `advance` gets the bytes that were read.

        Raises CheckpointError if either cannot be read.
        """
        bad: set[str] = set()
        pool = ThreadPoolExecutor(n_threads)
        running: deque[tuple[_Part, Future[str | None]]] = deque()

        def result() -> str | None:
            part, future = running.popleft()
            found = future.result()
            advance(part.n_bytes)
            if found is None or part.stored.name in bad:
                return None
            bad.add(part.stored.name)
            return found

        try:
            for part in _parts(tensors):
                if part.stored.name in bad:
                    continue
                self._expect(part)
                running.append((part, pool.submit(self._violation, part)))
                if len(running) > 3 * n_threads and (found := result()):
                    yield found
            while running:
                if found := result():
                    yield found
        except BaseException:
            with self._expected_or_folder.without_fetching():
                pool.shutdown(cancel_futures=True)
            raise
        pool.shutdown()

    @property
    def _expected_or_folder(self) -> Weights:
        return self._expected or self._checkpoint

    def _plan(self, name: str) -> Weights | None:
        """What has the bytes that a tensor must have."""
        return self._expected if self._expected and name in self._expected.tensors else None

    def _expect(self, part: _Part) -> None:
        self._checkpoint.expect_bytes(part.stored.name, part.first, part.n_bytes)
        if plan := self._plan(part.stored.name):
            plan.expect_bytes(part.stored.name, part.first, part.n_bytes)

    def _violation(self, part: _Part) -> str | None:
        """What is wrong with a part, in the first of its blocks where anything is."""
        stored, end = part.stored, part.first + part.n_bytes
        plan = self._plan(stored.name)
        for first in range(part.first, end, _BLOCK_BYTES):
            raw, wanted, scratch = (
                buffer[: min(_BLOCK_BYTES, end - first)] for buffer in self._buffers()
            )
            self._checkpoint.read_bytes(stored.name, first, raw)
            if plan is not None:
                plan.read_bytes(stored.name, first, wanted)
                if not _are_equal(raw, wanted):
                    return self._difference(plan, stored, first, raw != wanted)
            if not _is_finite(stored, raw, scratch):
                return self._not_finite(stored, first, raw, plan is not None)
        return None

    def _difference(
        self, plan: Weights, stored: StoredTensor, first: int, differ: npt.NDArray[np.bool_]
    ) -> str:
        byte = first + int(np.argmax(differ))
        entry = byte // (math.prod(stored.shape[1:]) * stored.item_bytes)
        source_name, source_entry = plan.origin(stored.name, entry)
        return (
            f"{self._where(stored)}: entry {entry} differs from entry {source_entry} of the "
            f"source's {source_name}"
        )

    def _not_finite(self, stored: StoredTensor, first: int, raw: _Raw, is_planned: bool) -> str:
        role = self._model.role(self._opened.weight_name(stored.name))
        which = ""
        if not is_planned and isinstance(role, Expert) and role.expert is None:
            mask = _NOT_FINITE[stored.dtype]
            bad = (_bits(stored, raw) & mask) == mask
            value = first // stored.item_bytes + int(np.argmax(bad))
            which = f" for expert {value * stored.shape[0] // stored.n_elements}"
        return f"{self._where(stored)} holds NaN or infinite values{which}"

    def _where(self, stored: StoredTensor) -> str:
        return f"{self._checkpoint.folder.name}: {stored.name}"

    def _buffers(self) -> tuple[_Raw, ...]:
        if not hasattr(self._own, "buffers"):
            self._own.buffers = tuple(np.empty(_BLOCK_BYTES, dtype=np.uint8) for _ in range(3))
        buffers: tuple[_Raw, ...] = self._own.buffers
        return buffers


def _parts(tensors: Iterable[StoredTensor]) -> Iterator[_Part]:
    for stored in tensors:
        for first in range(0, stored.n_bytes, _PART_BYTES):
            yield _Part(stored, first, min(_PART_BYTES, stored.n_bytes - first))


def _are_equal(one: _Raw, other: _Raw) -> bool:
    """Whether bytes are equal; most are compared eight at a time."""
    n_words = one.size // 8 * 8
    return np.array_equal(
        one[:n_words].view(np.uint64), other[:n_words].view(np.uint64)
    ) and np.array_equal(one[n_words:], other[n_words:])


def _bits(stored: StoredTensor, raw: _Raw) -> npt.NDArray[np.unsignedinteger]:
    """Stored floats as integers of their bits."""
    return raw.view(f"<u{stored.item_bytes}")


def _is_finite(stored: StoredTensor, raw: _Raw, scratch: _Raw) -> bool:
    """Whether all values are finite; those that are no floats are. `scratch` is as long."""
    mask = _NOT_FINITE.get(stored.dtype)
    if mask is None or raw.size == 0:
        return True
    masked = _bits(stored, scratch)
    np.bitwise_and(_bits(stored, raw), masked.dtype.type(mask), out=masked)
    return int(masked.max()) != mask
