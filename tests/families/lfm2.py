"""LFM2-MoE."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from transformers import Lfm2MoeConfig

from reap2gguf.models.lfm2_moe import Lfm2Moe
from tests.models.config_rows import TEXT, Carried, Elsewhere, Read, Refused, Row
from tests.models.drawn import (
    ABSENT,
    COMMON,
    DTYPES,
    FLAGS,
    HEADS,
    NUMBERS,
    Drawn,
    changes_of,
    rope_changes,
)
from tests.models.oracles import SMALL_VOCAB
from tests.tiny import save_sharded
from tests.tokens import SMALL_VOCAB as VOCAB
from tests.tokens import special_tokens, write_tokenizer


@dataclass(frozen=True)
class TinyLfm2Moe:
    """An LFM2-MoE; its biases change which experts are chosen."""

    layers: str = "cfcc"  # convolution or full attention
    n_dense: int = 1
    hidden: int = 64
    width: int = 96
    dense_width: int = 160
    n_experts: int = 8
    top_k: int = 2
    n_heads: int = 4
    n_kv_heads: int = 2
    kernel: int = 3
    vocab: int = VOCAB
    tied: bool = True
    tie_key: str | None = "tie_word_embeddings"  # None: the config says nothing
    n_shards: int = 1
    dtype: torch.dtype = torch.bfloat16
    seed: int = 0

    def config(self) -> dict[str, Any]:
        kinds = {"c": "conv", "f": "full_attention"}
        return {
            "architectures": ["Lfm2MoeForCausalLM"],
            "model_type": "lfm2_moe",
            **special_tokens(self.vocab),
            "conv_L_cache": self.kernel,
            "conv_bias": False,
            "dtype": "bfloat16",
            "hidden_size": self.hidden,
            "intermediate_size": self.dense_width,
            "layer_types": [kinds[kind] for kind in self.layers],
            "max_position_embeddings": 512,
            "moe_intermediate_size": self.width,
            "norm_eps": 1e-5,
            "norm_topk_prob": True,
            "num_attention_heads": self.n_heads,
            "num_dense_layers": self.n_dense,
            "num_experts": self.n_experts,
            "num_experts_per_tok": self.top_k,
            "num_hidden_layers": len(self.layers),
            "num_key_value_heads": self.n_kv_heads,
            "rope_theta": 100_000.0,
            "routed_scaling_factor": 1.0,
            **({self.tie_key: self.tied} if self.tie_key else {}),
            "use_cache": True,
            "use_expert_bias": True,
            "vocab_size": self.vocab,
        }

    def tensors(self) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(self.seed)

        def normal(deviation: float, *shape: int) -> torch.Tensor:
            return (torch.randn(*shape, generator=generator) * deviation).to(self.dtype)

        def matrix(*shape: int) -> torch.Tensor:
            return normal(shape[-1] ** -0.5, *shape)

        def output(*shape: int) -> torch.Tensor:
            # of what is added to the residual stream: a router rarely hangs on the last bit
            return normal(0.2 * shape[-1] ** -0.5, *shape)

        def ffn(prefix: str, width: int) -> dict[str, torch.Tensor]:
            return {
                f"{prefix}w1.weight": matrix(width, self.hidden),
                f"{prefix}w2.weight": output(self.hidden, width),
                f"{prefix}w3.weight": matrix(width, self.hidden),
            }

        def norm(size: int) -> torch.Tensor:
            return 1 + normal(0.1, size)

        hidden, head = self.hidden, self.hidden // self.n_heads
        key = self.n_kv_heads * head
        found = {
            "model.embed_tokens.weight": normal(0.3, self.vocab, hidden),
            "model.embedding_norm.weight": norm(hidden),
        }
        if not self.tied:
            found["lm_head.weight"] = normal(0.3, self.vocab, hidden)
        for layer, kind in enumerate(self.layers):
            prefix = f"model.layers.{layer}."
            mixer = {
                "conv.conv.weight": normal(0.4, hidden, 1, self.kernel),
                "conv.in_proj.weight": matrix(3 * hidden, hidden),
                "conv.out_proj.weight": output(hidden, hidden),
            }
            if kind == "f":
                mixer = {
                    "self_attn.q_proj.weight": matrix(hidden, hidden),
                    "self_attn.k_proj.weight": matrix(key, hidden),
                    "self_attn.v_proj.weight": matrix(key, hidden),
                    "self_attn.out_proj.weight": output(hidden, hidden),
                    "self_attn.q_layernorm.weight": norm(head),
                    "self_attn.k_layernorm.weight": norm(head),
                }
            rest = {"operator_norm.weight": norm(hidden), "ffn_norm.weight": norm(hidden)}
            if layer < self.n_dense:
                rest |= ffn("feed_forward.", self.dense_width)
            else:
                rest["feed_forward.gate.weight"] = matrix(self.n_experts, hidden) * 2
                bias = torch.randn(self.n_experts, generator=generator) * 0.2
                rest["feed_forward.expert_bias"] = bias  # float32 in every checkpoint
                for expert in range(self.n_experts):
                    rest |= ffn(f"feed_forward.experts.{expert}.", self.width)
            found |= {prefix + name: tensor for name, tensor in (mixer | rest).items()}
        return found

    def write(self, folder: Path) -> Path:
        """Write config, shards, index and tokenizer; the folder."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.config(), indent=2))
        write_tokenizer(folder, self.vocab)
        save_sharded(self.tensors(), folder, self.n_shards)
        return folder


TINY = TinyLfm2Moe()
LAYOUTS: dict[str, dict[str, Any]] = {
    "Lfm2MoeForCausalLM": {
        "published": TINY,
        "attention first": replace(TINY, layers="fcf", n_dense=0, kernel=4),
        "own head": replace(TINY, tied=False),
        "tied by default": replace(TINY, tie_key=None, n_dense=2),
        "the older key": replace(TINY, tied=False, tie_key="tie_embedding"),
    },
}

_LFM2: dict[str, Row] = {
    **{key: row for key, row in TEXT.items() if key != "rms_norm_eps"},
    "norm_eps": Read(1e-3),
    "intermediate_size": Read(128),
    "conv_bias": Refused((True, None)),
    "conv_L_cache": Read(4),
    "num_dense_layers": Read(2),
    "use_expert_bias": Refused((False, None)),
    "routed_scaling_factor": Refused((2.5, None)),
    "norm_topk_prob": Refused((False, None)),
    "layer_types": Read(["full_attention", "conv", "conv", "full_attention"]),
    "tie_word_embeddings": Elsewhere("test_lfm2_moe.py"),
    "initializer_range": Carried(0.5),
}
# transformers' class -> its table, a config of it, and the family that reads it
FIELDS: dict[Any, tuple[dict[str, Row], Any, Any]] = {Lfm2MoeConfig: (_LFM2, TINY, Lfm2Moe)}

_CHANGES = {
    **COMMON,
    "layer_types": st.sampled_from(
        [ABSENT, None, [], ["conv", "full_attention"], ["full_attention", "conv"], ["conv"] * 2,
         ["full_attention"] * 2, ["linear_attention", "conv"], "conv"]
    ),
    "norm_eps": COMMON["rms_norm_eps"], "num_dense_layers": NUMBERS, "conv_L_cache": NUMBERS,
    "conv_bias": FLAGS, "use_expert_bias": FLAGS, "tie_embedding": FLAGS,
    "routed_scaling_factor": st.sampled_from([ABSENT, None, 1.0, 1, 2.5, 0, "1"]),
    "model_type": st.sampled_from([ABSENT, None, "lfm2", "qwen3_moe", 3]),
}  # fmt: skip


@st.composite
def lfm2(draw: st.DrawFn) -> Drawn:
    n_experts = draw(st.integers(2, 6))
    n_kv_heads = draw(st.sampled_from([1, 2]))
    layers = draw(st.sampled_from(["cf", "fc", "cf", "ccf", "cfc", "fcf"]))
    tiny = TinyLfm2Moe(
        layers=layers,
        n_dense=draw(st.integers(0, len(layers) - 1)),
        hidden=draw(st.sampled_from([32, 64, 40])),
        width=draw(st.sampled_from([8, 24, 32])),
        dense_width=draw(st.sampled_from([16, 48])),
        n_experts=n_experts,
        top_k=draw(st.integers(1, n_experts)),
        n_heads=n_kv_heads * draw(st.sampled_from([1, 2])),
        n_kv_heads=n_kv_heads,
        kernel=draw(st.sampled_from([3, 3, 2, 4])),
        vocab=draw(st.sampled_from([SMALL_VOCAB, 320])),
        tied=draw(st.booleans()),
        tie_key=draw(st.sampled_from(["tie_word_embeddings", "tie_embedding", None])),
        dtype=draw(DTYPES),
    )
    text = dict(draw(changes_of(_CHANGES, 2)))
    if draw(st.booleans()):
        text |= draw(rope_changes())
    return Drawn(tiny, draw(HEADS), tuple(text.items()), ())


# what configs are drawn of
CONFIGS = (lfm2(),)
