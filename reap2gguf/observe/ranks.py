"""Several processes, one GPU each, that share out the rows of a sweep.

Started by `torchrun --nproc-per-node N -m reap2gguf ...`: every process streams all layers over its
batches, and after each layer the sums of all are added. The first process speaks and writes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from reap2gguf.processes import Processes, processes

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

    def _reduce(self, tensors: Iterable[Tensor], operation: dist.ReduceOp.RedOpType) -> None:
        if self.size > 1:
            for tensor in tensors:
                dist.all_reduce(tensor, operation)

    def tell(self, word: T | None) -> T:
        """What the first process says, in all of them."""
        words = [word]
        if self.size > 1:
            dist.broadcast_object_list(words, src=0, device=torch.device("cpu"))
        found = words[0]
        assert found is not None
        return found


@cache
def join() -> Ranks:
    """This process's place; where there are others, they are met here."""
    here = processes()
    if here.size > 1:
        has_gpu = torch.cuda.is_available()
        if has_gpu:
            torch.cuda.set_device(here.local % torch.cuda.device_count())
        backend = "cpu:gloo,cuda:nccl" if has_gpu else "gloo"
        dist.init_process_group(backend, timeout=_PATIENCE)
    return Ranks(here.rank, here.local, here.size)


def leave(is_well: bool = True) -> None:
    """End what `join` began, if it began anything; all together, if all is well."""
    if dist.is_available() and dist.is_initialized():
        if is_well:
            join().total([0])  # who ended first would close connections that others still use
        dist.destroy_process_group()
