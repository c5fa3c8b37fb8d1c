"""MiniMax-M2."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from hypothesis import strategies as st
from transformers import MiniMaxM2Config

from reap2gguf.models.minimax_m2 import MiniMaxM2
from tests.models.config_rows import TEXT, Carried, Elsewhere, Read, Row
from tests.models.drawn import (
    ABSENT,
    COMMON,
    FLAGS,
    HEADS,
    NUMBERS,
    Drawn,
    changes_of,
    rope_changes,
)
from tests.quantized import Quantized, as_fp8
from tests.tiny_full_attention import (
    Random,
    Tensors,
    TinyFullAttention,
    drawn_sizes,
    experts_apart,
    norm,
)

# what published checkpoints leave in bfloat16, as their configs name it
LEFT_BY_FP8 = ("block_sparse_moe.gate.", "e_score_correction_bias", "lm_head")


@dataclass(frozen=True)
class TinyMiniMaxM2(TinyFullAttention):
    """Under the names of the published checkpoints; its biases change which experts are chosen."""

    architecture: ClassVar[str] = "MiniMaxM2ForCausalLM"
    model_type: ClassVar[str] = "minimax_m2"
    count_key: ClassVar[str] = "num_local_experts"

    head_dim: int | None = 32  # heads are together wider than the hidden states
    rotary: float | None = 0.5  # the share of a head that is rotated
    says_rotary_dim: bool = True  # else `partial_rotary_factor`
    n_modules: int = 0  # for multi-token prediction, stored after the layers

    def own_config(self) -> dict[str, Any]:
        rotary: dict[str, Any] = {}
        if self.rotary is not None and self.says_rotary_dim:
            rotary = {"rotary_dim": int(self.rotary * self.head_width)}
        elif self.rotary is not None:
            rotary = {"partial_rotary_factor": self.rotary}
        return {
            **rotary,
            "attn_type_list": [1] * self.n_layers,
            "mtp_transformer_layers": 1,
            "num_mtp_modules": 3,
            "qk_norm_type": "per_layer",
            "router_jitter_noise": 0.0,
            "scoring_func": "sigmoid",
            "shared_intermediate_size": 0,
            "sliding_window": None,
            "use_mtp": True,
            "use_qk_norm": True,
            "use_routing_bias": True,
        }

    def attention(self, random: Random) -> Tensors:
        query, key = self.n_heads * self.head_width, self.n_kv_heads * self.head_width
        return {
            **super().attention(random),
            "self_attn.q_norm.weight": norm(random, query),
            "self_attn.k_norm.weight": norm(random, key),
        }

    def feed_forward(self, random: Random, layer: int) -> Tensors:
        moe = "block_sparse_moe."
        return {
            moe + "gate.weight": random.normal(0.3, self.n_experts, self.hidden),
            moe + "e_score_correction_bias": random.normal(0.3, self.n_experts).float(),
            **experts_apart(random, self, moe + "experts", ("w1", "w3", "w2")),
        }

    def tensors(self) -> Tensors:
        found = super().tensors()
        for module in range(self.n_modules):
            layer, own = "model.layers.0.", f"model.layers.{self.n_layers + module}."
            found |= {
                own + name.removeprefix(layer): tensor.clone()
                for name, tensor in found.items()
                if name.startswith(layer)
            }
            found[own + "enorm.weight"] = torch.ones(self.hidden, dtype=self.dtype)
            found[own + "eh_proj.weight"] = torch.ones(self.hidden, 2 * self.hidden)
        return found


TINY = TinyMiniMaxM2()
LAYOUTS: dict[str, dict[str, Any]] = {
    "MiniMaxM2ForCausalLM": {
        "published": TINY,
        "another spelling of the rotated share": replace(TINY, rotary=0.25, says_rotary_dim=False),
        "whole heads rotated": replace(TINY, rotary=None, head_dim=16),
        "with modules for multi-token prediction": replace(TINY, n_modules=2),
    },
}


def as_published(tiny: TinyMiniMaxM2 = TINY, block: tuple[int, int] = (24, 40)) -> Quantized:
    """The checkpoint in FP8 as MiniMax publishes it, but for the sizes of its blocks."""
    fp8 = as_fp8(tiny, block)
    section = {
        **fp8.section,
        "fmt": "float8_e4m3fn",
        "modules_to_not_convert": ["gate", "e_score_correction_bias", "lm_head"],
    }
    return replace(fp8, section=section, left=("embed_tokens", "norm", *LEFT_BY_FP8))


_ROWS: dict[str, Row] = {
    **{k: row for k, row in TEXT.items() if k not in ("moe_intermediate_size", "num_experts")},
    "num_local_experts": Read(16),
    "intermediate_size": Read(128),
    "head_dim": Read(64),
    "tie_word_embeddings": Elsewhere("test_minimax_m2.py"),
    "router_jitter_noise": Carried(0.5),  # of training
}
_CLASS = replace(TINY, rotary=0.5, says_rotary_dim=False)
FIELDS: dict[Any, tuple[dict[str, Row], Any, Any]] = {MiniMaxM2Config: (_ROWS, _CLASS, MiniMaxM2)}

_POOL = {
    **COMMON,
    "rotary_dim": NUMBERS,
    "scoring_func": st.sampled_from([ABSENT, None, "sigmoid", "softmax"]),
    "use_qk_norm": FLAGS, "use_routing_bias": FLAGS, "use_mtp": FLAGS, "num_mtp_modules": NUMBERS,
    "qk_norm_type": st.sampled_from([ABSENT, None, "per_layer", "per_head"]),
    "attn_type_list": st.sampled_from([ABSENT, None, [1], [1, 1], [0, 1]]),
    "shared_intermediate_size": NUMBERS, "routed_scaling_factor": NUMBERS,
}  # fmt: skip


@st.composite
def minimax(draw: st.DrawFn) -> Drawn:
    sizes = draw(drawn_sizes()) | {"tied": False}
    sizes["head_dim"] = sizes["head_dim"] or 8
    says = draw(st.booleans())
    rotary = draw(st.sampled_from([0.5, 0.25, 0.75, 1.0, None]))
    tiny = TinyMiniMaxM2(**sizes, says_rotary_dim=says, rotary=rotary)
    text = dict(draw(changes_of(_POOL, 2)))
    if draw(st.booleans()):
        text |= draw(rope_changes())
    return Drawn(tiny, draw(HEADS), tuple(text.items()), ())


CONFIGS = (minimax(),)
