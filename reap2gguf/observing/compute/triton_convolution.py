"""Triton's kernel of the short causal convolution before a linear attention; see `kernels.py`."""

# mypy: ignore-errors
# for the reasons given in triton_kernels.py

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _causal_kernel(
    values,
    weight,
    bias,
    convolved,
    length,
    width,
    row_stride,
    token_stride,
    TAPS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
    BIASED: tl.constexpr,
    SILU: tl.constexpr,
):
    """A block of tokens and channels of one row: each channel by its own taps."""
    n_blocks = tl.cdiv(length, BLOCK_TOKENS)
    row = (tl.program_id(0) // n_blocks).to(tl.int64)
    tokens = (tl.program_id(0) % n_blocks) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    exists = (columns < width)[None, :]
    total = tl.zeros((BLOCK_TOKENS, BLOCK), dtype=tl.float32)
    for tap in tl.static_range(TAPS):
        seen = tokens - (TAPS - 1 - tap)
        places = row * row_stride + seen.to(tl.int64)[:, None] * token_stride + columns[None, :]
        mask = ((seen >= 0) & (seen < length))[:, None] & exists
        x = tl.load(values + places, mask=mask, other=0.0).to(tl.float32)
        w = tl.load(weight + columns * TAPS + tap, mask=columns < width, other=0.0)
        total += x * w.to(tl.float32)[None, :]
    if BIASED:
        added = tl.load(bias + columns, mask=columns < width, other=0.0).to(tl.float32)
        total += added[None, :]
    if SILU:
        total = total * tl.sigmoid(total)
    out = (row * length + tokens)[:, None] * width + columns[None, :]
    mask = (tokens < length)[:, None] & exists
    tl.store(convolved + out, total.to(convolved.dtype.element_ty), mask=mask)


def causal_convolution(values: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    """Each channel of values (B, T, C) by its taps (C, taps), the last for the token itself."""
    if values.stride(-1) != 1:
        values = values.contiguous()
    n_rows, length, width = values.shape
    convolved = torch.empty(values.shape, dtype=values.dtype, device=values.device)
    block, block_tokens = min(256, triton.next_power_of_2(width)), 16
    grid = (n_rows * triton.cdiv(length, block_tokens), triton.cdiv(width, block))
    _causal_kernel[grid](
        values,
        weight.contiguous(),
        weight if bias is None else bias,
        convolved,
        length,
        width,
        values.stride(0),
        values.stride(1),
        TAPS=weight.shape[-1],
        BLOCK_TOKENS=block_tokens,
        BLOCK=block,
        BIASED=bias is not None,
        SILU=silu,
        num_warps=4,
    )
    return convolved
