"""The multi-token-prediction block, which transformers does not run.

At position t it takes the trunk's final hidden state (after the last norm) and the embedding of
token t + 1, and predicts token t + 2: each half through a norm of its own, both through `fc`, then
one decoder layer and a norm before the model's head (arXiv 2412.19437). What stored tensors of the
block are called is for the model to say (`MoeModel.parameter`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class Layers(torch.nn.ModuleList):
    """Decoder layers one after another, all called with the same arguments."""

    def forward(self, hidden: Tensor, **arguments: Any) -> Tensor:
        """Hidden states (B, T, H) after all of them."""
        for layer in self:
            hidden = layer(hidden, **arguments)
        return hidden


class MtpBlock(torch.nn.Module):
    """The block: `fc`, `embedding_norm`, `hidden_norm`, a decoder layer `layer`, and `norm`."""

    def __init__(
        self,
        norm: torch.nn.Module,
        layer: torch.nn.Module,
        hidden: int,
        eps: float,
        centers: bool = False,
    ) -> None:
        """The norms are like `norm`; `centers`: the last one takes off the mean before."""
        super().__init__()
        norm_type: Any = type(norm)
        self.hidden_norm = norm_type(hidden, eps=eps)
        self.embedding_norm = norm_type(hidden, eps=eps)
        self.fc = torch.nn.Linear(2 * hidden, hidden, bias=False)
        self.layer = layer
        last = torch.nn.LayerNorm(hidden, eps=eps, bias=False) if centers else None
        self.norm = last or norm_type(hidden, eps=eps)

    def forward(self, hidden: Tensor, next_embedding: Tensor, **arguments: Any) -> Tensor:
        """Hidden states (B, T, H), before the last norm, that predict two tokens ahead."""
        halves = (self.embedding_norm(next_embedding), self.hidden_norm(hidden))
        output: Tensor = self.layer(self.fc(torch.cat(halves, dim=-1)), **arguments)
        return output


def build_mtp(
    config: Any,
    trunk: Sequence[torch.nn.Module],
    templates: Sequence[int],
    norm: torch.nn.Module,
    centers: bool,
    dtype: torch.dtype,
) -> MtpBlock:
    """The block on the meta device; its layers are of the kinds of those of the trunk.

    `templates` are their numbers; `norm` and `centers` as for `MtpBlock`.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    # transformers' classes have one of two names for it
    names: Any = vars(norm)
    eps: float = names["variance_epsilon"] if "variance_epsilon" in names else names["eps"]
    try:
        with torch.device("meta"):
            layers: list[Any] = [type(trunk[i])(config, i) for i in templates]
            layer = layers[0] if len(layers) == 1 else Layers(layers)
            block = MtpBlock(norm, layer, config.hidden_size, eps, centers)
    finally:
        torch.set_default_dtype(before)
    return block.eval()


def next_tokens(tokens: Tensor) -> Tensor:
    """Tokens (B, T) moved one to the left; the last position, which has no next, repeats itself."""
    return torch.cat((tokens[:, 1:], tokens[:, -1:]), dim=1)


def count_hits(best: Tensor, tokens: Tensor, lengths: Tensor) -> tuple[int, int]:
    """How often position t's best token (B, T) is token t + 2, and of how many; no padding."""
    width = tokens.shape[1]
    if width < 3:
        return 0, 0
    real = torch.arange(width - 2) < (lengths - 2)[:, None]
    hits = (best[:, : width - 2].cpu() == tokens[:, 2:]) & real
    return int(hits.sum()), int(real.sum())
