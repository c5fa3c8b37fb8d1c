"""Several processes, one GPU each, that divide the rows of a sweep among themselves.

`torchrun --nproc-per-node N -m reap2gguf ...` starts them. Every process runs its batches through
all layers; after each layer the sums of all processes are added. The first process reports and
writes files. Processes may be on several machines, of which only the first one's has the output.
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
from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from reap2gguf import __version__
from reap2gguf.errors import PeerError, UsageError
from reap2gguf.machine import Processes, processes
from reap2gguf.observing.compute.pulse import Pulse

T = TypeVar("T")
_TIMEOUT = timedelta(days=2)  # the others wait while the first one exports, which `Pulse` watches
MEETING = timedelta(minutes=10)  # for all processes to start


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

    def gather(self, value: T) -> list[T]:
        """The values of all processes, by rank, in all of them."""
        values = [value] * self.size
        if self.size > 1:
            with _lost_peers():
                dist.all_gather_object(values, value)
        return values

    def check_same(self, what: str, value: str, advice: str) -> None:
        """Refuse to work on different inputs; every process raises the same PeerError."""
        values = self.gather((value, platform.node()))
        first, machine = values[0]
        for rank, (found, where) in enumerate(values):
            if found != first:
                raise PeerError(
                    f"{what} of process {rank + 1} of {self.size}, on {where}, is {found:.16}, but "
                    f"that of the first process, on {machine}, is {first:.16}; {advice}"
                )


_pulse: Pulse | None = None  # of this process, from `join` to `leave`


@cache
def join() -> Ranks:
    """This process among others; the first call connects to them, and from then on each watches.

    Raises PeerError if they cannot be reached, or run another version of this program.
    """
    here = processes()
    ranks = Ranks(here.rank, here.local, here.size, here.on_machine)
    if ranks.size == 1:
        return ranks
    n_gpus = torch.cuda.device_count()
    if n_gpus:
        torch.cuda.set_device(min(ranks.local, n_gpus - 1))
    try:
        store, _, _ = next(rendezvous("env://", timeout=MEETING))
        machines = _meet(store, ranks)
        backend = "cpu:gloo,cuda:nccl" if n_gpus else "gloo"
        dist.init_process_group(
            backend, store=store, rank=ranks.rank, world_size=ranks.size, timeout=_TIMEOUT
        )
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise PeerError(
            f"the processes of this run cannot connect to each other ({reason}); on several "
            "machines, GLOO_SOCKET_IFNAME has to name the network interface between them"
        ) from error
    global _pulse
    _pulse = Pulse(PrefixStore("reap2gguf", store.clone()), ranks.rank, machines)
    _pulse.start()
    return ranks


def _meet(store: Store, ranks: Ranks) -> list[str]:
    """Wait until all processes are there; the machine of each."""
    own = f"{__version__} {platform.node()}"
    keys = [f"here/{rank}" for rank in range(ranks.size)]
    store.set(keys[ranks.rank], own)
    try:
        store.wait(keys, MEETING)
    except RuntimeError as error:
        missing = next((n for n, key in enumerate(keys) if not store.check([key])), 0)
        raise PeerError(
            f"process {missing + 1} of {ranks.size} did not connect within "
            f"{MEETING.total_seconds():.0f} seconds; see the output on its machine"
        ) from error
    found = [store.get(key).decode("utf-8", "replace").partition(" ") for key in keys]
    versions = [version for version, _, _ in found]
    for rank, version in enumerate(versions):
        if version != versions[0]:
            raise PeerError(
                f"process {rank + 1} of {ranks.size}, on {found[rank][2]}, runs reap2gguf "
                f"{version}, but the first process, on {found[0][2]}, runs {versions[0]}; install "
                "the same version on all machines"
            )
    return [machine for _, _, machine in found]


def check_same_model(fingerprint: str) -> None:
    """Refuse to divide the rows among different checkpoints; PeerError in all processes."""
    join().check_same(
        "the checkpoint", fingerprint, "copy the same files to all machines, or pin the revision"
    )


def tell(message: str) -> None:
    """Let the other processes show why this one ends, if they are connected."""
    if _pulse is not None:
        _pulse.tell(message)


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
        reason = "another process of this run ended; see its own message"
        raise PeerError(reason if _pulse is None else _pulse.why_lost()) from error


def release() -> None:
    """All processes have done their share: the first one does the rest, without the others.

    They wait until it ends, as torchrun expects, and may be lost meanwhile.
    """
    ranks = join()
    ranks.total([0])
    if ranks.is_first and _pulse is not None:
        _pulse.needs_others = False


def leave() -> None:
    """Disconnect what `join` connected, in all processes at the same time.

    Not for a process that failed: it would wait for the others, which wait for it.
    """
    if not dist.is_available() or not dist.is_initialized():
        return
    is_needed = _pulse is None or _pulse.needs_others
    try:
        join().total([0])  # a process that ends early would close connections that others use
    except PeerError:
        if is_needed:
            raise
    if _pulse is not None:
        _pulse.stop()
    dist.destroy_process_group()
