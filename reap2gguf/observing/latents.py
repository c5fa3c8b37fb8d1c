"""What llama.cpp multiplies in each head of a latent attention, and transformers never forms.

llama.cpp applies `attn_k_b` to each head's queries, and `attn_v_b` to each head's sum of latents,
weighted by its attention. The queries are there in transformers too. The sums are what attention
makes of the latents in place of the values. They are computed in pieces that are as wide as the
keys, so that the same kernels run and no matrix of all pairs of positions is in memory.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import pad

if TYPE_CHECKING:
    from reap2gguf.models.description import HeadMatrices

_IMPLEMENTATION = "reap2gguf_latents"
_WATCH = "_reap2gguf_latents"
# called with queries (B, T, heads * query_width), and pieces (heads, columns) of the sums
SeeQueries = Callable[[Tensor], None]
SeeSums = Callable[[Tensor, slice], None]


class LatentWatch:
    """Watches the attention of one layer until it is closed; threads may share it."""

    def __init__(
        self, layer: torch.nn.Module, heads: HeadMatrices, queries: SeeQueries, sums: SeeSums
    ) -> None:
        """`queries` gets (B, T, heads, query_width), `sums` (B, T, heads, w) and which columns.

        The slices of columns that `sums` gets cover all of the latents.
        """
        _register()
        self._heads = heads
        self._see_queries, self._see_sums = queries, sums
        self._latents = threading.local()  # a batch's slices are computed by threads of their own
        self._attention: Any = layer.get_submodule(heads.attention)
        self._config = self._attention.config
        config: Any = copy.copy(self._config)  # that of the other layers stays
        config._attn_implementation = _IMPLEMENTATION
        self._attention.config = config
        setattr(self._attention, _WATCH, self)
        module = layer.get_submodule(heads.latents)
        self._hook = module.register_forward_hook(self._keep)

    def _keep(self, module: torch.nn.Module, arguments: Any, output: Tensor) -> None:
        self._latents.values = output

    def see(self, query: Tensor, width: int, attend: Callable[[Tensor], Tensor]) -> None:
        """Show what one attention multiplies.

        query: (B, heads, T, D)    width: D    attend: values (B, heads, T, D) to (B, T, heads, D)
        """
        latents = self._latents.values.flatten(1, -2)[:, None]  # one head: (B, 1, T, R)
        self._latents.values = None
        self._see_queries(query[..., : self._heads.query_width].transpose(1, 2))
        for first in range(0, self._heads.sum_width, width):
            piece = latents[..., first : first + width]
            n_columns = piece.shape[-1]
            values = pad(piece, (0, width - n_columns)).expand(-1, query.shape[1], -1, -1)
            columns = slice(first, first + n_columns)
            self._see_sums(attend(values)[..., :n_columns], columns)

    def close(self) -> None:
        """Leave the attention as it was."""
        self._hook.remove()
        self._attention.config = self._config
        delattr(self._attention, _WATCH)


def _register() -> None:
    """Register the attention function with transformers; it may be called again."""
    from transformers import AttentionInterface

    AttentionInterface.register(_IMPLEMENTATION, _watched_attention)


def _watched_attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **others: Any
) -> tuple[Tensor, Any]:
    """transformers' `sdpa`, shown to the watch of the module."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    def attend(values: Tensor) -> Tensor:
        output: Tensor = sdpa_attention_forward(module, query, key, values, mask, **others)[0]
        return output

    watch: LatentWatch = getattr(module, _WATCH)
    watch.see(query, key.shape[-1], attend)
    return attend(value), None
