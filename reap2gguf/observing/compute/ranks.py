"""Several processes, one GPU each, that divide the rows of a sweep among themselves.

`torchrun --nproc-per-node N -m reap2gguf ...` starts them. Every process runs its batches through
all layers; after each layer the sums of all processes are added. The first process reports and
writes files.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import TypeVar

import torch
import torch.distributed as dist

# Loaded before any group exists: otherwise the defaults of its functions keep the group and its
# threads alive when the interpreter ends, which aborts the process.
import torch.distributed.nn.functional
from torch import Tensor

from reap2gguf.errors import PeerError, UsageError
from reap2gguf.machine import Processes, processes

T = TypeVar("T")
_TIMEOUT = timedelta(days=2)  # the others wait while the first process prunes


@dataclass(frozen=True)
class Ranks(Processes):
    """This process among others, and how they exchange numbers."""

    def share(self, everything: Sequence[T]) -> list[T]:
        """This process's share: every `size`-th."""
        return list(everything[self.rank :: self.size])

    def sum_tensors(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by the sum over all processes."""
        self._reduce(tensors, dist.ReduceOp.SUM)

    def begin_sum(self, tensor: Tensor) -> dist.Work | None:
        """Begin to replace a tensor by the sum over all processes; None if there is one alone."""
        return self._begin(tensor, dist.ReduceOp.SUM)

    def begin_max(self, tensor: Tensor) -> dist.Work | None:
        """Begin to replace a tensor by the maximum over all processes."""
        return self._begin(tensor, dist.ReduceOp.MAX)

    def _begin(self, tensor: Tensor, operation: dist.ReduceOp.RedOpType) -> dist.Work | None:
        if self.size == 1:
            return None
        with _lost_peers():
            work: dist.Work = dist.all_reduce(tensor, operation, async_op=True)
        return work

    def finish(self, work: dist.Work) -> None:
        """Wait for what was begun: the host for a CPU's, the current stream for a GPU's."""
        with _lost_peers():
            work.wait()

    def total(self, values: Sequence[int]) -> list[int]:
        """Each number summed over all processes."""
        tensor = torch.tensor(values, dtype=torch.int64)
        self.sum_tensors([tensor])
        return [int(value) for value in tensor]

    def least(self, value: int) -> int:
        """The smallest of all processes' numbers."""
        tensor = torch.tensor([value], dtype=torch.int64)
        self._reduce([tensor], dist.ReduceOp.MIN)
        return int(tensor)

    def _reduce(self, tensors: Iterable[Tensor], operation: dist.ReduceOp.RedOpType) -> None:
        if self.size > 1:
            with _lost_peers():
                for tensor in tensors:
                    dist.all_reduce(tensor, operation)

    def broadcast(self, value: T | None) -> T:
        """The value of the first process, in all of them; the others pass None."""
        values = [value]
        if self.size > 1:
            with _lost_peers():
                dist.broadcast_object_list(values, src=0, device=torch.device("cpu"))
        found = values[0]
        assert found is not None
        return found


@cache
def join() -> Ranks:
    """This process among others; the first call connects to them.

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
        dist.init_process_group("cpu:gloo,cuda:nccl" if n_gpus else "gloo", timeout=_TIMEOUT)
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise PeerError(
            f"the processes of this run cannot connect to each other ({reason})"
        ) from error
    return ranks


def connect_on(ranks: Ranks, device: torch.device) -> None:
    """Connect the GPUs of the processes now: that takes memory, which is not to be given away.

    Raises UsageError if two processes would share a GPU.
    """
    if ranks.size == 1 or device.type != "cuda":
        return
    if ranks.local >= torch.cuda.device_count():
        raise UsageError(
            f"torchrun started more processes on this machine than its {torch.cuda.device_count()} "
            "GPUs; set --nproc-per-node to the number of GPUs, or use --device cpu"
        )
    ranks.sum_tensors([torch.zeros(1, device=device)])
    torch.cuda.synchronize(device)


@dataclass(frozen=True)
class HostPeers:
    """The processes of one machine, which share the reading of weights."""

    number: int  # of this process among them
    count: int
    group: dist.ProcessGroup | None  # None: all processes are on one machine

    def exchange(self, whole: Tensor) -> dist.Work:
        """Begin to exchange parts of `whole`, bytes: each process has the part of its number."""
        part = len(whole) // self.count
        own = whole[self.number * part : (self.number + 1) * part]
        with _lost_peers():
            work: dist.Work = dist.all_gather_into_tensor(whole, own, self.group, async_op=True)
        return work


def host_peers(ranks: Ranks, device: torch.device) -> HostPeers | None:
    """The processes of this machine, if they have GPUs and are several."""
    if ranks.size == 1 or device.type != "cuda":
        return None
    return _host_peers(ranks)


@cache
def _host_peers(ranks: Ranks) -> HostPeers | None:
    machines: list[str] = [""] * ranks.size
    with _lost_peers():
        # two agents of torchrun on one machine are as two machines
        own = f"{platform.node()} {os.environ.get('GROUP_RANK', '')}"
        dist.all_gather_object(machines, own)
        found: HostPeers | None = None
        for machine in sorted(set(machines)):
            members = [rank for rank, name in enumerate(machines) if name == machine]
            alone = len(members) == ranks.size
            # every process takes part in making every group
            group = None if alone else dist.new_group(members, backend="nccl", timeout=_TIMEOUT)
            if machine == own and len(members) > 1:
                found = HostPeers(members.index(ranks.rank), len(members), group)
    return found


@contextmanager
def _lost_peers() -> Iterator[None]:
    """Turn torch's error for a lost connection, which is pages long, into one line."""
    try:
        yield
    except RuntimeError as error:
        raise PeerError("another process of this run ended; see its own message") from error


def leave() -> None:
    """Disconnect what `join` connected, in all processes at the same time.

    Not for a process that failed: it would wait for the others, which wait for it.
    """
    if dist.is_available() and dist.is_initialized():
        join().total([0])  # a process that ends early would close connections that others use
        dist.destroy_process_group()
