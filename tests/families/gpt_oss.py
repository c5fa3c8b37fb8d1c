"""gpt-oss, in BF16; tests/quantized.py makes MXFP4 of it, as published."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from hypothesis import strategies as st
from transformers import GptOssConfig

from reap2gguf.models.gpt_oss import GptOss
from tests.models.config_rows import TEXT, Elsewhere, Read, Refused, Row
from tests.models.drawn import COMMON, HEADS, Drawn, changes_of, rope_changes
from tests.tiny_full_attention import Random, Tensors, TinyFullAttention, drawn_sizes

# YaRN whose range begins and ends at whole dimensions, as near as a whole length allows: here it
# makes no difference that llama.cpp rounds them, and transformers does not
THETA = 1024.0
YARN = {
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "factor": 4.0,
    "original_max_position_embeddings": 201,
    "rope_type": "yarn",
    "truncate": False,
}


@dataclass(frozen=True)
class TinyGptOss(TinyFullAttention):
    """Biases that change which experts are chosen, and that reach the limits of the activation."""

    architecture: ClassVar[str] = "GptOssForCausalLM"
    model_type: ClassVar[str] = "gpt_oss"
    count_key: ClassVar[str] = "num_local_experts"

    n_layers: int = 3
    head_dim: int | None = 16
    window: int = 16
    nested_rope: bool = False  # as transformers saves it

    def own_config(self) -> dict[str, Any]:
        rope = {"rope_theta": THETA, "rope_scaling": YARN}
        if self.nested_rope:
            rope = {"rope_parameters": {**YARN, "rope_theta": THETA}}
        kinds = ("sliding_attention", "full_attention")
        return {
            **rope,
            "attention_bias": True,
            "experts_per_token": self.top_k,
            "initial_context_length": 201,
            "layer_types": [kinds[layer % 2] for layer in range(self.n_layers)],
            "rms_norm_eps": 1e-5,
            "sliding_window": self.window,
            "swiglu_limit": 7.0,
        }

    def config(self) -> dict[str, Any]:
        found = super().config()
        if self.nested_rope:
            del found["rope_theta"]
        return found

    def attention(self, random: Random) -> Tensors:
        query, key = self.n_heads * self.head_width, self.n_kv_heads * self.head_width
        return {
            **super().attention(random),
            "self_attn.q_proj.bias": random.normal(0.5, query),
            "self_attn.k_proj.bias": random.normal(0.5, key),
            "self_attn.v_proj.bias": random.normal(0.2, key),
            "self_attn.o_proj.bias": random.normal(0.1, self.hidden),
            "self_attn.sinks": random.normal(1.5, self.n_heads),
        }

    def feed_forward(self, random: Random, layer: int) -> Tensors:
        count, hidden, width = self.n_experts, self.hidden, self.width
        gate_up = random.matrix(count, 2 * width, hidden)  # rows of gate and up in turn
        down = random.output(count, hidden, width)
        return {
            "mlp.router.weight": random.normal(0.3, count, hidden),
            "mlp.router.bias": random.normal(0.5, count),
            "mlp.experts.gate_up_proj": gate_up.mT.contiguous(),
            "mlp.experts.gate_up_proj_bias": random.normal(4, count, 2 * width),
            "mlp.experts.down_proj": down.mT.contiguous(),
            "mlp.experts.down_proj_bias": random.normal(0.3, count, hidden),
        }


TINY = TinyGptOss()
LAYOUTS: dict[str, dict[str, Any]] = {
    "GptOssForCausalLM": {
        "published in BF16": TINY,
        "saved again, in F32": replace(TINY, nested_rope=True, n_layers=2, dtype=torch.float32),
    },
}

ROWS: dict[str, Row] = {
    **{k: row for k, row in TEXT.items() if k not in ("moe_intermediate_size", "num_experts")},
    "num_local_experts": Read(16),
    "intermediate_size": Read(128),
    "num_attention_heads": Read(8),
    "num_hidden_layers": Elsewhere("test_gpt_oss.py"),
    "head_dim": Read(32),
    "rms_norm_eps": Read(1e-6),
    "attention_bias": Refused((False, None, 1)),
    "sliding_window": Read(24),
    "swiglu_alpha": Refused((1.0, 2, None)),
    "swiglu_limit": Refused((0.0, 10.0, None)),
    "layer_types": Refused((["full_attention"] * 3, ["sliding_attention"], "full_attention")),
    "tie_word_embeddings": Elsewhere("test_gpt_oss.py"),
}
FIELDS: dict[Any, tuple[dict[str, Row], Any, Any]] = {GptOssConfig: (ROWS, TINY, GptOss)}

_POOL = {
    **COMMON,
    "swiglu_alpha": st.sampled_from([None, 1.702, 1.0, "1"]),
    "swiglu_limit": st.sampled_from([None, 7.0, 7, 0.0, "7"]),
    "layer_types": st.sampled_from([None, [], ["full_attention"] * 2, ["sliding_attention"] * 2,
                                    ["sliding_attention", "full_attention"]]),
}  # fmt: skip


def _rounded(changes: dict[str, Any]) -> dict[str, Any]:
    """Without fractions of dimensions, which llama.cpp rounds and transformers does not."""
    for key in ("rope_scaling", "rope_parameters"):
        settings = changes.get(key)
        if isinstance(settings, dict) and settings.get("truncate") is False:
            changes[key] = {**settings, "truncate": True}
    return changes


@st.composite
def gpt_oss(draw: st.DrawFn) -> Drawn:
    sizes = {**draw(drawn_sizes()), "tied": draw(st.sampled_from([False, False, True]))}
    sizes["head_dim"] = sizes["head_dim"] or 16
    window = draw(st.sampled_from([4, 16, 128]))
    tiny = TinyGptOss(**sizes, window=window, nested_rope=draw(st.booleans()))
    text = dict(draw(changes_of(_POOL, 2)))
    if draw(st.booleans()):
        text |= _rounded(draw(rope_changes()))
    elif sizes["head_dim"] != 16:
        text |= {"rope_scaling": {**YARN, "truncate": True}}
    return Drawn(tiny, draw(HEADS), tuple(text.items()), ())


CONFIGS = (gpt_oss(),)
