"""How a sweep fits into memory: tokens a batch, where hidden states wait, whether to read ahead.

What a batch needs is estimated from the model's dimensions; should the estimate be too low, the
sweep halves a batch that does not fit. What is exact: weights and hidden states.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from reap2gguf.errors import UsageError
from reap2gguf.memory import available_bytes, resident_bytes
from reap2gguf.models.contract import MoeModel
from reap2gguf.observe.sizes import (
    ATTENTION_WIDTHS,
    CONTEXT_BYTES,
    MOST_TOKENS,
    REFERENCE_DELTANET_WIDTHS,
)

_HOST_BYTES = 2 * 2**30  # left to the rest of the program and to the system
_SLACK = 0.92  # allocators round up
_MOVING = 4  # batches of hidden states on their way to and from the host


@dataclass(frozen=True)
class Need:
    """What a sweep needs, in bytes; a position is one token or padding."""

    layer: int  # the largest layer's weights
    position: int  # of a batch, while it is computed
    hidden: int  # a position's hidden state
    n_positions: int
    longest_row: int


@dataclass(frozen=True)
class Budget:
    """What was decided."""

    batch_tokens: int
    spool: str  # device, host or disk
    ahead: bool  # read a layer while another computes


def position_bytes(
    model: MoeModel, dtype: torch.dtype, on_gpu: bool, reference_deltanet: bool
) -> int:
    """Bytes that a position of a batch takes at most in a layer, weights aside.

    `reference_deltanet`: linear attention runs by transformers' own code, all in float32.
    """
    facts = model.facts
    widths = REFERENCE_DELTANET_WIDTHS if reference_deltanet else ATTENTION_WIDTHS
    attention = widths * facts.hidden_size * dtype.itemsize
    if not on_gpu:
        return attention  # one expert at a time: its pairs are few
    pair = 2 * facts.hidden_size + 4 * facts.expert_width
    experts = facts.experts_per_token * pair * dtype.itemsize
    return max(attention, experts) + 8 * facts.hidden_size * dtype.itemsize


def fit(
    need: Need, device: torch.device, limit: int | None, spool: str, n_processes: int = 1
) -> Budget:
    """Divide `limit` bytes of the device, or what is free of it, among weights and batches.

    Processes share the host, and have a GPU each. The first way that leaves room for quick batches
    is taken, else the first that works at all.
    Raises UsageError if not even one row fits.
    """
    most = MOST_TOKENS[device.type]
    host = available_bytes() // n_processes
    room = _gpu_room(device, limit) if device.type == "cuda" else _cpu_room(host, limit)
    for share, must_be_ahead in ((2, True), (4, True), (most, False)):
        least = max(min(most // share, need.n_positions), need.longest_row)
        for kind, ahead in _ways(need, device.type, spool, host):
            tokens = _tokens(need, room, kind, ahead)
            if tokens >= least and ahead >= must_be_ahead:
                # a batch is one row at least
                return Budget(max(_rounded(min(most, tokens)), need.longest_row), kind, ahead)
    base = CONTEXT_BYTES if device.type == "cuda" else resident_bytes()
    least_bytes = (need.layer + need.longest_row * (need.position + _MOVING * need.hidden)) / _SLACK
    raise UsageError(
        f"{room / 2**30:.1f} GiB of memory are left for a sweep, expected at least "
        f"{least_bytes / 2**30:.1f} for a layer of {need.layer / 2**30:.1f} GiB and a row of "
        f"{need.longest_row} tokens; pass a smaller --max-length, or a --memory of "
        f"{(least_bytes + base) / 2**30:.1f}GiB or more"
    )


def _ways(need: Need, device_type: str, spool: str, host: int) -> list[tuple[str, bool]]:
    """Where hidden states may wait and whether to read ahead, best first."""
    if spool != "auto":
        kind = "device" if spool == "host" and device_type == "cpu" else spool
        return [(kind, True), (kind, False)]
    if device_type == "cpu":
        return [("device", True), ("device", False), ("disk", True), ("disk", False)]
    fits_host = need.n_positions * need.hidden <= host - _HOST_BYTES
    kind = "host" if fits_host else "disk"
    return [("device", True), (kind, True), (kind, False)]


def _tokens(need: Need, room: int, spool: str, ahead: bool) -> int:
    """Positions of a batch for which there is room."""
    left = room * _SLACK - need.layer * (2 if ahead else 1)
    position = need.position
    if spool == "device":
        left -= need.n_positions * need.hidden
    else:
        position += _MOVING * need.hidden
    return max(0, int(left // position))


def _rounded(tokens: int) -> int:
    """A power of two: a little more or less free memory does not change batches, nor sums."""
    return 1 << (tokens.bit_length() - 1) if tokens else 0


def _gpu_room(device: torch.device, limit: int | None) -> int:
    free, total = torch.cuda.mem_get_info(device)
    # what torch holds and does not use is as good as free
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return free if limit is None else min(free, min(limit, total) - CONTEXT_BYTES)


def _cpu_room(host: int, limit: int | None) -> int:
    free = host - _HOST_BYTES // 4
    return free if limit is None else min(free, limit - resident_bytes())


def hold_gpu_to(device: torch.device, limit: int | None) -> None:
    """Let torch take no more than `limit` bytes of a GPU, CUDA's own included; None: all."""
    if device.type == "cuda":
        _, total = torch.cuda.mem_get_info(device)
        share = 1.0 if limit is None else (limit - CONTEXT_BYTES) / total
        torch.cuda.set_per_process_memory_fraction(min(1.0, max(share, 0.0)), device)
