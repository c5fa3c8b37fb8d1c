"""OLMoE."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from hypothesis import strategies as st
from transformers import OlmoeConfig

from reap2gguf.models.olmoe import Olmoe
from tests.models.config_rows import TEXT, Carried, Read, Refused, Row
from tests.models.drawn import COMMON, HEADS, Drawn, changes_of, rope_changes
from tests.tiny_full_attention import (
    Random,
    Tensors,
    TinyFullAttention,
    drawn_sizes,
    experts_apart,
    fused,
    norm,
)


@dataclass(frozen=True)
class TinyOlmoe(TinyFullAttention):
    """Norms of whole queries and keys."""

    architecture: ClassVar[str] = "OlmoeForCausalLM"
    model_type: ClassVar[str] = "olmoe"

    n_kv_heads: int = 4
    fused: bool = False

    def own_config(self) -> dict[str, Any]:
        # the epsilon of llama.cpp's converter
        return {
            "attention_bias": False,
            "clip_qkv": None,
            "norm_topk_prob": False,
            "rms_norm_eps": 1e-5,
        }

    def attention(self, random: Random) -> Tensors:
        return {
            **super().attention(random),
            "self_attn.q_norm.weight": norm(random, self.n_heads * self.head_width),
            "self_attn.k_norm.weight": norm(random, self.n_kv_heads * self.head_width),
        }

    def feed_forward(self, random: Random, layer: int) -> Tensors:
        names = ("gate_proj", "up_proj", "down_proj")
        experts = experts_apart(random, self, "mlp.experts", names)
        if self.fused:
            experts = fused(experts, "mlp.experts.gate_up_proj", "mlp.experts.down_proj")
        return {"mlp.gate.weight": random.normal(0.3, self.n_experts, self.hidden), **experts}


TINY = TinyOlmoe()
LAYOUTS: dict[str, dict[str, Any]] = {
    "OlmoeForCausalLM": {
        "published": TINY,
        "3D": replace(TINY, fused=True),
        "with a size of heads": replace(TINY, head_dim=16, n_layers=1),
    },
}

_NOT_EQUAL = Refused((2, 8))  # one of these cannot change alone
ROWS: dict[str, Row] = {
    **{name: row for name, row in TEXT.items() if name != "moe_intermediate_size"},
    "rms_norm_eps": Read(2e-6),
    "intermediate_size": Read(128),
    "num_attention_heads": _NOT_EQUAL,
    "num_key_value_heads": _NOT_EQUAL,
    "norm_topk_prob": Refused((True, None)),
    "clip_qkv": Refused((8.0, 0)),
    "router_aux_loss_coef": Carried(0.5),
}
FIELDS: dict[Any, tuple[dict[str, Row], Any, Any]] = {OlmoeConfig: (ROWS, TINY, Olmoe)}

_POOL = {**COMMON, "clip_qkv": st.sampled_from([None, None, 0, 8.0, -1.0, "8"])}


@st.composite
def olmoe(draw: st.DrawFn) -> Drawn:
    sizes = draw(drawn_sizes(more_heads=False, heads=False))
    tied = draw(st.sampled_from([False, False, True]))
    tiny = TinyOlmoe(**{**sizes, "tied": tied}, fused=draw(st.booleans()))
    text = dict(draw(changes_of(_POOL, 2)))
    if draw(st.booleans()):
        text |= draw(rope_changes())
    return Drawn(tiny, draw(HEADS), tuple(text.items()), ())


CONFIGS = (olmoe(),)
