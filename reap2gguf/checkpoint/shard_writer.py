"""Writes the shards of a checkpoint with several threads.

The bytes of all shards are one list of pieces, of which a thread that is free takes the next. Up to
four shards are written at once, since a file system lets one thread at a time write to a file, and
one thread hashes a file. A shard gets its final name as soon as it is on the disk.

Reading and writing was measured against `copy_file_range`, which is slower where source and target
do not begin at the same place in a page, and safetensors seldom do.

Memory: 1 MiB for each thread, of which there are at most 16, besides what the hashes need.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from reap2gguf.atomic import OutputFile, check_replaceable, open_file, part_of, rename
from reap2gguf.checkpoint.weights import Weights
from reap2gguf.disk.threads import share_out
from reap2gguf.errors import OutputError

if TYPE_CHECKING:
    from pathlib import Path

    import numpy.typing as npt

    from reap2gguf.checkpoint.safetensors_header import StoredTensor
    from reap2gguf.disk.hashing import Hashes

Contents = Callable[["StoredTensor"], Iterable[memoryview]]
_PIECE_BYTES = 2**24
_BUFFER_BYTES = 2**20
_MOST_THREADS = 16  # more do not write faster
_SHARDS_AT_ONCE = 4
_LEAST_AHEAD = 4  # pieces that the disk reads while others are written


@dataclass(frozen=True)
class ShardPlan:
    """One file: its final name, everything before the first tensor, and its tensors."""

    path: Path
    header: bytes
    tensors: Sequence[StoredTensor]

    @property
    def n_bytes(self) -> int:
        """Bytes of the whole file."""
        return len(self.header) + sum(tensor.n_bytes for tensor in self.tensors)


@dataclass
class _Shard:
    """A shard that is being written."""

    plan: ShardPlan
    n_left: int  # pieces
    file: OutputFile | None = None
    held: ExitStack = field(default_factory=ExitStack)

    def open(self, hashes: Hashes | None) -> None:
        """Reserve its room, so that a full disk is found now."""
        path = self.plan.path
        check_replaceable(path)
        file = self.held.enter_context(open_file(part_of(path), path))
        file.reserve(self.plan.n_bytes)
        self.file = file.hashed_by(hashes, self.plan.n_bytes)
        self.file.write_at(self.plan.header, 0)

    def finish(self) -> None:
        """Flush it and give it its name."""
        assert self.file is not None
        self.file.finish()
        self.held.close()
        rename(part_of(self.plan.path), self.plan.path)
        self.file = None

    def give_up(self) -> None:
        """Remove what is written of it."""
        if self.file is None and not part_of(self.plan.path).is_file():
            return
        with suppress(OSError, OutputError):  # the error that is being raised says more
            self.held.close()
        with suppress(OSError):
            part_of(self.plan.path).unlink(missing_ok=True)


@dataclass(frozen=True)
class _Piece:
    """Bytes of one tensor, and where in the file they go; no tensor if the shard has no bytes."""

    shard: _Shard
    tensor: StoredTensor | None
    first: int
    n_bytes: int
    position: int


def write_shards(
    plans: Sequence[ShardPlan],
    contents: Contents | Weights,
    wrote: Callable[[int], None],
    n_threads: int = 1,
    hashes: Hashes | None = None,
) -> None:
    """Write all shards, whole or not at all; `contents` are as for `write_checkpoint`.

    `wrote` is called by one thread at a time. Raises OutputError if the disk refuses, and what
    reading raises; then nothing is left of shards that are not finished.
    """
    job = _Job(contents, wrote, hashes)
    n_threads = min(n_threads, _MOST_THREADS)
    pieces = job.pieces(plans, n_threads)
    stopping = contents.without_fetching if isinstance(contents, Weights) else nullcontext
    try:
        share_out(job.write, pieces, n_threads, stopping)
    finally:
        for shard in job.shards:
            shard.give_up()  # those that are finished have nothing left


class _Job:
    """What the threads share."""

    def __init__(
        self, contents: Contents | Weights, wrote: Callable[[int], None], hashes: Hashes | None
    ) -> None:
        self.shards: list[_Shard] = []  # all that were opened
        self._contents = contents
        self._wrote = wrote
        self._hashes = hashes
        self._lock = threading.Lock()
        self._own = threading.local()

    def pieces(self, plans: Sequence[ShardPlan], n_threads: int) -> Iterator[_Piece]:
        """The pieces of all shards in turn, their bytes expected, their files open."""
        at_once = min(_SHARDS_AT_ONCE, n_threads)
        n_ahead = max(_LEAST_AHEAD, 2 * n_threads)
        coming: deque[_Piece] = deque()
        for piece in self._in_turn(plans, at_once):
            if isinstance(self._contents, Weights) and piece.tensor is not None:
                self._contents.expect_bytes(piece.tensor.name, piece.first, piece.n_bytes)
            coming.append(piece)
            if len(coming) > n_ahead:
                yield self._opened(coming.popleft())
        while coming:
            yield self._opened(coming.popleft())

    def _in_turn(self, plans: Sequence[ShardPlan], at_once: int) -> Iterator[_Piece]:
        """One piece of each shard that is written at once, then the next of each."""
        waiting = iter(plans)
        lists = deque(map(self._of_shard, islice(waiting, at_once)))
        while lists:
            pieces = lists.popleft()
            if (piece := next(pieces, None)) is not None:
                yield piece
                lists.append(pieces)
            elif (plan := next(waiting, None)) is not None:
                lists.appendleft(self._of_shard(plan))

    def _of_shard(self, plan: ShardPlan) -> Iterator[_Piece]:
        # what is not read in ranges is one piece for each tensor
        whole = not isinstance(self._contents, Weights)
        places: list[tuple[StoredTensor, int, int, int]] = []
        position = len(plan.header)
        for tensor in plan.tensors:
            step = max(1, tensor.n_bytes) if whole else _PIECE_BYTES
            for first in range(0, max(tensor.n_bytes, int(whole)), step):
                count = min(step, tensor.n_bytes - first)
                places.append((tensor, first, count, position + first))
            position += tensor.n_bytes
        shard = _Shard(plan, max(1, len(places)))
        self.shards.append(shard)
        if not places:
            yield _Piece(shard, None, 0, 0, position)
        for place in places:
            yield _Piece(shard, *place)

    def _opened(self, piece: _Piece) -> _Piece:
        if piece.shard.file is None:
            piece.shard.open(self._hashes)
        return piece

    def write(self, piece: _Piece) -> None:
        """Write one piece; after the last of a shard, the shard is finished."""
        assert piece.shard.file is not None
        if piece.tensor is not None:
            if isinstance(self._contents, Weights):
                self._copy(self._contents, piece.shard.file, piece.tensor, piece)
            else:
                self._pour(self._contents, piece.shard.file, piece.tensor, piece)
        with self._lock:
            piece.shard.n_left -= 1
            is_whole = piece.shard.n_left == 0
        if is_whole:
            piece.shard.finish()

    def _copy(
        self, weights: Weights, file: OutputFile, tensor: StoredTensor, piece: _Piece
    ) -> None:
        for first in range(0, piece.n_bytes, _BUFFER_BYTES):
            buffer = self._buffer()[: min(_BUFFER_BYTES, piece.n_bytes - first)]
            weights.read_bytes(tensor.name, piece.first + first, buffer)
            file.write_at(buffer.data, piece.position + first)
        self._advance(piece.n_bytes)

    def _pour(
        self, contents: Contents, file: OutputFile, tensor: StoredTensor, piece: _Piece
    ) -> None:
        written = 0
        for part in contents(tensor):
            file.write_at(part, piece.position + written)
            written += part.nbytes
            self._advance(part.nbytes)
        assert written == tensor.n_bytes, f"{tensor.name}: {written} of {tensor.n_bytes} bytes"

    def _advance(self, n_bytes: int) -> None:
        with self._lock:
            self._wrote(n_bytes)

    def _buffer(self) -> npt.NDArray[np.uint8]:
        if not hasattr(self._own, "buffer"):
            self._own.buffer = np.empty(_BUFFER_BYTES, dtype=np.uint8)
        buffer: npt.NDArray[np.uint8] = self._own.buffer
        return buffer
