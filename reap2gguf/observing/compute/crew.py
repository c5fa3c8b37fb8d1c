"""A batch on a CPU: pieces of it, each on one thread, whose shapes no number of threads changes.

How many threads torch divides an operation among shows in its last bits: a matrix product takes
other kernels, and an elementwise function ends each thread's share in scalar code, which rounds
differently. So here torch has one thread an operation, and the threads of a crew take whole pieces:
some rows of a batch through a layer, one expert, a block of a long row. What is computed is then a
function of the inputs and the machine's instruction set, however many threads there are. Another
kind of processor may still round differently: libraries choose their kernels by it.

A layer's experts want the pairs of all rows at once. Every piece stops there, and goes on with its
share once the experts have run.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from reap2gguf.observing.compute.spread import LONG, Spread

MOST_PIECES = 32  # of a batch; each has a thread of its own, most of which wait
_PIECE_TOKENS = 512  # smaller ones cost more in calls than they gain in balance

T = TypeVar("T")
R = TypeVar("R")
Joint = Callable[["Crew", list[Any]], list[Any]]


class _LeftAlone(Exception):
    """Another piece failed; this one cannot go on."""


@dataclass(frozen=True)
class Piece:
    """Rows of a batch that one thread takes through a layer."""

    number: int
    begin: int  # of the batch's positions
    end: int
    meeting: _Meeting

    def meet(self, brought: Any, joint: Joint) -> Any:
        """What `joint` makes of what every piece brings, this one's share of it."""
        return self.meeting.attend(self.number, brought, joint)


_local = threading.local()


def current_piece() -> Piece | None:
    """The piece that this thread is at; None where a batch is not divided."""
    piece: Piece | None = getattr(_local, "piece", None)
    return piece


class _Meeting:
    """Where the pieces of a batch wait for one another."""

    def __init__(self, n_pieces: int, permits: threading.Semaphore) -> None:
        self._changed = threading.Condition()
        self._permits = permits  # to compute; a piece that waits has none
        self._n_present = n_pieces
        self._brought: dict[int, Any] = {}
        self._shares: dict[int, Any] = {}
        self._joint: Joint | None = None
        self._failed = False

    def attend(self, number: int, brought: Any, joint: Joint) -> Any:
        self._permits.release()
        try:
            with self._changed:
                self._brought[number], self._joint = brought, joint
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._failed or number in self._shares)
                if self._failed:
                    raise _LeftAlone
                return self._shares.pop(number)
        finally:
            self._permits.acquire()

    def leave(self, failed: bool) -> None:
        """A piece is through, or failed."""
        with self._changed:
            self._n_present -= 1
            self._failed |= failed
            self._changed.notify_all()

    def fail(self) -> None:
        """Let nobody wait any longer."""
        with self._changed:
            self._failed = True
            self._changed.notify_all()

    def hold(self, crew: Crew) -> None:
        """Run joint work whenever all pieces wait for it, until all have left or one failed."""
        while True:
            with self._changed:
                self._changed.wait_for(
                    lambda: self._failed or len(self._brought) == self._n_present
                )
                if self._failed or not self._n_present:
                    return
                numbers = sorted(self._brought)
                everything = [self._brought.pop(number) for number in numbers]
                joint = self._joint
            assert joint is not None
            shares = joint(crew, everything)
            del everything
            with self._changed:
                self._shares.update(zip(numbers, shares, strict=True))
                del shares
                self._changed.notify_all()


class Crew:
    """Threads that take pieces of work; torch has one thread an operation until it is closed."""

    def __init__(self, n_threads: int) -> None:
        self.n_threads = n_threads
        self._before = torch.get_num_threads()
        torch.set_num_threads(1)
        self._permits = threading.Semaphore(n_threads)
        # a new thread does not inherit what MKL was told
        self._pieces = ThreadPoolExecutor(MOST_PIECES, "pieces", torch.set_num_threads, (1,))
        self._hands = ThreadPoolExecutor(n_threads, "hands", torch.set_num_threads, (1,))

    def close(self) -> None:
        """End the threads; torch has as many as before."""
        self._pieces.shutdown(cancel_futures=True)
        self._hands.shutdown(cancel_futures=True)
        torch.set_num_threads(self._before)

    def by_rows(self, function: Callable[[slice], Tensor], shape: torch.Size) -> Tensor:
        """`function` of slices of a batch's rows, joined; `shape` (B, T, ...) is the batch's."""
        n_rows, width = shape[:2]
        step = max(1, _PIECE_TOKENS // max(1, width), -(-n_rows // MOST_PIECES))
        starts = range(0, n_rows, step)
        meeting = _Meeting(len(starts), self._permits)
        futures: list[Future[Tensor]] = []
        try:
            for number, start in enumerate(starts):
                rows = slice(start, min(start + step, n_rows))
                piece = Piece(number, rows.start * width, rows.stop * width, meeting)
                futures.append(self._pieces.submit(self._take, piece, partial(function, rows)))
            meeting.hold(self)
        except BaseException:
            meeting.fail()
            raise
        finally:
            wait([future for future in futures if not future.cancel()])
        return torch.cat(_results(futures))

    def _take(self, piece: Piece, function: Callable[[], Tensor]) -> Tensor:
        failed = True
        is_long = piece.end - piece.begin > LONG
        with self._permits, torch.inference_mode():
            _local.piece = piece
            try:
                with Spread(self) if is_long else nullcontext():
                    result = function()
                failed = False
                return result
            finally:
                _local.piece = None
                piece.meeting.leave(failed)

    def together(self, function: Callable[[T], R], items: Sequence[T]) -> list[R]:
        """`function` of each item, in their order, by this piece's thread and by idle ones."""
        left = deque(enumerate(items))
        results: dict[int, R] = {}

        def work() -> None:
            while left:
                try:
                    number, item = left.popleft()
                except IndexError:
                    return  # another thread was quicker
                results[number] = function(item)

        helpers: list[Future[None]] = []
        while len(helpers) < len(items) - 1 and self._permits.acquire(blocking=False):
            try:
                helpers.append(self._hands.submit(self._help, work))
            except BaseException:
                self._permits.release()
                raise
        try:
            work()
        finally:
            wait(helpers)
        for helper in helpers:
            helper.result()
        return [results[number] for number in range(len(items))]

    def _help(self, work: Callable[[], None]) -> None:
        try:
            with torch.inference_mode():
                work()
        finally:
            self._permits.release()

    def in_order(self, function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        """`function` of each item, in their order; a few are computed ahead.

        Not for a piece, which has a permit: for joint work.
        """
        ahead: deque[Future[R]] = deque()
        try:
            for item in items:
                ahead.append(self._hands.submit(_inferring, function, item))
                if len(ahead) > 2 * self.n_threads:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            wait([future for future in ahead if not future.cancel()])


def _inferring(function: Callable[[T], R], item: T) -> R:
    with torch.inference_mode():
        return function(item)


def _results(futures: Sequence[Future[Tensor]]) -> list[Tensor]:
    """All results; or the first error that is a piece's own."""
    for future in futures:
        error = None if future.cancelled() else future.exception()
        if error is not None and not isinstance(error, _LeftAlone):
            raise error
    return [future.result() for future in futures]
