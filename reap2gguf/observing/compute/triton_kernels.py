"""Triton kernels for what torch's operations are too slow for on a GPU; see `kernels.py`.

Each reads its large input once and writes no intermediate. Sums run over blocks of rows in order,
without atomics, so that equal inputs give equal bits.
"""

# mypy: ignore-errors
# triton.jit compiles the kernels from their source, in a language in which annotations mean
# constants; and Triton is there only where torch was built for a GPU.

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _combine_kernel(
    outputs,
    places,
    gates,
    combined,
    norms,
    width,
    TOP_K: tl.constexpr,
    BLOCK: tl.constexpr,
    NORMS: tl.constexpr,
):
    """One token: its K outputs, weighted and added, and the norm of each."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for choice in tl.static_range(TOP_K):
        place = tl.load(places + token * TOP_K + choice).to(tl.int64)
        if place >= 0:
            gate = tl.load(gates + token * TOP_K + choice).to(tl.float32)
            row = tl.load(outputs + place * width + columns, mask=inside, other=0.0)
            row = row.to(tl.float32)
            total += gate * row
            if NORMS:
                tl.store(norms + place, tl.sqrt(tl.sum(row * row, axis=0)))
    tl.store(combined + token * width + columns, total.to(combined.dtype.element_ty), mask=inside)


@triton.jit
def _square_sums_kernel(values, ends, sums, width, BLOCK_ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """One group of rows, one block of columns: the sum of squares down the rows."""
    group = tl.program_id(1)
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    first = tl.load(ends + group - 1, mask=group > 0, other=0).to(tl.int64)
    last = tl.load(ends + group).to(tl.int64)
    total = tl.zeros((BLOCK_ROWS, BLOCK), dtype=tl.float32)
    for start in range(first, last, BLOCK_ROWS):
        rows = start + tl.arange(0, BLOCK_ROWS)
        mask = (rows < last)[:, None] & inside[None, :]
        block = tl.load(values + rows[:, None] * width + columns[None, :], mask=mask, other=0.0)
        block = block.to(tl.float32)
        total += block * block
    tl.store(sums + group * width + columns, tl.sum(total, axis=0), mask=inside)


@triton.jit
def _saliency_kernel(norms, gates, ends, sums, peaks, BLOCK: tl.constexpr):
    """One expert: sums of gate x norm, gate and norm over its pairs, and the largest norm."""
    expert = tl.program_id(0)
    first = tl.load(ends + expert - 1, mask=expert > 0, other=0)
    last = tl.load(ends + expert)
    weighted = tl.zeros((BLOCK,), dtype=tl.float64)
    gate_sum = tl.zeros((BLOCK,), dtype=tl.float64)
    norm_sum = tl.zeros((BLOCK,), dtype=tl.float64)
    peak = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(first, last, BLOCK):
        pairs = start + tl.arange(0, BLOCK)
        norm = tl.load(norms + pairs, mask=pairs < last, other=0.0)
        gate = tl.load(gates + pairs, mask=pairs < last, other=0.0).to(tl.float64)
        peak = tl.maximum(peak, norm)
        weighted += gate * norm.to(tl.float64)
        gate_sum += gate
        norm_sum += norm.to(tl.float64)
    tl.store(sums + expert * 3, tl.sum(weighted, axis=0))
    tl.store(sums + expert * 3 + 1, tl.sum(gate_sum, axis=0))
    tl.store(sums + expert * 3 + 2, tl.sum(norm_sum, axis=0))
    tl.store(peaks + expert, tl.max(peak, axis=0).to(tl.float64))


@triton.jit
def _rms_norm_kernel(
    values,
    gate,
    weight,
    normed,
    n_rows,
    width,
    stride,
    gate_stride,
    eps,
    offset,
    BLOCK_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    GATED: tl.constexpr,
):
    """A block of rows: each divided by its root mean square, times (offset + weight)."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = tl.arange(0, BLOCK)
    inside = (rows < n_rows)[:, None] & (columns < width)[None, :]
    x = tl.load(values + rows[:, None] * stride + columns[None, :], mask=inside, other=0.0)
    x = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, axis=1) / width + eps)
    w = tl.load(weight + columns, mask=columns < width, other=0.0).to(tl.float32) + offset
    x = x * scale[:, None] * w[None, :]
    if GATED:
        places = gate + rows[:, None] * gate_stride + columns[None, :]
        g = tl.load(places, mask=inside, other=0.0).to(tl.float32)
        x = x * (g * tl.sigmoid(g))
    out = normed + rows[:, None] * width + columns[None, :]
    tl.store(out, x.to(normed.dtype.element_ty), mask=inside)


@triton.jit
def _swiglu_kernel(gate_up, activations, n_values, width, BLOCK: tl.constexpr):
    """Values of silu(gate) * up, where a row holds its gates, then its ups."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < n_values
    place = index + (index // width) * width
    gate = tl.load(gate_up + place, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + place + width, mask=inside, other=0.0).to(tl.float32)
    value = gate * tl.sigmoid(gate) * up
    tl.store(activations + index, value.to(activations.dtype.element_ty), mask=inside)


def combine(outputs: Tensor, places: Tensor, gates: Tensor, norms: Tensor | None) -> Tensor:
    """(N, H) from outputs (S, H), places (N, K) in them and gates (N, K); fills norms (S,)."""
    n_tokens, top_k = places.shape
    width = outputs.shape[-1]
    combined = torch.empty(n_tokens, width, dtype=outputs.dtype, device=outputs.device)
    block = triton.next_power_of_2(width)
    _combine_kernel[(n_tokens,)](
        outputs,
        places,
        gates,
        combined,
        outputs if norms is None else norms,
        width,
        TOP_K=top_k,
        BLOCK=block,
        NORMS=norms is not None,
        num_warps=4 if block <= 2048 else 8,
    )
    return combined


def square_sums(values: Tensor, ends: Tensor) -> Tensor:
    """(G, C) float32 from values (S, C) whose groups of rows end at `ends` (G,)."""
    width = values.shape[-1]
    sums = torch.empty(len(ends), width, dtype=torch.float32, device=values.device)
    block = min(128, triton.next_power_of_2(width))
    _square_sums_kernel[(triton.cdiv(width, block), len(ends))](
        values, ends, sums, width, BLOCK_ROWS=32, BLOCK=block, num_warps=4
    )
    return sums


def saliency_sums(norms: Tensor, gates: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    """Sums (E, 3) of gate x norm, gate and norm, and peaks (E,) of norm, all float64."""
    n_experts = len(ends)
    sums = torch.empty(n_experts, 3, dtype=torch.float64, device=norms.device)
    peaks = torch.empty(n_experts, dtype=torch.float64, device=norms.device)
    _saliency_kernel[(n_experts,)](norms, gates, ends, sums, peaks, BLOCK=512, num_warps=4)
    return sums, peaks


def rms_norm(
    values: Tensor, weight: Tensor, eps: float, offset: float, gate: Tensor | None = None
) -> Tensor:
    """RMSNorm over the last axis, times (offset + weight), and times silu(gate) if there is one."""
    rows = values.flatten(0, -2)
    gates = rows if gate is None else gate.flatten(0, -2)
    if rows.stride(-1) != 1 or gates.stride(-1) != 1:
        rows, gates = rows.contiguous(), gates.contiguous()
    n_rows, width = rows.shape
    normed = torch.empty(values.shape, dtype=values.dtype, device=values.device)
    block = triton.next_power_of_2(width)
    block_rows = max(1, 4096 // block)
    _rms_norm_kernel[(triton.cdiv(n_rows, block_rows),)](
        rows,
        gates,
        weight,
        normed,
        n_rows,
        width,
        rows.stride(0),
        gates.stride(0),
        eps,
        offset,
        BLOCK_ROWS=block_rows,
        BLOCK=block,
        GATED=gate is not None,
        num_warps=4,
    )
    return normed


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up, (S, F), from (S, 2F)."""
    n_rows, doubled = gate_up.shape
    width = doubled // 2
    activations = torch.empty(n_rows, width, dtype=gate_up.dtype, device=gate_up.device)
    n_values = n_rows * width
    _swiglu_kernel[(triton.cdiv(n_values, 4096),)](
        gate_up, activations, n_values, width, BLOCK=4096, num_warps=8
    )
    return activations
