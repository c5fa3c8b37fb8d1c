"""A batch on a CPU: work for threads, cut the same way for any number of threads.

The number of threads that torch divides one operation among changes the last bits of its result: a
matrix product takes other kernels, and an elementwise function ends each thread's share in scalar
code, which rounds differently. So here torch has one thread per operation, and the threads of a
crew take whole pieces of work: a slice of a batch's rows through a layer, one expert, a block of a
long row. Pieces are cut by shape alone. The result is then a function of the inputs and of the
machine's instruction set, for any number of threads. Another kind of processor may still round
differently: libraries choose their kernels by it.

The experts of a layer need the routed pairs of all rows at once. So all slices of a batch stop at
the experts, wait until the experts have run, and continue, each with its own rows of the result.

A batch of a few long rows has fewer slices than the machine has threads. For such rows `Spread`
cuts matrix products and attention into blocks, which idle threads take.
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
from torch.nn.functional import linear, scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

MOST_SLICES = 32  # of a batch; each has a thread of its own, and most threads wait
LONG = 1024  # positions; a slice has more only if it is a single row
_SLICE_TOKENS = 512  # with smaller slices, the calls cost more than the better balance gains
_BLOCK = 512  # rows of a matrix product: enough for its full speed

T = TypeVar("T")
R = TypeVar("R")
Joint = Callable[["Crew", list[Any]], list[Any]]


class _OtherSliceFailed(Exception):
    """Another slice of the batch failed, so this one stops."""


@dataclass(frozen=True)
class BatchSlice:
    """Some rows of a batch, which one thread takes through a layer."""

    number: int
    begin: int  # first position of the batch
    end: int
    meeting: _Meeting

    def meet(self, values: Any, joint: Joint) -> Any:
        """Wait for all slices; this slice's share of what `joint` computes from all values."""
        return self.meeting.attend(self.number, values, joint)


_local = threading.local()


def current_slice() -> BatchSlice | None:
    """The slice that this thread computes; None if batches are not divided, as on a GPU."""
    current: BatchSlice | None = getattr(_local, "slice", None)
    return current


class _Meeting:
    """Where the slices of a batch wait for one another."""

    def __init__(self, n_slices: int, permits: threading.Semaphore) -> None:
        self._changed = threading.Condition()
        self._permits = permits  # to compute; a slice that waits holds none
        self._n_present = n_slices
        self._values: dict[int, Any] = {}
        self._shares: dict[int, Any] = {}
        self._joint: Joint | None = None
        self._failed = False

    def attend(self, number: int, values: Any, joint: Joint) -> Any:
        self._permits.release()
        try:
            with self._changed:
                self._values[number], self._joint = values, joint
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._failed or number in self._shares)
                if self._failed:
                    raise _OtherSliceFailed
                return self._shares.pop(number)
        finally:
            self._permits.acquire()

    def leave(self, failed: bool) -> None:
        """A slice is done, or failed."""
        with self._changed:
            self._n_present -= 1
            self._failed |= failed
            self._changed.notify_all()

    def fail(self) -> None:
        """Stop all slices that wait."""
        with self._changed:
            self._failed = True
            self._changed.notify_all()

    def hold(self, crew: Crew) -> None:
        """Run joint work whenever all slices wait for it, until all are done or one failed."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._failed or len(self._values) == self._n_present)
                if self._failed or not self._n_present:
                    return
                numbers = sorted(self._values)
                everything = [self._values.pop(number) for number in numbers]
                joint = self._joint
            assert joint is not None
            shares = joint(crew, everything)
            del everything
            with self._changed:
                self._shares.update(zip(numbers, shares, strict=True))
                del shares
                self._changed.notify_all()


class Crew:
    """Threads that share work; torch has one thread per operation until the crew is closed."""

    def __init__(self, n_threads: int) -> None:
        self.n_threads = n_threads
        self._before = torch.get_num_threads()
        torch.set_num_threads(1)
        self._permits = threading.Semaphore(n_threads)
        # a new thread does not inherit MKL's setting
        self._slices = ThreadPoolExecutor(MOST_SLICES, "slices", torch.set_num_threads, (1,))
        self._helpers = ThreadPoolExecutor(n_threads, "helpers", torch.set_num_threads, (1,))

    def close(self) -> None:
        """End the threads; torch has as many threads as before again."""
        self._slices.shutdown(cancel_futures=True)
        self._helpers.shutdown(cancel_futures=True)
        torch.set_num_threads(self._before)

    def by_rows(self, function: Callable[[slice], Tensor], shape: torch.Size) -> Tensor:
        """`function` of slices of a batch's rows, joined; the batch has the shape (B, T, ...)."""
        n_rows, width = shape[:2]
        step = max(1, _SLICE_TOKENS // max(1, width), -(-n_rows // MOST_SLICES))
        starts = range(0, n_rows, step)
        meeting = _Meeting(len(starts), self._permits)
        futures: list[Future[Tensor]] = []
        try:
            for number, start in enumerate(starts):
                rows = slice(start, min(start + step, n_rows))
                part = BatchSlice(number, rows.start * width, rows.stop * width, meeting)
                futures.append(self._slices.submit(self._take, part, partial(function, rows)))
            meeting.hold(self)
        except BaseException:
            meeting.fail()
            raise
        finally:
            wait([future for future in futures if not future.cancel()])
        return torch.cat(_results(futures))

    def _take(self, part: BatchSlice, function: Callable[[], Tensor]) -> Tensor:
        failed = True
        is_long = part.end - part.begin > LONG
        with self._permits, torch.inference_mode():
            _local.slice = part
            try:
                with Spread(self) if is_long else nullcontext():
                    result = function()
                failed = False
                return result
            finally:
                _local.slice = None
                part.meeting.leave(failed)

    def together(self, function: Callable[[T], R], items: Sequence[T]) -> list[R]:
        """`function` of each item, in their order, by this slice's thread and by idle ones."""
        left = deque(enumerate(items))
        results: dict[int, R] = {}

        def work() -> None:
            while left:
                try:
                    number, item = left.popleft()
                except IndexError:
                    return  # another thread took the last one
                results[number] = function(item)

        helpers: list[Future[None]] = []
        while len(helpers) < len(items) - 1 and self._permits.acquire(blocking=False):
            try:
                helpers.append(self._helpers.submit(self._help, work))
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
        """`function` of each item, in their order; a few are computed in advance.

        For joint work only: a slice already holds a permit to compute.
        """
        ahead: deque[Future[R]] = deque()
        try:
            for item in items:
                ahead.append(self._helpers.submit(_inferring, function, item))
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
    """All results. Raises the first error of a slice that did not fail because of another."""
    for future in futures:
        error = None if future.cancelled() else future.exception()
        if error is not None and not isinstance(error, _OtherSliceFailed):
            raise error
    return [future.result() for future in futures]


class Spread(TorchFunctionMode):
    """A context in which this thread shares long matrix products and attention with idle ones."""

    def __init__(self, crew: Crew) -> None:
        super().__init__()
        self._crew = crew

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is linear and not kwargs and args[0].numel() > LONG * args[0].shape[-1]:
            return _linear(self._crew, *args)
        if func is scaled_dot_product_attention and len(args) == 3 and args[0].shape[-2] > LONG:
            return _attention(self._crew, *args, **kwargs)
        return func(*args, **kwargs)


def _linear(crew: Crew, values: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`values` (..., C) times `weight` (R, C) transposed, in blocks of rows: (..., R)."""
    rows = values.reshape(-1, values.shape[-1])
    product = rows.new_empty(len(rows), len(weight))

    def run(first: int) -> None:
        block = slice(first, first + _BLOCK)
        torch.mm(rows[block], weight.t(), out=product[block])

    crew.together(run, range(0, len(rows), _BLOCK))
    if bias is not None:
        product += bias
    return product.view(*values.shape[:-1], len(weight))


def _attention(
    crew: Crew,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    **others: Any,
) -> Tensor:
    """Attention (B, heads, T, D), the queries of each key head apart."""
    n_keys, n_shared = key.shape[1], query.shape[1] // key.shape[1]
    if attn_mask is not None and attn_mask.dim() == 4 and attn_mask.shape[1] > 1:
        return scaled_dot_product_attention(query, key, value, attn_mask, **others)

    def run(head: int) -> Tensor:
        queries = query[:, head * n_shared : (head + 1) * n_shared]
        one = slice(head, head + 1)
        return scaled_dot_product_attention(
            queries, key[:, one], value[:, one], attn_mask, **others
        )

    return torch.cat(crew.together(run, range(n_keys)), dim=1)
