"""Triton kernels of a layer's experts; see `kernels.py`. Letters as in `experts.py`.

Routed pairs are sorted by expert. A program takes a chunk of at most `_CHUNK` pairs of one expert,
so that sums per expert come with what is computed anyway: a sum in float32 per chunk, and then the
chunks in order in float64. Nothing is added by atomics, so equal inputs give equal bits.
"""

# mypy: ignore-errors
# as in `triton_kernels.py`

import torch
import triton
import triton.language as tl
from torch import Tensor

_CHUNK = 128  # pairs
# of a matrix product's block, of those that were tried the best on an H100
_COLUMNS, _DEPTH = 128, 64


@triton.jit
def _chunk_of(ends, n_experts, number, CHUNK: tl.constexpr, EXPERTS: tl.constexpr):
    """A chunk's first pair, where its expert's pairs end, and the expert; 0, 0, 0 past the last."""
    experts = tl.arange(0, EXPERTS)
    exists = experts < n_experts
    last = tl.load(ends + experts, mask=exists, other=0)
    first = tl.load(ends + experts - 1, mask=exists & (experts > 0), other=0)
    counts = tl.where(exists, (last - first + CHUNK - 1) // CHUNK, 0)
    upto = tl.cumsum(counts, axis=0)
    is_it = (number < upto) & (number >= upto - counts)
    begin = tl.sum(tl.where(is_it, first + (number - upto + counts) * CHUNK, 0), axis=0)
    end = tl.sum(tl.where(is_it, last, 0), axis=0)
    return begin, end, tl.sum(tl.where(is_it, experts, 0), axis=0)


@triton.jit
def _gather_kernel(
    hidden,
    weights,
    order,
    ends,
    inputs,
    places,
    gates,
    squares,
    n_experts,
    width,
    TOP_K: tl.constexpr,
    CHUNK: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    SQUARES: tl.constexpr,
):
    """A chunk of pairs, a block of columns: the tokens' hidden states, in the pairs' order."""
    number = tl.program_id(1)
    first, end, _ = _chunk_of(ends, n_experts, number, CHUNK, EXPERTS)
    if first < end:
        last = tl.minimum(first + CHUNK, end)
        columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        total = tl.zeros((BLOCK_ROWS, BLOCK), dtype=tl.float32)
        for step in range(0, CHUNK, BLOCK_ROWS):
            rows = first + step + tl.arange(0, BLOCK_ROWS)
            inside = rows < last
            pair = tl.load(order + rows, mask=inside, other=0).to(tl.int64)
            mask = inside[:, None] & (columns < width)[None, :]
            token = (pair // TOP_K)[:, None] * width
            x = tl.load(hidden + token + columns[None, :], mask=mask, other=0.0)
            out = rows.to(tl.int64)[:, None] * width + columns[None, :]
            tl.store(inputs + out, x, mask=mask)
            if SQUARES:
                exact = x.to(tl.float32)
                total += exact * exact
            if tl.program_id(0) == 0:
                tl.store(places + pair, rows, mask=inside)
                tl.store(gates + rows, tl.load(weights + pair, mask=inside), mask=inside)
        if SQUARES:
            out = squares + number.to(tl.int64) * width + columns
            tl.store(out, tl.sum(total, axis=0), mask=columns < width)


@triton.jit
def _swiglu_kernel(
    gate_up,
    ends,
    activations,
    squares,
    n_experts,
    width,
    CHUNK: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    SQUARES: tl.constexpr,
):
    """A chunk of pairs, a block of columns: silu(gate) * up, where gates precede ups in a row."""
    number = tl.program_id(1)
    first, end, _ = _chunk_of(ends, n_experts, number, CHUNK, EXPERTS)
    if first < end:
        last = tl.minimum(first + CHUNK, end)
        columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        total = tl.zeros((BLOCK_ROWS, BLOCK), dtype=tl.float32)
        for step in range(0, CHUNK, BLOCK_ROWS):
            rows = (first + step + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
            mask = (rows < last)[:, None] & (columns < width)[None, :]
            place = gate_up + 2 * rows[:, None] * width + columns[None, :]
            gate = tl.load(place, mask=mask, other=0.0).to(tl.float32)
            up = tl.load(place + width, mask=mask, other=0.0).to(tl.float32)
            value = (gate * tl.sigmoid(gate) * up).to(activations.dtype.element_ty)
            out = rows[:, None] * width + columns[None, :]
            tl.store(activations + out, value, mask=mask)
            if SQUARES:
                exact = value.to(tl.float32)
                total += exact * exact
        if SQUARES:
            out = squares + number.to(tl.int64) * width + columns
            tl.store(out, tl.sum(total, axis=0), mask=columns < width)


@triton.jit
def _gate_up_kernel(
    hidden,
    order,
    ends,
    matrices,
    activations,
    n_experts,
    depth,
    width,
    TOP_K: tl.constexpr,
    CHUNK: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """A chunk of pairs, a block of columns: silu(gate) * up of the tokens' hidden states."""
    n_blocks = width // BLOCK
    # programs that follow one another read the same tokens
    number = tl.program_id(0) // n_blocks
    columns = (tl.program_id(0) % n_blocks) * BLOCK + tl.arange(0, BLOCK)
    first, end, expert = _chunk_of(ends, n_experts, number, CHUNK, EXPERTS)
    if first < end:
        rows = first + tl.arange(0, CHUNK)
        inside = rows < end
        token = tl.load(order + rows, mask=inside, other=0).to(tl.int64) // TOP_K
        along = tl.arange(0, DEPTH)
        inputs = hidden + token[:, None] * depth + along[None, :]
        gates = matrices + expert.to(tl.int64) * 2 * width * depth
        gates += columns[None, :] * depth + along[:, None]
        ups = gates + width * depth
        gate = tl.zeros((CHUNK, BLOCK), dtype=tl.float32)
        up = tl.zeros((CHUNK, BLOCK), dtype=tl.float32)
        for _ in range(0, depth, DEPTH):
            x = tl.load(inputs)
            gate = tl.dot(x, tl.load(gates), gate)
            up = tl.dot(x, tl.load(ups), up)
            inputs += DEPTH
            gates += DEPTH
            ups += DEPTH
        dtype = activations.dtype.element_ty
        gate = gate.to(dtype).to(tl.float32)
        value = (gate * tl.sigmoid(gate) * up.to(dtype).to(tl.float32)).to(dtype)
        out = activations + rows.to(tl.int64)[:, None] * width + columns[None, :]
        tl.store(out, value, mask=inside[:, None])


@triton.jit
def _chunk_sums_kernel(
    squares,
    ends,
    sums,
    width,
    CHUNK: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One expert, a block of columns: the sum of its chunks' sums."""
    expert = tl.program_id(1)
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    experts = tl.arange(0, EXPERTS)
    last = tl.load(ends + experts, mask=experts <= expert, other=0)
    first = tl.load(ends + experts - 1, mask=(experts > 0) & (experts <= expert), other=0)
    counts = (last - first + CHUNK - 1) // CHUNK
    stop = tl.sum(counts, axis=0)
    begin = stop - tl.sum(tl.where(experts == expert, counts, 0), axis=0)
    total = tl.zeros((BLOCK_ROWS, BLOCK), dtype=tl.float64)
    for start in range(begin, stop, BLOCK_ROWS):
        chunks = (start + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
        mask = (chunks < stop)[:, None] & (columns < width)[None, :]
        places = squares + chunks[:, None] * width + columns[None, :]
        total += tl.load(places, mask=mask, other=0.0).to(tl.float64)
    out = sums + expert.to(tl.int64) * width + columns
    tl.store(out, tl.sum(total, axis=0), mask=columns < width)


@triton.jit(do_not_specialize=["n_pairs"])
def _combine_kernel(
    outputs,
    places,
    gates,
    combined,
    norms,
    n_pairs,
    width,
    TOP_K: tl.constexpr,
    CHOICES: tl.constexpr,
    BLOCK: tl.constexpr,
    NORMS: tl.constexpr,
):
    """One token: its K outputs, weighted and added, and the norm and largest magnitude of each."""
    token = tl.program_id(0).to(tl.int64)
    choice = tl.arange(0, CHOICES)
    pair = token * TOP_K + choice
    place = tl.load(places + pair, mask=choice < TOP_K, other=-1).to(tl.int64)
    gate = tl.load(gates + pair, mask=place >= 0, other=0.0).to(tl.float32)
    squares = tl.zeros((CHOICES,), dtype=tl.float32)
    largest = tl.zeros((CHOICES,), dtype=tl.float32)
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < width
        mask = (place >= 0)[:, None] & inside[None, :]
        rows = tl.load(outputs + place[:, None] * width + columns[None, :], mask=mask, other=0.0)
        rows = rows.to(tl.float32)
        if NORMS:
            squares += tl.sum(rows * rows, axis=1)
            largest = tl.maximum(largest, tl.max(tl.abs(rows), axis=1))
        total = tl.sum(rows * gate[:, None], axis=0)
        out = combined + token * width + columns
        tl.store(out, total.to(combined.dtype.element_ty), mask=inside)
    if NORMS:
        tl.store(norms + place, tl.sqrt(squares), mask=place >= 0)
        tl.store(norms + n_pairs + place, largest, mask=place >= 0)


def _most_chunks(n_pairs: int, n_experts: int) -> int:
    """Chunks that there can be, however the pairs are divided."""
    return min(n_pairs, n_pairs // _CHUNK + n_experts)


def _sums_of_chunks(squares: Tensor, ends: Tensor) -> Tensor:
    """Per expert, (E, C) float64, from the sums of all chunks."""
    width = squares.shape[-1]
    sums = torch.empty(len(ends), width, dtype=torch.float64, device=squares.device)
    block = min(128, triton.next_power_of_2(width))
    _chunk_sums_kernel[(triton.cdiv(width, block), len(ends))](
        squares,
        ends,
        sums,
        width,
        CHUNK=_CHUNK,
        EXPERTS=triton.next_power_of_2(len(ends)),
        BLOCK_ROWS=8,
        BLOCK=block,
        num_warps=4,
    )
    return sums


def gather(
    hidden: Tensor, weights: Tensor, order: Tensor, ends: Tensor, with_squares: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """What the pairs need of their tokens: inputs (S, H), places (N, K), gates (S,), squares.

    hidden: (N, H)    weights: (N, K)    order: (S,), which of the N x K pairs follow one another
    places: int32, where each pair is in the order, or -1    squares: (E, H) float64, if wanted
    """
    n_pairs, top_k = len(order), weights.shape[-1]
    width, device = hidden.shape[-1], hidden.device
    inputs = torch.empty(n_pairs, width, dtype=hidden.dtype, device=device)
    gates = torch.empty(n_pairs, dtype=weights.dtype, device=device)
    places = torch.empty(weights.shape, dtype=torch.int32, device=device)
    if n_pairs < places.numel():
        places.fill_(-1)
    n_chunks = _most_chunks(n_pairs, len(ends))
    squares = inputs
    if with_squares:
        squares = torch.empty(n_chunks, width, dtype=torch.float32, device=device)
    block = min(512, triton.next_power_of_2(width))
    if n_chunks:
        _gather_kernel[(triton.cdiv(width, block), n_chunks)](
            hidden.contiguous(),
            weights.contiguous(),
            order,
            ends,
            inputs,
            places,
            gates,
            squares,
            len(ends),
            width,
            TOP_K=top_k,
            CHUNK=_CHUNK,
            EXPERTS=triton.next_power_of_2(len(ends)),
            BLOCK_ROWS=16,
            BLOCK=block,
            SQUARES=with_squares,
            num_warps=4,
        )
    return inputs, places, gates, _sums_of_chunks(squares, ends) if with_squares else None


def swiglu(gate_up: Tensor, ends: Tensor, with_squares: bool) -> tuple[Tensor, Tensor | None]:
    """silu(gate) * up, (S, F), from (S, 2F), and their sums of squares (E, F), if wanted."""
    n_pairs, doubled = gate_up.shape
    width, device = doubled // 2, gate_up.device
    activations = torch.empty(n_pairs, width, dtype=gate_up.dtype, device=device)
    n_chunks = _most_chunks(n_pairs, len(ends))
    squares = activations
    if with_squares:
        squares = torch.empty(n_chunks, width, dtype=torch.float32, device=device)
    block = min(256, triton.next_power_of_2(width))
    if n_chunks:
        _swiglu_kernel[(triton.cdiv(width, block), n_chunks)](
            gate_up,
            ends,
            activations,
            squares,
            len(ends),
            width,
            CHUNK=_CHUNK,
            EXPERTS=triton.next_power_of_2(len(ends)),
            BLOCK_ROWS=16,
            BLOCK=block,
            SQUARES=with_squares,
            num_warps=4,
        )
    return activations, _sums_of_chunks(squares, ends) if with_squares else None


def fits_gate_up(depth: int, width: int) -> bool:
    """Whether `gate_up` computes with matrices of this shape: it has no part blocks."""
    return depth % _DEPTH == 0 and width % _COLUMNS == 0


def gate_up(hidden: Tensor, matrices: Tensor, order: Tensor, ends: Tensor, top_k: int) -> Tensor:
    """silu(gate) * up (S, F) of hidden (N, H) and matrices (E, 2F, H), without copies of tokens."""
    n_experts, doubled, depth = matrices.shape
    width = doubled // 2
    activations = torch.empty(len(order), width, dtype=hidden.dtype, device=hidden.device)
    n_chunks = _most_chunks(len(order), n_experts)
    if n_chunks:
        _gate_up_kernel[(n_chunks * (width // _COLUMNS),)](
            hidden.contiguous(),
            order,
            ends,
            matrices.contiguous(),
            activations,
            n_experts,
            depth,
            width,
            TOP_K=top_k,
            CHUNK=_CHUNK,
            EXPERTS=triton.next_power_of_2(n_experts),
            BLOCK=_COLUMNS,
            DEPTH=_DEPTH,
            num_warps=8,
            num_stages=4,
        )
    return activations


def combine(outputs: Tensor, places: Tensor, gates: Tensor, norms: Tensor | None) -> Tensor:
    """(N, H) from outputs (S, H), places (N, K) in them and gates (N, K); fills norms (2, S)."""
    n_tokens, top_k = places.shape
    width = outputs.shape[-1]
    combined = torch.empty(n_tokens, width, dtype=outputs.dtype, device=outputs.device)
    choices = triton.next_power_of_2(top_k)
    block = min(triton.next_power_of_2(width), max(128, 8192 // choices))
    _combine_kernel[(n_tokens,)](
        outputs,
        places,
        gates,
        combined,
        outputs if norms is None else norms,
        len(outputs),
        width,
        TOP_K=top_k,
        CHOICES=choices,
        BLOCK=block,
        NORMS=norms is not None,
        num_warps=4,
    )
    return combined
