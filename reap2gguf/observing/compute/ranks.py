"""Several processes, one GPU each, that share out the rows of a sweep.

Started by `torchrun --nproc-per-node N -m reap2gguf ...`: every process streams all layers over its
batches, and after each layer the sums of all are added. The first process speaks and writes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import TypeVar

import torch
import torch.distributed as dist

# Loaded before any group exists: its functions' defaults would keep the group, and its threads,
# alive beyond the interpreter's end, which aborts the process.
import torch.distributed.nn.functional
from torch import Tensor

from reap2gguf.errors import PeerError, UsageError
from reap2gguf.machine import Processes, processes

T = TypeVar("T")
_PATIENCE = timedelta(days=2)  # the others wait while the first prunes


@dataclass(frozen=True)
class Ranks(Processes):
    """This process among its peers, and what they say to one another."""

    def share(self, everything: Sequence[T]) -> list[T]:
        """This process's share of all: every `size`-th."""
        return list(everything[self.rank :: self.size])

    def add(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by the sum over all processes."""
        self._reduce(tensors, dist.ReduceOp.SUM)

    def peak(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by the maximum over all processes."""
        self._reduce(tensors, dist.ReduceOp.MAX)

    def total(self, values: Sequence[int]) -> list[int]:
        """Each number summed over all processes."""
        tensor = torch.tensor(values, dtype=torch.int64)
        self.add([tensor])
        return [int(value) for value in tensor]

    def least(self, value: int) -> int:
        """The smallest of all processes' numbers."""
        tensor = torch.tensor([value], dtype=torch.int64)
        self._reduce([tensor], dist.ReduceOp.MIN)
        return int(tensor)

    def _reduce(self, tensors: Iterable[Tensor], operation: dist.ReduceOp.RedOpType) -> None:
        if self.size > 1:
            with _peers_lost_told():
                for tensor in tensors:
                    dist.all_reduce(tensor, operation)

    def tell(self, word: T | None) -> T:
        """What the first process says, in all of them."""
        words = [word]
        if self.size > 1:
            with _peers_lost_told():
                dist.broadcast_object_list(words, src=0, device=torch.device("cpu"))
        found = words[0]
        assert found is not None
        return found


@cache
def join() -> Ranks:
    """This process's place; where there are others, they are met here.

    Raises PeerError if they cannot be reached.
    """
    here = processes()
    ranks = Ranks(here.rank, here.local, here.size)
    if ranks.size == 1:
        return ranks
    n_gpus = torch.cuda.device_count()
    if n_gpus:
        torch.cuda.set_device(min(ranks.local, n_gpus - 1))
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if n_gpus else "gloo", timeout=_PATIENCE)
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise PeerError(f"the processes of this run cannot reach one another ({reason})") from error
    return ranks


def meet_on(ranks: Ranks, device: torch.device) -> None:
    """Let processes that compute on `device` connect, which takes memory, before it is divided.

    Raises UsageError if two of them would share a GPU.
    """
    if ranks.size == 1 or device.type != "cuda":
        return
    if ranks.local >= torch.cuda.device_count():
        raise UsageError(
            f"torchrun started more processes on this machine than its {torch.cuda.device_count()} "
            "GPUs; pass --nproc-per-node with their number, or --device cpu"
        )
    ranks.add([torch.zeros(1, device=device)])
    torch.cuda.synchronize(device)


@contextmanager
def _peers_lost_told() -> Iterator[None]:
    """torch's errors of a lost connection are pages long."""
    try:
        yield
    except RuntimeError as error:
        raise PeerError("another process of this run ended; its own message says why") from error


def leave() -> None:
    """End what `join` began, if it began anything; all together.

    Not for a process that failed: it would wait for others, which wait for it.
    """
    if dist.is_available() and dist.is_initialized():
        join().total([0])  # who ended first would close connections that others still use
        dist.destroy_process_group()
