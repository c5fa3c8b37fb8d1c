"""How much of a GPU's memory is left for a model's file: what llama.cpp needs beside the weights.

Counted from the keys of the file's header, as llama.cpp 0.3.36 (of llama-cpp-python) reports it:

- cache: keys and values of all cells of the context, a multiple of 256, as F16, in every layer of
  the trunk with attention. A latent attention (DeepSeek) has latents in place of both.
- state: of layers with a recurrence (Gated DeltaNet, Kimi Delta Attention, Mamba-2) or a short
  convolution, for one sequence, as F32. It does not grow with the context.
- compute: a bound for the buffer of a batch of 512 tokens with flash attention: their logits, the
  mask of the context, and what one layer computes.
- reserve: 512 MiB for the driver, its libraries and the desktop.

The whole file counts as weights, though llama.cpp leaves the embedding in the host's memory, and
does not load a multi-token-prediction block.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gguf import Keys

from reap2gguf.messages import size

if TYPE_CHECKING:
    from reap2gguf.models.contract import MoeModel

RESERVE = 2**29
_BATCH = 512  # tokens that llama.cpp computes at a time: its n_ubatch
_CELLS = 256  # of a cache, which has a multiple of them
_HALF, _SINGLE = 2, 4  # bytes of F16 and F32
_AROUND = 16  # hidden states that a layer holds at most, beside its experts'
_WIDTH = Keys.LLM.FEED_FORWARD_LENGTH
_RECURRENT = "{arch}.attention.recurrent_layers"


@dataclass(frozen=True)
class CardUse:
    """What of a card's memory is no weights, in bytes."""

    card: int
    context: int  # tokens
    cache: int
    state: int
    compute: int
    reserve: int = RESERVE

    @property
    def taken(self) -> int:
        """All of these together."""
        return self.cache + self.state + self.compute + self.reserve

    @property
    def left(self) -> int:
        """The largest file of weights; below 1 if there is no room for any."""
        return self.card - self.taken

    @property
    def words(self) -> str:
        """What is counted, for people."""
        state = f", state {size(self.state)}" if self.state else ""
        return (
            f"of {size(self.card)}, at a context of {self.context:,} tokens: KV cache "
            f"{size(self.cache)} (F16){state}, compute buffer {size(self.compute)}, reserve "
            f"{size(self.reserve)}"
        )


def card_use(model: MoeModel, card: int, context: int) -> CardUse:
    """What a model needs on a card of so many bytes, beside its weights."""
    header = _Header(model)
    cells = -(-context // _CELLS) * _CELLS
    cache = _HALF * cells * sum(header.cached(layer) for layer in header.layers)
    state = _SINGLE * sum(header.state(layer) for layer in header.layers)
    return CardUse(card, context, cache, state, _compute(model, header, cells))


def _compute(model: MoeModel, header: _Header, cells: int) -> int:
    """Bytes of the buffer for a batch, at most."""
    facts = model.facts
    of_experts = facts.experts_per_token * (3 * facts.expert_width + facts.expert_io_width)
    heads = 4 * facts.n_heads * header.number(Keys.Attention.KEY_LENGTH, facts.head_dim)
    a_token = facts.vocab_size + _AROUND * facts.hidden_size + of_experts + heads
    return _BATCH * (_SINGLE * a_token + (_SINGLE + _HALF) * cells)


class _Header:
    """The keys of a model's header."""

    def __init__(self, model: MoeModel) -> None:
        self._arch = model.facts.gguf_arch
        self._values: Mapping[str, Any] = {one.key: one.value for one in model.gguf_metadata()}
        self._facts = model.facts
        n_blocks = self.number(Keys.LLM.BLOCK_COUNT, model.facts.n_blocks)
        self.layers = range(n_blocks - self.number(Keys.LLM.NEXTN_PREDICT_LAYERS, 0))

    def get(self, key: str) -> Any:
        """A key's value, or None."""
        return self._values.get(key.format(arch=self._arch))

    def number(self, key: str, default: int) -> int:
        """A key's whole number."""
        found = self.get(key)
        return default if found is None else int(found)

    def cached(self, layer: int) -> int:
        """Values of a cell in a layer: keys and values of its heads."""
        attention, facts = Keys.Attention, self._facts
        heads = self.get(attention.HEAD_COUNT_KV)
        n_heads = int(heads[layer] if isinstance(heads, list) else heads)
        if self._is_recurrent(layer):
            return 0
        keys = self.number(attention.KEY_LENGTH, facts.head_dim)
        if self.get(attention.KV_LORA_RANK) is not None:
            return n_heads * keys  # values are a part of them
        return n_heads * (keys + self.number(attention.VALUE_LENGTH, facts.head_dim))

    def state(self, layer: int) -> int:
        """Values that a layer keeps of all tokens before."""
        if not self._is_recurrent(layer):
            return 0
        if (reach := self.get(Keys.ShortConv.L_CACHE)) is not None:
            return self._facts.hidden_size * (int(reach) - 1)
        ssm = Keys.SSM
        if (head := self.get(Keys.KDA.HEAD_DIM)) is not None:
            width = self._facts.n_heads * int(head)  # of queries, keys and values each
            return 3 * (self.number(ssm.CONV_KERNEL, 1) - 1) * width + width * int(head)
        inner, size = self.number(ssm.INNER_SIZE, 0), self.number(ssm.STATE_SIZE, 0)
        channels = inner + 2 * self.number(ssm.GROUP_COUNT, 0) * size
        return (self.number(ssm.CONV_KERNEL, 1) - 1) * channels + inner * size

    def _is_recurrent(self, layer: int) -> bool:
        if (flags := self.get(_RECURRENT)) is not None:
            return bool(flags[layer])
        heads, widths = self.get(Keys.Attention.HEAD_COUNT_KV), self.get(_WIDTH)
        if isinstance(heads, list):  # Nemotron's feed-forward blocks have neither
            return not heads[layer] and not (isinstance(widths, list) and widths[layer])
        if self.get(Keys.SSM.STATE_SIZE) is not None:
            return bool((layer + 1) % self.number(Keys.LLM.FULL_ATTENTION_INTERVAL, 1))
        return False
