"""The Triton kernel of saliency: sums over the routed pairs of each expert; see `kernels.py`.

A program takes one expert, whose pairs lie side by side. Letters as in `experts.py`.
"""

# mypy: ignore-errors
# as in `triton_kernels.py`

import torch
import triton
import triton.language as tl
from torch import Tensor

_SUMS, _PEAKS = 8, 2


# the number of pairs of a batch is no reason to compile again
@triton.jit(do_not_specialize=["n_pairs"])
def _saliency_kernel(norms, gates, ends, sums, peaks, n_pairs, BLOCK: tl.constexpr):
    """One expert: sums of powers of gates and norms over its pairs, and the largest norms."""
    expert = tl.program_id(0)
    first = tl.load(ends + expert - 1, mask=expert > 0, other=0)
    last = tl.load(ends + expert)
    weighted = tl.zeros((BLOCK,), dtype=tl.float64)
    gate_sum = tl.zeros((BLOCK,), dtype=tl.float64)
    norm_sum = tl.zeros((BLOCK,), dtype=tl.float64)
    gate_squares = tl.zeros((BLOCK,), dtype=tl.float64)
    norm_squares = tl.zeros((BLOCK,), dtype=tl.float64)
    gate_squared = tl.zeros((BLOCK,), dtype=tl.float64)
    norm_squared = tl.zeros((BLOCK,), dtype=tl.float64)
    both_squared = tl.zeros((BLOCK,), dtype=tl.float64)
    peak = tl.zeros((BLOCK,), dtype=tl.float32)
    largest = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(first, last, BLOCK):
        pairs = start + tl.arange(0, BLOCK)
        rounded = tl.load(norms + pairs, mask=pairs < last, other=0.0)
        magnitude = tl.load(norms + n_pairs + pairs, mask=pairs < last, other=0.0)
        gate = tl.load(gates + pairs, mask=pairs < last, other=0.0).to(tl.float64)
        norm = rounded.to(tl.float64)
        product = gate * norm
        peak = tl.maximum(peak, rounded)
        largest = tl.maximum(largest, magnitude)
        weighted += product
        gate_sum += gate
        norm_sum += norm
        gate_squares += gate * gate
        norm_squares += norm * norm
        gate_squared += gate * product
        norm_squared += product * norm
        both_squared += product * product
    out = sums + expert * 8
    tl.store(out, tl.sum(weighted, axis=0))
    tl.store(out + 1, tl.sum(gate_sum, axis=0))
    tl.store(out + 2, tl.sum(norm_sum, axis=0))
    tl.store(out + 3, tl.sum(gate_squares, axis=0))
    tl.store(out + 4, tl.sum(norm_squares, axis=0))
    tl.store(out + 5, tl.sum(gate_squared, axis=0))
    tl.store(out + 6, tl.sum(norm_squared, axis=0))
    tl.store(out + 7, tl.sum(both_squared, axis=0))
    tl.store(peaks + expert * 2, tl.max(peak, axis=0).to(tl.float64))
    tl.store(peaks + expert * 2 + 1, tl.max(largest, axis=0).to(tl.float64))


def saliency_sums(norms: Tensor, gates: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    """Sums (E, 8) of powers of gates and norms, and peaks (E, 2) of norms (2, S), all float64."""
    n_experts, n_pairs = len(ends), norms.shape[1]
    sums = torch.empty(n_experts, _SUMS, dtype=torch.float64, device=norms.device)
    peaks = torch.empty(n_experts, _PEAKS, dtype=torch.float64, device=norms.device)
    shape = {"BLOCK": 512, "num_warps": 4}
    _saliency_kernel[(n_experts,)](norms, gates, ends, sums, peaks, n_pairs, **shape)
    return sums, peaks
