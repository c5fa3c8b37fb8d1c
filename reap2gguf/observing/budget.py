"""How a sweep fits into memory: tokens a batch, where hidden states wait, whether to read ahead.

What a batch needs is estimated from the model's dimensions; should the estimate be too low, the
sweep halves a batch that does not fit. Weights are exact; hidden states count without padding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from reap2gguf.errors import UsageError
from reap2gguf.machine import resident_bytes
from reap2gguf.models.contract import MoeModel
from reap2gguf.observing.sizes import (
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
    embedding: int = 0  # the token embedding, and the head
    has_mtp: bool = False  # an MTP block runs last, beside the embedding


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
        return attention  # an expert a thread at a time: its pairs are few
    pair = 2 * facts.hidden_size + 4 * facts.expert_width
    experts = facts.experts_per_token * pair * dtype.itemsize
    return max(attention, experts) + 8 * facts.hidden_size * dtype.itemsize


def fit(need: Need, device_type: str, room: int, host: int, spool: str) -> Budget:
    """Divide `room` bytes of the device among weights and batches; `host` are free on the host.

    The first way that leaves room for quick batches is taken, else the first that works at all.
    Raises UsageError if not even one row fits.
    """
    most = MOST_TOKENS[device_type]
    ways = _ways(need, device_type, spool, host)
    for share, must_be_ahead in ((2, True), (4, True), (most, False)):
        least = max(min(most // share, need.n_positions), need.longest_row)
        for kind, ahead in ways:
            tokens = _tokens(need, room, kind, ahead)
            if tokens >= least and ahead >= must_be_ahead:
                # a batch is one row at least
                return Budget(max(_rounded(min(most, tokens)), need.longest_row), kind, ahead)
    wanted = min(_least_bytes(need, kind, ahead) for kind, ahead in ways)
    raise UsageError(
        f"{room / 2**30:.1f} GiB of memory are left for a sweep, expected at least "
        f"{wanted / 2**30:.1f} for a layer of {need.layer / 2**30:.1f} GiB and a row of "
        f"{need.longest_row} tokens; pass a smaller --max-length, or raise --memory by "
        f"{max(wanted - room, 2**26) / 2**30:.1f}GiB if it is what limits"
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
    left = room * _SLACK - _fixed(need, spool, ahead)
    return max(0, int(left // _position(need, spool)))


def _least_bytes(need: Need, spool: str, ahead: bool) -> float:
    """Room that a batch of one row takes."""
    return (_fixed(need, spool, ahead) + need.longest_row * _position(need, spool)) / _SLACK


def _fixed(need: Need, spool: str, ahead: bool) -> int:
    """What does not depend on the batch: weights, and hidden states on the device."""
    # the embedding is there while the first layer is read, and with an MTP block's layer
    beside = need.layer if ahead or need.has_mtp else 0
    weights = max(need.layer * (2 if ahead else 1), need.embedding + beside)
    return weights + (need.n_positions * need.hidden if spool == "device" else 0)


def _position(need: Need, spool: str) -> int:
    return need.position + (0 if spool == "device" else _MOVING * need.hidden)


def _rounded(tokens: int) -> int:
    """A power of two: a little more or less free memory does not change batches, nor sums.

    The number of threads has no part in it.
    """
    return 1 << (tokens.bit_length() - 1) if tokens else 0


def room_on(device: torch.device, host: int, limit: int | None, n_processes: int = 1) -> int:
    """Bytes of the device that a sweep may take: what is free, or what `limit` leaves.

    Processes have a GPU each, and share `limit` where they share a host.
    """
    if device.type != "cuda":
        free = host - _HOST_BYTES // 4
        return free if limit is None else min(free, limit // n_processes - resident_bytes())
    free, total = torch.cuda.mem_get_info(device)
    # what torch holds and does not use is as good as free
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return free if limit is None else min(free, min(limit, total) - CONTEXT_BYTES)


def hold_gpu_to(device: torch.device, limit: int | None) -> None:
    """Let torch take no more than `limit` bytes of a GPU, CUDA's own included; None: all."""
    if device.type == "cuda":
        _, total = torch.cuda.mem_get_info(device)
        share = 1.0 if limit is None else (limit - CONTEXT_BYTES) / total
        torch.cuda.set_per_process_memory_fraction(min(1.0, max(share, 0.0)), device)
