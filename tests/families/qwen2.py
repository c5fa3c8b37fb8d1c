"""Qwen2-MoE."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from hypothesis import strategies as st
from transformers import Qwen2MoeConfig

from reap2gguf.models.qwen2_moe import Qwen2Moe
from tests.models.config_rows import TEXT, Carried, Elsewhere, Read, Refused, Row
from tests.models.drawn import COMMON, FLAGS, HEADS, NUMBERS, Drawn, changes_of, rope_changes
from tests.tiny_full_attention import (
    Random,
    Tensors,
    TinyFullAttention,
    drawn_sizes,
    experts_apart,
    fused,
    swiglu,
)


@dataclass(frozen=True)
class TinyQwen2Moe(TinyFullAttention):
    """Biases in the attention, and a shared expert beside the others."""

    architecture: ClassVar[str] = "Qwen2MoeForCausalLM"
    model_type: ClassVar[str] = "qwen2_moe"
    width_key: ClassVar[str] = "moe_intermediate_size"

    shared_width: int = 160
    dense_width: int = 224
    dense_layers: tuple[int, ...] = ()
    fused: bool = False
    biases: bool | None = None  # None: there are, as without the key

    def own_config(self) -> dict[str, Any]:
        return {
            "decoder_sparse_step": 1,
            "intermediate_size": self.dense_width,
            "max_window_layers": 21,
            "mlp_only_layers": list(self.dense_layers),
            "norm_topk_prob": False,
            "shared_expert_intermediate_size": self.shared_width,
            "sliding_window": 32768,
            "use_sliding_window": False,
            **({} if self.biases is None else {"qkv_bias": self.biases}),
        }

    def attention(self, random: Random) -> Tensors:
        found = super().attention(random)
        if self.biases is not False:
            sizes = {name: found[f"self_attn.{name}_proj.weight"].shape[0] for name in "qkv"}
            found |= {f"self_attn.{n}_proj.bias": random.normal(0.5, s) for n, s in sizes.items()}
        return found

    def feed_forward(self, random: Random, layer: int) -> Tensors:
        if layer in self.dense_layers:
            return swiglu(random, self, "mlp", self.dense_width)
        names = ("gate_proj", "up_proj", "down_proj")
        experts = experts_apart(random, self, "mlp.experts", names)
        if self.fused:
            experts = fused(experts, "mlp.experts.gate_up_proj", "mlp.experts.down_proj")
        return {
            "mlp.gate.weight": random.normal(0.3, self.n_experts, self.hidden),
            **experts,
            "mlp.shared_expert_gate.weight": random.matrix(1, self.hidden),
            **swiglu(random, self, "mlp.shared_expert", self.shared_width),
        }


TINY = TinyQwen2Moe()
LAYOUTS: dict[str, dict[str, Any]] = {
    "Qwen2MoeForCausalLM": {
        "published": TINY,
        "3D": replace(TINY, fused=True),
        "without biases": replace(TINY, biases=False),
        "dense": replace(TINY, n_layers=3, dense_layers=(1,), biases=True, head_dim=16),
    },
}

ROWS: dict[str, Row] = {
    **TEXT,
    "intermediate_size": Read(128),
    "use_sliding_window": Refused((True, None)),
    "sliding_window": Carried(16),  # without use_sliding_window
    "max_window_layers": Carried(1),
    "layer_types": Refused((["full_attention", "sliding_attention"],)),
    "decoder_sparse_step": Read(2),
    "shared_expert_intermediate_size": Read(64),
    "norm_topk_prob": Refused((True, None)),
    "mlp_only_layers": Read([1], may_be_null=True),
    "qkv_bias": Elsewhere("test_qwen2_moe.py"),
}
FIELDS: dict[Any, tuple[dict[str, Row], Any, Any]] = {Qwen2MoeConfig: (ROWS, TINY, Qwen2Moe)}

_POOL = {
    **COMMON,
    "qkv_bias": FLAGS,
    "shared_expert_intermediate_size": NUMBERS,
    "max_window_layers": NUMBERS,
}


@st.composite
def qwen2(draw: st.DrawFn) -> Drawn:
    tiny = TinyQwen2Moe(
        **{**draw(drawn_sizes(heads=False)), "tied": draw(st.sampled_from([False, False, True]))},
        shared_width=draw(st.sampled_from([8, 40, 64])),
        dense_layers=draw(st.sampled_from([(), (), (), (0,)])),
        fused=draw(st.booleans()),
        biases=draw(st.sampled_from([None, True, False])),
    )
    text = dict(draw(changes_of(_POOL, 2)))
    if draw(st.booleans()):
        text |= draw(rope_changes())
    return Drawn(tiny, draw(HEADS), tuple(text.items()), ())


CONFIGS = (qwen2(),)
