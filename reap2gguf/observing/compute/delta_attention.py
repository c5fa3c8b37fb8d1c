"""Kimi Delta Attention in less memory than transformers' own code for it takes.

That code forms, of all chunks at once, what every position of a chunk is to every other one in each
channel: 64 float32 values for each channel of a position, several times over. Here one row of every
chunk is formed at a time, and the triangular system of a chunk is solved, not inverted. The formula
is the same (arXiv 2510.26692), and so are the results but for the last bits.

Where flash-linear-attention is installed, its kernels compute on a GPU.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from reap2gguf.observing.linear_attention import installed_version

_NAME = "chunk_kimi_delta_attention"  # of transformers' function
_OURS = "__computes_by_rows__"
_EPS = 1e-6  # of the norms of queries and keys
_SIZES = (1, 70, 2, 8)  # of random values: batch, more positions than a chunk has, heads, channels


def save_memory(modules: Iterable[torch.nn.Module]) -> int:
    """Let delta attention in the files of these modules' classes compute by rows; how many do.

    It holds for all models of these classes in this process. A function of that name which computes
    something else on random values keeps its own code.
    """
    found = 0
    for name in {type(module).__module__ for module in modules}:
        source = sys.modules[name]
        function = getattr(source, _NAME, None)
        if function is None:
            continue
        if not hasattr(function, _OURS):
            if not _is_the_same(inspect.unwrap(function)):
                continue
            setattr(source, _NAME, _by_rows(function))
        found += 1
    return found


def _by_rows(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def attention(query: Tensor, *others: Any, **options: Any) -> Any:
        has_package = query.is_cuda and installed_version() is not None
        is_packed = any(options.get(name) is not None for name in ("seq_idx", "cu_seqlens"))
        if has_package or is_packed:
            return function(query, *others, **options)
        return delta_attention(query, *others, **options)

    setattr(attention, _OURS, True)
    return attention


def delta_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    chunk_size: int = 64,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    **_: Any,
) -> tuple[Tensor, Tensor | None]:
    """What each position reads of the state, (B, T, heads, V), and the state after the last one.

    query, key: (B, T, heads, K)    value: (B, T, heads, V)    g: as keys, logarithms of decays
    beta: (B, T, heads)    initial_state: (B, heads, K, V)
    """
    dtype, length, width = query.dtype, query.shape[1], query.shape[-1]
    query, key, value, decay = (_chunks(x, chunk_size) for x in (query, key, value, g))
    if use_qk_l2norm_in_kernel:
        query, key = _unit(query), _unit(key)
    query = query * width**-0.5
    beta = _chunks(beta[..., None], chunk_size)
    decay = decay.cumsum(-2)
    scaled = key * beta
    mixing, reading = _pairs(query, key, scaled, decay)
    right = torch.cat((value * beta, scaled * decay.exp()), dim=-1)
    new, erased = torch.linalg.solve_triangular(
        mixing, right, upper=False, unitriangular=True
    ).split((value.shape[-1], width), dim=-1)
    state = value.new_zeros(*value.shape[:2], width, value.shape[-1])
    if initial_state is not None:
        state = initial_state.to(state)
    output = torch.empty_like(value)
    for i in range(value.shape[2]):
        written = new[:, :, i] - erased[:, :, i] @ state
        seen = decay[:, :, i]
        output[:, :, i] = (query[:, :, i] * seen.exp()) @ state + reading[:, :, i] @ written
        last = seen[..., -1:, :]
        kept = (key[:, :, i] * (last - seen).exp()).mT
        state = state * last.exp().mT + kept @ written
    output = output.flatten(2, 3)[:, :, :length].transpose(1, 2).contiguous().to(dtype)
    return output, state if output_final_state else None


def _chunks(values: Tensor, size: int) -> Tensor:
    """(B, T, heads, D) as (B, heads, chunks, size, D) in float32; zeros fill the last chunk."""
    padding = -values.shape[1] % size
    turned = values.transpose(1, 2).to(torch.float32)
    padded = torch.nn.functional.pad(turned, (0, 0, 0, padding))
    return padded.reshape(*padded.shape[:2], -1, size, padded.shape[-1])


def _unit(values: Tensor) -> Tensor:
    return values / torch.sqrt((values * values).sum(-1, keepdim=True) + _EPS)


def _pairs(query: Tensor, key: Tensor, scaled: Tensor, decay: Tensor) -> tuple[Tensor, Tensor]:
    """Of each position of a chunk and those before it, what it erases of them and reads of them.

    Arguments: (B, heads, chunks, C, K)    result: lower triangles (B, heads, chunks, C, C)
    """
    size = key.shape[-2]
    mixing = key.new_zeros(*key.shape[:-1], size)
    reading = torch.zeros_like(mixing)
    for row in range(size):
        seen = (decay[..., row : row + 1, :] - decay[..., : row + 1, :]).exp_()
        seen *= key[..., : row + 1, :]
        both = torch.stack((scaled[..., row, :], query[..., row, :]), dim=-1)
        products = seen @ both
        mixing[..., row, :row] = products[..., :row, 0]
        reading[..., row, : row + 1] = products[..., 1]
    return mixing, reading


def _is_the_same(function: Callable[..., Any]) -> bool:
    """Whether a function computes on random values what the formula does."""
    generator = torch.Generator().manual_seed(0)
    query, key, value, decay = torch.randn(4, *_SIZES, generator=generator)
    beta = torch.rand(_SIZES[:3], generator=generator)
    given = (query, key, value, -decay.abs(), beta)
    options: dict[str, Any] = {"output_final_state": True, "use_qk_l2norm_in_kernel": True}
    with torch.inference_mode():
        try:
            theirs = function(*given, **options)
        except (TypeError, ValueError, RuntimeError):
            return False  # its arguments are not those of the function that is meant
        ours = delta_attention(*given, **options)
    return len(theirs) == 2 and all(map(_close, ours, theirs))


def _close(ours: Tensor | None, theirs: Any) -> bool:
    if not isinstance(ours, Tensor) or not isinstance(theirs, Tensor):
        return False
    return ours.shape == theirs.shape and torch.allclose(ours, theirs, atol=1e-5)
