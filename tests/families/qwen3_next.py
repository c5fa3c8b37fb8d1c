"""Qwen3-Next."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from hypothesis import strategies as st
from transformers import Qwen3NextConfig

from reap2gguf.models.qwen3_next import Qwen3Next
from tests.models.config_rows import TEXT, Read, Refused, Row
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
from tests.tiny import TinyQwen35Moe
from tests.tokens import special_tokens


@dataclass(frozen=True)
class TinyQwen3Next(TinyQwen35Moe):
    """A Qwen3-Next: the layers of Qwen3.5, whose linear attention has other input projections."""

    hidden: int = 96
    width: int = 32
    shared_width: int = 64
    top_k: int = 3
    n_heads: int = 4
    n_kv_heads: int = 2
    key_heads: int = 2
    value_heads: int = 6
    nested: bool = False
    fused: bool = False
    vision: bool = False

    def config(self) -> dict[str, Any]:
        kinds = {"l": "linear_attention", "f": "full_attention"}
        interval = self._interval()  # published configs have no layer_types
        layer_types = [kinds[kind] for kind in self.layers]
        return {
            "architectures": ["Qwen3NextForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            **special_tokens(self.vocab),
            "decoder_sparse_step": 1,
            **(interval or {"layer_types": layer_types}),
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "intermediate_size": 160,
            "linear_conv_kernel_dim": 4,
            "linear_key_head_dim": self.linear_dim,
            "linear_num_key_heads": self.key_heads,
            "linear_num_value_heads": self.value_heads,
            "linear_value_head_dim": self.linear_dim,
            "max_position_embeddings": 512,
            "mlp_only_layers": [],
            "model_type": "qwen3_next",
            "moe_intermediate_size": self.width,
            "norm_topk_prob": True,
            "num_attention_heads": self.n_heads,
            "num_experts": self.n_experts,
            "num_experts_per_tok": self.top_k,
            "num_hidden_layers": len(self.layers),
            "num_key_value_heads": self.n_kv_heads,
            "partial_rotary_factor": 0.25,
            "rms_norm_eps": 1e-6,
            "rope_scaling": None,
            "rope_theta": 10000.0,
            "shared_expert_intermediate_size": self.shared_width,
            "tie_word_embeddings": self.tied,
            "torch_dtype": "bfloat16",
            "use_sliding_window": False,
            "vocab_size": self.vocab,
        }

    def _deltanet(self, random: Any, layer: int) -> dict[str, torch.Tensor]:
        found = super()._deltanet(random, layer)
        for name in ("qkv", "z", "a", "b"):
            del found[f"linear_attn.in_proj_{name}.weight"]
        packed = 2 * (self.key_heads + self.value_heads) * self.linear_dim
        qkvz = random.matrix(packed, self.hidden)
        ba = random.matrix(2 * self.value_heads, self.hidden)
        projections = {"in_proj_qkvz": qkvz, "in_proj_ba": ba}
        return found | {f"linear_attn.{name}.weight": one for name, one in projections.items()}

    def _moe(self, prefix: str, random: Any, fused: bool) -> dict[str, torch.Tensor]:
        found = super()._moe(prefix, random, fused)
        mlp = prefix + "mlp.shared_expert."
        return found | {
            mlp + "gate_proj.weight": random.matrix(self.shared_width, self.hidden),
            mlp + "up_proj.weight": random.matrix(self.shared_width, self.hidden),
            mlp + "down_proj.weight": random.output(self.hidden, self.shared_width),
        }


NEXT = TinyQwen3Next()
LAYOUTS: dict[str, dict[str, Any]] = {
    "Qwen3NextForCausalLM": {
        "2D": NEXT,
        "3D": replace(NEXT, fused=True, fused_mtp=True),
        "without MTP": replace(NEXT, mtp=False),
        "tied": replace(NEXT, tied=True),
        "equal heads": replace(NEXT, key_heads=4, value_heads=4),
        "other layers": replace(NEXT, layers="lffl"),
    }
}

ROWS: dict[str, Row] = {
    **TEXT,
    "intermediate_size": Read(128),
    "head_dim": Read(64),
    "linear_conv_kernel_dim": Read(3),
    "linear_key_head_dim": Refused((32,)),  # llama.cpp has one size for both
    "linear_value_head_dim": Refused((32,)),
    "linear_num_key_heads": Read(3),
    "linear_num_value_heads": Read(16),
    "shared_expert_intermediate_size": Read(48),
    "decoder_sparse_step": Refused((2, None)),
    "num_experts_per_tok": Read(2),
    "norm_topk_prob": Refused((False, None)),
    "mlp_only_layers": Refused(([1],)),
    "layer_types": Read(["linear_attention", "full_attention"] * 2, may_be_null=True),
}
FIELDS: dict[Any, tuple[dict[str, Row], Any, Any]] = {
    Qwen3NextConfig: (ROWS, replace(NEXT, mtp=False, vocab=4096), Qwen3Next),
}

_POOL = {
    **COMMON,
    "full_attention_interval": st.sampled_from([ABSENT, None, 1, 2, 3, 4, 0, -1, 2.0]),
    "linear_conv_kernel_dim": NUMBERS,
    "linear_key_head_dim": NUMBERS,
    "linear_value_head_dim": NUMBERS,
    "linear_num_key_heads": NUMBERS,
    "linear_num_value_heads": NUMBERS,
    "shared_expert_intermediate_size": NUMBERS,
    "attn_output_gate": FLAGS,
    "mtp_num_hidden_layers": NUMBERS,
    "model_type": st.sampled_from([ABSENT, None, "qwen3_next", "qwen3_moe", 3]),
}


@st.composite
def qwen3_next(draw: st.DrawFn) -> Drawn:
    n_experts = draw(st.integers(2, 5))
    key_heads = draw(st.sampled_from([1, 2, 4]))
    n_kv_heads = draw(st.sampled_from([1, 2]))
    tiny = TinyQwen3Next(
        hidden=draw(st.sampled_from([32, 64, 96])),
        width=draw(st.sampled_from([16, 32])),
        shared_width=draw(st.sampled_from([16, 48])),
        n_experts=n_experts,
        top_k=draw(st.integers(1, n_experts)),
        layers=draw(st.sampled_from(["lf", "lf", "fl", "fll", "llf", "lllf", "lffl"])),
        n_heads=n_kv_heads * draw(st.sampled_from([1, 2])),
        n_kv_heads=n_kv_heads,
        head_dim=draw(st.sampled_from([16, 32, 32, 64, 8, 48])),
        key_heads=key_heads,
        value_heads=key_heads * draw(st.sampled_from([1, 2, 3])),
        linear_dim=draw(st.sampled_from([16, 32])),
        vocab=SMALL_VOCAB,
        fused=draw(st.booleans()),
        fused_mtp=draw(st.booleans()),
        mtp=draw(st.booleans()),
        tied=draw(st.booleans()),
        dtype=draw(DTYPES),
    )
    text = dict(draw(changes_of(_POOL, 2)))
    if draw(st.booleans()):
        text |= draw(rope_changes())
    return Drawn(tiny, draw(HEADS), tuple(text.items()), ())


CONFIGS = (qwen3_next(),)
