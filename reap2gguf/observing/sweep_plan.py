"""Decides how a sweep runs on this machine: device, dtype, memory, batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from reap2gguf.errors import ObservationError, UsageError
from reap2gguf.machine import available_bytes, resident_bytes
from reap2gguf.observing.batches import AnyRow, Batch, dealt, group, padded_batches
from reap2gguf.observing.budget import (
    CONTEXT_BYTES,
    Budget,
    Kind,
    Memory,
    Need,
    copies_experts,
    cpu_memory,
    fit,
    fits_beside,
    gpu_memory,
    size_text,
)
from reap2gguf.observing.compute.ranks import connect_on
from reap2gguf.observing.linear_attention import linear_attention_note

if TYPE_CHECKING:
    from reap2gguf.artifacts.texts import Row
    from reap2gguf.observing.compute.ranks import Ranks
    from reap2gguf.observing.decoder import StreamedDecoder
    from reap2gguf.observing.observer import LayerObserver
    from reap2gguf.options import ComputeOptions
    from reap2gguf.progress import Progress

HasRoom = Callable[[int], bool]  # whether other work may take some bytes of RAM
_MENTIONED = 2**30  # bytes of activations, at least
_LONG_WAIT = 0.05  # share of the time, at least
_LONG_SECONDS = 1.0


def resolve_device(options: ComputeOptions) -> tuple[torch.device, torch.dtype]:
    """The device and dtype: a GPU in bfloat16 if there is one, else the CPU in float32.

    Raises UsageError if the options ask for a GPU and there is none.
    """
    has_gpu = torch.cuda.is_available()
    if options.device == "cuda" and not has_gpu:
        raise UsageError(
            "--device cuda: torch sees no CUDA device; run `reap2gguf doctor` for the reason"
        )
    if has_gpu and options.device != "cpu":
        device = torch.device("cuda", torch.cuda.current_device())
    else:
        device = torch.device("cpu")
    if options.dtype == "auto":
        return device, torch.bfloat16 if device.type == "cuda" else torch.float32
    return device, {"float32": torch.float32, "bfloat16": torch.bfloat16}[options.dtype]


def limit_gpu_memory(device: torch.device, limit: int | None) -> None:
    """Let torch take at most `limit` bytes of a GPU, CUDA's own included; None: all of it."""
    if device.type == "cuda":
        _, total = torch.cuda.mem_get_info(device)
        share = 1.0 if limit is None else (limit - CONTEXT_BYTES) / total
        torch.cuda.set_per_process_memory_fraction(min(1.0, max(share, 0.0)), device)


def where_to_compute(
    ranks: Ranks, options: ComputeOptions
) -> tuple[torch.device, torch.dtype, int]:
    """The device, the dtype and the number of threads of a sweep, and both made ready.

    Raises PeerError if they are not the same in all processes.
    """
    device, dtype = resolve_device(options)
    where = f"{device.type} in {str(dtype).removeprefix('torch.')}"
    ranks.check_same("the device", where, "pass --device and --dtype on all machines")
    n_threads = max(1, options.threads // ranks.on_machine)
    if device.type == "cuda":
        torch.set_num_threads(n_threads)  # on a CPU the decoder's crew sets them
    connect_on(ranks, device)
    limit_gpu_memory(device, options.memory)
    return device, dtype, n_threads


@contextmanager
def gpu_errors() -> Iterator[None]:
    """Turn torch's error for a full GPU into one that says what to do."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ObservationError(
            "not enough GPU memory for the layers and activations of this pass; use "
            "--spool host, a smaller --max-length, or --device cpu"
        ) from error


@dataclass(frozen=True)
class SweepContext:
    """What a sweep uses from start to end."""

    decoder: StreamedDecoder
    observer: LayerObserver
    ranks: Ranks
    progress: Progress

    @property
    def n_layers(self) -> int:
        """Layers that the observer wants to see, and those before them."""
        return self.observer.last_layer() + 1


@dataclass(frozen=True)
class SweepPlan:
    """How a sweep runs, in this process."""

    budget: Budget
    batches: list[Batch]  # not placed in a spool yet
    n_rows: int  # of the batches; of a resumed sweep, before any were dropped
    has_room: HasRoom  # beside the sweep
    first_layer: int = 0  # where a resumed sweep starts

    def way(self, layers: range, device: torch.device) -> int:
        """1 if some layers begin with the first batch, -1 if with the last.

        Where a GPU's hidden states wait on a disk, every pass begins with the batches that the one
        before wrote last: the system has them in memory still, and need not send those to the disk
        that it has not sent yet.
        """
        turns = self.budget.spool == "disk" and device.type == "cuda"
        return -1 if turns and layers[0] // self.budget.depth % 2 == 0 else 1


def plan_sweep(
    context: SweepContext, rows: Sequence[Row], probe: Sequence[Row], options: ComputeOptions
) -> SweepPlan:
    """Divide memory and rows. All processes decide the same.

    On CPUs their batches are those of one process; GPUs share out the last ones row by row.

    Raises UsageError if the memory is too little.
    """
    ranks, device = context.ranks, context.decoder.device
    need = need_of(context, [*rows, *probe])
    memory = available_memory(device, ranks, options.memory)
    budget = fit(need, device.type, memory, options.spool)
    batches: list[Batch] = []
    for chosen, observed in ((rows, True), (probe, False)):
        groups = groups_of(chosen, budget.batch_tokens, ranks, device)
        batches += padded_batches(groups, observed)
    n_rows = sum(len(batch.lengths) for batch in batches)

    def has_room(n_bytes: int) -> bool:
        return fits_beside(n_bytes, budget, need, device.type, memory, options.spool)

    return SweepPlan(budget, batches, n_rows, has_room)


def groups_of(
    rows: Sequence[AnyRow], batch_tokens: int, ranks: Ranks, device: torch.device
) -> list[list[AnyRow]]:
    """The rows of this process's batches."""
    if device.type == "cuda":
        return dealt(rows, batch_tokens, ranks.size)[ranks.rank]
    return ranks.share(group(rows, batch_tokens))


def need_of(context: SweepContext, rows: Sequence[Row]) -> Need:
    """What a sweep over some rows needs in this process, of several a share of them."""
    decoder, n_layers = context.decoder, context.n_layers
    on_gpu = decoder.device.type == "cuda"
    model, itemsize = decoder.model, decoder.dtype.itemsize
    kind = Kind(
        model,
        itemsize,
        on_gpu,
        decoder.has_linear_attention,
        decoder.n_threads,
        context.observer.held_bytes(),
        copies_experts(model, decoder.tensors, itemsize, on_gpu),
    )
    return kind.need(
        {index: decoder.layer_bytes(index) for index in range(n_layers)},
        decoder.embedding_bytes(),
        -(-sum(map(len, rows)) // context.ranks.size),
        max(map(len, rows), default=1),
    )


def available_memory(device: torch.device, ranks: Ranks, limit: int | None) -> Memory:
    """What is free, and what `limit` leaves, on the process that has the least."""
    host = ranks.least(available_bytes() // ranks.on_machine)
    if device.type == "cuda":  # each process has a GPU of its own
        free, total = torch.cuda.mem_get_info(device)
        # what torch has reserved and does not use is free too
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        found = gpu_memory(ranks.least(free), total, host, limit)
    else:
        found = cpu_memory(host, limit, resident_bytes(), ranks.on_machine)
    if found.allowed is None:
        return found
    return replace(found, allowed=ranks.least(found.allowed))


def opening_notes(context: SweepContext, budget: Budget, spool_bytes: int) -> Iterator[str]:
    """What the user should know before the layers are computed."""
    decoder, n_processes = context.decoder, context.ranks.size
    on_gpu = decoder.device.type == "cuda"
    name = torch.cuda.get_device_name(decoder.device) if on_gpu else "the CPU"
    several = f"{n_processes} x " if n_processes > 1 else ""
    dtype = str(decoder.dtype).removeprefix("torch.")
    line = (
        f"computing on {several}{name} in {dtype}, batches of up to {budget.batch_tokens:,} tokens"
    )
    if spool_bytes >= _MENTIONED:
        on_device = "in GPU memory" if on_gpu else "in RAM"
        where = {"device": on_device, "host": "in RAM", "disk": "on disk"}[budget.spool]
        line += f"; keeping {size_text(spool_bytes)} of activations {where}"
    if not budget.prefetch:
        line += "; not enough memory to prefetch weights"
    yield line
    if decoder.has_linear_attention and on_gpu:
        yield linear_attention_note()


def waiting_note(title: str, waited: float, seconds: float) -> str | None:
    """A line for the user if a sweep of `seconds` waited long for weights."""
    if waited < _LONG_SECONDS or waited < _LONG_WAIT * seconds:
        return None
    return f"{title}: {waited:.1f} of {seconds:.1f} s spent waiting for weights"
