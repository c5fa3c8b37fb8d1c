"""Tiny checkpoints of decoders whose layers are all alike: full attention, and experts."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from hypothesis import strategies as st

from tests.models.oracles import SMALL_VOCAB as FEWEST_TOKENS
from tests.tiny import _Random as Random
from tests.tiny import save_sharded
from tests.tokens import SMALL_VOCAB, special_tokens, write_tokenizer

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class TinyFullAttention(ABC):
    """A model of a few hundred thousand parameters; a family adds its experts and its keys."""

    architecture: ClassVar[str]
    model_type: ClassVar[str]
    count_key: ClassVar[str] = "num_experts"
    width_key: ClassVar[str] = "intermediate_size"

    n_layers: int = 2
    hidden: int = 64
    width: int = 96
    n_experts: int = 8
    top_k: int = 2
    n_heads: int = 4
    n_kv_heads: int = 2
    head_dim: int | None = None  # as in the published configs: a share of the hidden size
    vocab: int = SMALL_VOCAB
    tied: bool = False
    n_shards: int = 1
    dtype: torch.dtype = torch.bfloat16
    seed: int = 0

    @property
    def head_width(self) -> int:
        return self.hidden // self.n_heads if self.head_dim is None else self.head_dim

    def config(self) -> dict[str, Any]:
        head = {} if self.head_dim is None else {"head_dim": self.head_dim}
        return {
            "architectures": [self.architecture],
            "model_type": self.model_type,
            **special_tokens(self.vocab),
            **head,
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "max_position_embeddings": 512,
            self.width_key: self.width,
            "num_attention_heads": self.n_heads,
            self.count_key: self.n_experts,
            "num_experts_per_tok": self.top_k,
            "num_hidden_layers": self.n_layers,
            "num_key_value_heads": self.n_kv_heads,
            "rms_norm_eps": 3e-6,
            "rope_theta": 10000.0,
            "tie_word_embeddings": self.tied,
            "vocab_size": self.vocab,
            "torch_dtype": "bfloat16",
            **self.own_config(),
        }

    @abstractmethod
    def own_config(self) -> dict[str, Any]:
        """Keys of the family."""

    @abstractmethod
    def feed_forward(self, random: Random, layer: int) -> Tensors:
        """What follows the attention of a layer, named from the layer's prefix on."""

    def attention(self, random: Random) -> Tensors:
        """The attention of a layer, named from the layer's prefix on."""
        query, key = self.n_heads * self.head_width, self.n_kv_heads * self.head_width
        return {
            "self_attn.q_proj.weight": random.matrix(query, self.hidden),
            "self_attn.k_proj.weight": random.matrix(key, self.hidden),
            "self_attn.v_proj.weight": random.matrix(key, self.hidden),
            "self_attn.o_proj.weight": random.output(self.hidden, query),
        }

    def tensors(self) -> Tensors:
        random = Random(self.seed, self.dtype)
        found = {
            "model.embed_tokens.weight": random.normal(0.5, self.vocab, self.hidden),
            "model.norm.weight": norm(random, self.hidden),
        }
        head = random.normal(0.3, self.vocab, self.hidden)
        if not self.tied:
            found["lm_head.weight"] = head
        for layer in range(self.n_layers):
            parts = {
                "input_layernorm.weight": norm(random, self.hidden),
                "post_attention_layernorm.weight": norm(random, self.hidden),
                **self.attention(random),
                **self.feed_forward(random, layer),
            }
            found |= {f"model.layers.{layer}.{name}": tensor for name, tensor in parts.items()}
        return found

    def write(self, folder: Path) -> Path:
        """Write config, shards, index and tokenizer; the folder."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.config(), indent=2))
        write_tokenizer(folder, self.vocab)
        save_sharded(self.tensors(), folder, self.n_shards)
        return folder


def norm(random: Random, size: int) -> torch.Tensor:
    return 1 + random.normal(0.1, size)


def experts_apart(
    random: Random, tiny: TinyFullAttention, path: str, names: tuple[str, str, str]
) -> Tensors:
    """One tensor per expert; `names` are those of gate, up and down."""
    found = {}
    for expert in range(tiny.n_experts):
        base = f"{path}.{expert}."
        found[f"{base}{names[0]}.weight"] = random.matrix(tiny.width, tiny.hidden)
        found[f"{base}{names[1]}.weight"] = random.matrix(tiny.width, tiny.hidden)
        found[f"{base}{names[2]}.weight"] = random.output(tiny.hidden, tiny.width)
    return found


def fused(experts: Mapping[str, torch.Tensor], gate_up: str, down: str) -> Tensors:
    """The same experts as two tensors: (E, 2F, H) of these names, and (E, H, F)."""
    gates, ups, downs = (list(experts.values())[part::3] for part in range(3))
    both = torch.stack([torch.cat(pair) for pair in zip(gates, ups, strict=True)])
    return {gate_up: both, down: torch.stack(downs)}


def swiglu(random: Random, tiny: TinyFullAttention, path: str, width: int) -> Tensors:
    """A feed-forward network of three matrices."""
    return {
        f"{path}.gate_proj.weight": random.matrix(width, tiny.hidden),
        f"{path}.up_proj.weight": random.matrix(width, tiny.hidden),
        f"{path}.down_proj.weight": random.output(tiny.hidden, width),
    }


@st.composite
def drawn_sizes(draw: st.DrawFn, more_heads: bool = True, heads: bool = True) -> dict[str, Any]:
    """Sizes of a model: with grouped queries if `more_heads`, with a `head_dim` if `heads`."""
    n_experts = draw(st.integers(2, 6))
    n_kv_heads = draw(st.sampled_from([1, 2, 4]))
    return {
        "n_layers": draw(st.integers(1, 3)),
        "hidden": draw(st.sampled_from([32, 64, 96])),
        "width": draw(st.sampled_from([8, 24, 40])),
        "n_experts": n_experts,
        "top_k": draw(st.integers(1, n_experts)),
        "n_heads": n_kv_heads * (draw(st.sampled_from([1, 2])) if more_heads else 1),
        "n_kv_heads": n_kv_heads,
        "head_dim": draw(st.sampled_from([None, None, 16, 24])) if heads else None,
        "vocab": draw(st.sampled_from([FEWEST_TOKENS, 320])),
        "tied": draw(st.booleans()),
        "dtype": draw(st.sampled_from([torch.bfloat16, torch.float32, torch.float16])),
    }
