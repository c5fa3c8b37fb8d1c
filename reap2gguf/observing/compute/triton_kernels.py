"""Triton kernels of a decoder layer, its experts aside; see `kernels.py`.

Each reads its large input once and writes no intermediate. Sums run over blocks in order, without
atomics, so that equal inputs give equal bits.
"""

# mypy: ignore-errors
# triton.jit compiles the kernels from their source, in a language in which annotations mean
# constants; and Triton is there only where torch was built for a GPU.

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _rms_norm_kernel(
    values,
    added,
    gate,
    weight,
    total,
    normed,
    n_rows,
    width,
    stride,
    gate_stride,
    eps,
    offset,
    BLOCK_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    ADDED: tl.constexpr,
    GATED: tl.constexpr,
):
    """A block of rows: each divided by its root mean square, times (offset + weight)."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = tl.arange(0, BLOCK)
    inside = (rows < n_rows)[:, None] & (columns < width)[None, :]
    places = rows[:, None] * width + columns[None, :]
    x = tl.load(values + rows[:, None] * stride + columns[None, :], mask=inside, other=0.0)
    x = x.to(tl.float32)
    if ADDED:
        x += tl.load(added + places, mask=inside, other=0.0).to(tl.float32)
        rounded = x.to(total.dtype.element_ty)
        tl.store(total + places, rounded, mask=inside)
        x = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, axis=1) / width + eps)
    w = tl.load(weight + columns, mask=columns < width, other=0.0).to(tl.float32) + offset
    x = x * scale[:, None] * w[None, :]
    if GATED:
        places_of_gate = gate + rows[:, None] * gate_stride + columns[None, :]
        g = tl.load(places_of_gate, mask=inside, other=0.0).to(tl.float32)
        x = x * (g * tl.sigmoid(g))
    tl.store(normed + places, x.to(normed.dtype.element_ty), mask=inside)


@triton.jit
def _norm_rotary_kernel(
    values,
    weight,
    cos,
    sin,
    turned,
    n_rows,
    n_heads,
    length,
    half,
    width,
    token_stride,
    head_stride,
    row_stride,
    position_stride,
    eps,
    offset,
    BLOCK_ROWS: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
):
    """A block of heads: RMSNorm of each, and the rotation of its first 2 x half values."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    inside = rows < n_rows
    token = rows // n_heads
    head = values + (token * token_stride + (rows % n_heads) * head_stride)[:, None]
    out = turned + (rows * width)[:, None]
    column = tl.arange(0, HALF)
    in_half = column < half
    mask = inside[:, None] & in_half[None, :]
    x = tl.load(head + column[None, :], mask=mask, other=0.0).to(tl.float32)
    y = tl.load(head + half + column[None, :], mask=mask, other=0.0).to(tl.float32)
    squares = tl.sum(x * x, axis=1) + tl.sum(y * y, axis=1)
    if REST > 0:
        later = 2 * half + tl.arange(0, REST)
        rest_mask = inside[:, None] & (later < width)[None, :]
        rest = tl.load(head + later[None, :], mask=rest_mask, other=0.0).to(tl.float32)
        squares += tl.sum(rest * rest, axis=1)
    scale = tl.rsqrt(squares / width + eps)
    if REST > 0:
        w = tl.load(weight + later, mask=later < width, other=0.0).to(tl.float32) + offset
        rest = rest * scale[:, None] * w[None, :]
        tl.store(out + later[None, :], rest.to(turned.dtype.element_ty), mask=rest_mask)
    x *= scale[:, None]
    y *= scale[:, None]
    x *= (tl.load(weight + column, mask=in_half, other=0.0).to(tl.float32) + offset)[None, :]
    y *= (tl.load(weight + half + column, mask=in_half, other=0.0).to(tl.float32) + offset)[None, :]
    angle = (token // length) * row_stride + (token % length) * position_stride
    angle = angle[:, None] + column[None, :]
    cos_x = tl.load(cos + angle, mask=mask, other=0.0).to(tl.float32)
    sin_x = tl.load(sin + angle, mask=mask, other=0.0).to(tl.float32)
    cos_y = tl.load(cos + angle + half, mask=mask, other=0.0).to(tl.float32)
    sin_y = tl.load(sin + angle + half, mask=mask, other=0.0).to(tl.float32)
    first = x * cos_x - y * sin_x
    second = y * cos_y + x * sin_y
    tl.store(out + column[None, :], first.to(turned.dtype.element_ty), mask=mask)
    tl.store(out + half + column[None, :], second.to(turned.dtype.element_ty), mask=mask)


@triton.jit
def _route_kernel(
    logits,
    weights,
    ids,
    n_rows,
    n_experts,
    TOP_K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    RENORMALIZED: tl.constexpr,
):
    """A block of tokens: softmax over the experts, and the K largest of each token."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = tl.arange(0, BLOCK)
    exists = (columns < n_experts)[None, :]
    mask = (rows < n_rows)[:, None] & exists
    places = rows[:, None] * n_experts + columns[None, :]
    x = tl.load(logits + places, mask=mask, other=float("-inf")).to(tl.float32)
    x = tl.where((rows < n_rows)[:, None], x, 0.0)
    largest = tl.max(x, axis=1)
    total = tl.sum(tl.where(exists, tl.exp(x - largest[:, None]), 0.0), axis=1)
    # integers in the order of the floats, so that K different experts are found whatever x holds
    bits = x.to(tl.int32, bitcast=True)
    least = -2147483648
    key = tl.where(exists, tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits), least)
    choice = tl.arange(0, BLOCK_K)
    chosen = tl.zeros((BLOCK_ROWS, BLOCK_K), dtype=tl.float32)
    numbers = tl.zeros((BLOCK_ROWS, BLOCK_K), dtype=tl.int32)
    for k in tl.static_range(TOP_K):
        best = tl.max(key, axis=1)
        expert = tl.min(tl.where(key == best[:, None], columns[None, :], BLOCK), axis=1)
        is_it = columns[None, :] == expert[:, None]
        value = tl.sum(tl.where(is_it, x, 0.0), axis=1)
        weight = tl.exp(value - largest) / total
        chosen = tl.where(choice[None, :] == k, weight[:, None], chosen)
        numbers = tl.where(choice[None, :] == k, expert[:, None], numbers)
        key = tl.where(is_it, least, key)
    if RENORMALIZED:
        chosen = chosen / tl.sum(chosen, axis=1)[:, None]
    kept = (rows < n_rows)[:, None] & (choice < TOP_K)[None, :]
    out = rows[:, None] * TOP_K + choice[None, :]
    tl.store(weights + out, chosen.to(weights.dtype.element_ty), mask=kept)
    tl.store(ids + out, numbers.to(tl.int64), mask=kept)


@triton.jit
def _gate_kernel(
    values,
    gates,
    gated,
    n_values,
    width,
    row_stride,
    part,
    part_stride,
    BLOCK: tl.constexpr,
):
    """Values times the sigmoid of their gates, which lie in parts of a wider row."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < n_values
    column = index % width
    place = (index // width) * row_stride + (column // part) * part_stride + column % part
    gate = tl.load(gates + place, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(values + index, mask=inside, other=0.0).to(tl.float32)
    value = value * tl.sigmoid(gate)
    tl.store(gated + index, value.to(gated.dtype.element_ty), mask=inside)


@triton.jit
def _finite_kernel(values, flags, n_rows, width, BLOCK_ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Whether every value of a row is finite."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = tl.arange(0, BLOCK)
    inside = (rows < n_rows)[:, None] & (columns < width)[None, :]
    places = values + rows[:, None] * width + columns[None, :]
    x = tl.load(places, mask=inside, other=0.0).to(tl.float32)
    bad = tl.max(((x - x) != 0.0).to(tl.int32), axis=1)  # infinity minus itself is NaN
    tl.store(flags + rows, (bad == 0).to(tl.int8), mask=rows < n_rows)


@triton.jit
def _copy_if_kernel(wanted, values, target, n_values, BLOCK: tl.constexpr):
    """Copy, if a flag on the device is true."""
    if tl.load(wanted) != 0:
        index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = index < n_values
        tl.store(target + index, tl.load(values + index, mask=inside), mask=inside)


@triton.jit
def _all_squares_kernel(
    values,
    sums,
    n_rows,
    width,
    chunk,
    BLOCK_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One chunk of rows, one block of columns: the sum of squares down the rows."""
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    part = tl.program_id(1)
    first = part.to(tl.int64) * chunk
    last = tl.minimum(first + chunk, n_rows)
    total = tl.zeros((BLOCK_ROWS, BLOCK), dtype=tl.float32)
    for start in range(first, last, BLOCK_ROWS):
        rows = start + tl.arange(0, BLOCK_ROWS)
        mask = (rows < last)[:, None] & (columns < width)[None, :]
        block = tl.load(values + rows[:, None] * width + columns[None, :], mask=mask, other=0.0)
        block = block.to(tl.float32)
        total += block * block
    tl.store(sums + part * width + columns, tl.sum(total, axis=0), mask=columns < width)


def _rows_of(values: Tensor) -> Tensor:
    """(N, C), whose values of a row follow one another."""
    rows = values.flatten(0, -2)
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _norm(
    values: Tensor,
    added: Tensor | None,
    weight: Tensor,
    eps: float,
    offset: float,
    gate: Tensor | None,
) -> tuple[Tensor, Tensor]:
    rows = _rows_of(values)
    gates = rows if gate is None else _rows_of(gate)
    n_rows, width = rows.shape
    normed = torch.empty(values.shape, dtype=values.dtype, device=values.device)
    total = normed if added is None else torch.empty_like(normed)
    block = triton.next_power_of_2(width)
    block_rows = max(1, 4096 // block)
    _rms_norm_kernel[(triton.cdiv(n_rows, block_rows),)](
        rows,
        rows if added is None else added.contiguous(),
        gates,
        weight,
        total,
        normed,
        n_rows,
        width,
        rows.stride(0),
        gates.stride(0),
        eps,
        offset,
        BLOCK_ROWS=block_rows,
        BLOCK=block,
        ADDED=added is not None,
        GATED=gate is not None,
        num_warps=4,
    )
    return total, normed


def rms_norm(
    values: Tensor, weight: Tensor, eps: float, offset: float, gate: Tensor | None = None
) -> Tensor:
    """RMSNorm over the last axis, times (offset + weight), and times silu(gate) if there is one."""
    return _norm(values, None, weight, eps, offset, gate)[1]


def add_rms_norm(
    values: Tensor, added: Tensor, weight: Tensor, eps: float, offset: float
) -> tuple[Tensor, Tensor]:
    """values + added, and the RMSNorm of it."""
    return _norm(values, added, weight, eps, offset, None)


def norm_rotary(
    values: Tensor, weight: Tensor, eps: float, offset: float, cos: Tensor, sin: Tensor
) -> Tensor:
    """RMSNorm of each head of (B, T, heads, D), rotated by cos and sin (1 or B, T, R <= D)."""
    n_rows, length, n_heads, width = values.shape
    heads = values.flatten(0, 1)
    if heads.stride(-1) != 1:
        heads = heads.contiguous()
    half = cos.shape[-1] // 2
    cos, sin = cos.contiguous(), sin.contiguous()
    turned = torch.empty(values.shape, dtype=values.dtype, device=values.device)
    rest = width - 2 * half
    block = max(1, 4096 // triton.next_power_of_2(width))
    total = n_rows * length * n_heads
    _norm_rotary_kernel[(triton.cdiv(total, block),)](
        heads,
        weight,
        cos,
        sin,
        turned,
        total,
        n_heads,
        length,
        half,
        width,
        heads.stride(0),
        heads.stride(1),
        cos.stride(0) if cos.shape[0] > 1 else 0,
        cos.stride(1),
        eps,
        offset,
        BLOCK_ROWS=block,
        HALF=triton.next_power_of_2(half),
        REST=triton.next_power_of_2(rest) if rest else 0,
        num_warps=4,
    )
    return turned


def route(logits: Tensor, top_k: int, renormalized: bool) -> tuple[Tensor, Tensor]:
    """The K largest of softmax(logits) of (N, E), in descending order, and their experts."""
    n_rows, n_experts = logits.shape
    weights = torch.empty(n_rows, top_k, dtype=logits.dtype, device=logits.device)
    ids = torch.empty(n_rows, top_k, dtype=torch.int64, device=logits.device)
    block = triton.next_power_of_2(n_experts)
    block_rows = max(1, 2048 // block)
    _route_kernel[(triton.cdiv(n_rows, block_rows),)](
        logits.contiguous(),
        weights,
        ids,
        n_rows,
        n_experts,
        TOP_K=top_k,
        BLOCK_K=triton.next_power_of_2(top_k),
        BLOCK_ROWS=block_rows,
        BLOCK=block,
        RENORMALIZED=renormalized,
        num_warps=4,
    )
    return weights, ids


def sigmoid_gated(values: Tensor, gates: Tensor) -> Tensor:
    """(B, T, heads, D) times the sigmoid of gates of that shape, which may lie apart."""
    values = values.contiguous()
    n_heads, part = values.shape[-2:]
    gates = gates.flatten(0, -3)
    gated = torch.empty_like(values)
    _gate_kernel[(triton.cdiv(values.numel(), 4096),)](
        values,
        gates,
        gated,
        values.numel(),
        n_heads * part,
        gates.stride(0),
        part,
        gates.stride(1),
        BLOCK=4096,
        num_warps=8,
    )
    return gated


def finite_rows(values: Tensor) -> Tensor:
    """Which rows (..., C) have finite values only: bool (...)."""
    rows = values.contiguous().flatten(0, -2)
    n_rows, width = rows.shape
    flags = torch.empty(n_rows, dtype=torch.bool, device=values.device)
    block = triton.next_power_of_2(width)
    block_rows = max(1, 8192 // block)
    _finite_kernel[(triton.cdiv(n_rows, block_rows),)](
        rows, flags.view(torch.int8), n_rows, width, BLOCK_ROWS=block_rows, BLOCK=block, num_warps=4
    )
    return flags.view(values.shape[:-1])


def copy_if(wanted: Tensor, values: Tensor, target: Tensor) -> None:
    """Copy `values` into `target` if the flag `wanted` is true; both are contiguous."""
    n_values = target.numel()
    _copy_if_kernel[(triton.cdiv(n_values, 8192),)](
        wanted.view(torch.int8), values.contiguous(), target, n_values, BLOCK=8192, num_warps=8
    )


def all_square_sums(values: Tensor, n_parts: int) -> Tensor:
    """Sums of squares (n_parts, C), float32, of as many chunks of the rows of values (S, C)."""
    values = values.contiguous()
    n_rows, width = values.shape
    sums = torch.empty(n_parts, width, dtype=torch.float32, device=values.device)
    block = min(256, triton.next_power_of_2(width))
    _all_squares_kernel[(triton.cdiv(width, block), n_parts)](
        values, sums, n_rows, width, -(-n_rows // n_parts), BLOCK_ROWS=16, BLOCK=block, num_warps=4
    )
    return sums
