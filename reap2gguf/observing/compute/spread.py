"""Long rows on a CPU: a matrix product or an attention cut into blocks that idle threads take.

A batch of a few long rows has fewer pieces than a machine has threads. Blocks are cut by shape
alone, as pieces are (`crew.py`), so that the number of threads shows nowhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

LONG = 1024  # positions; a piece has more only if a row has
_BLOCK = 512  # rows of a matrix product: wide enough for its full speed

T = TypeVar("T")
R = TypeVar("R")


class Helpers(Protocol):
    """Threads of which some may be idle."""

    def together(self, function: Callable[[T], R], items: Sequence[T]) -> list[R]:
        """`function` of each item, in order, by this thread and by idle ones."""


class Spread(TorchFunctionMode):
    """While it is entered, this thread's long products and attentions are shared with others."""

    def __init__(self, helpers: Helpers) -> None:
        super().__init__()
        self._helpers = helpers

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is linear and not kwargs and args[0].numel() > LONG * args[0].shape[-1]:
            return _linear(self._helpers, *args)
        if func is scaled_dot_product_attention and len(args) == 3 and args[0].shape[-2] > LONG:
            return _attention(self._helpers, *args, **kwargs)
        return func(*args, **kwargs)


def _linear(helpers: Helpers, values: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`values` (..., C) times `weight` (R, C), in blocks of rows."""
    rows = values.reshape(-1, values.shape[-1])
    product = rows.new_empty(len(rows), len(weight))

    def run(first: int) -> None:
        block = slice(first, first + _BLOCK)
        torch.mm(rows[block], weight.t(), out=product[block])

    helpers.together(run, range(0, len(rows), _BLOCK))
    if bias is not None:
        product += bias
    return product.view(*values.shape[:-1], len(weight))


def _attention(
    helpers: Helpers, query: Tensor, key: Tensor, value: Tensor,
    attn_mask: Tensor | None = None, **others: Any,
) -> Tensor:  # fmt: skip
    """Attention (B, heads, T, D), the queries of one key head after another."""
    n_keys, n_shared = key.shape[1], query.shape[1] // key.shape[1]
    if attn_mask is not None and attn_mask.dim() == 4 and attn_mask.shape[1] > 1:
        return scaled_dot_product_attention(query, key, value, attn_mask, **others)

    def run(head: int) -> Tensor:
        queries = query[:, head * n_shared : (head + 1) * n_shared]
        one = slice(head, head + 1)
        return scaled_dot_product_attention(
            queries, key[:, one], value[:, one], attn_mask, **others
        )

    return torch.cat(helpers.together(run, range(n_keys)), dim=1)
