"""DeepSeek-V2-Lite, and DeepSeek-V3 with Moonlight and Kimi-K2."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from transformers import DeepseekV2Config, DeepseekV3Config

from reap2gguf.models.deepseek2 import DeepseekV2, DeepseekV3
from tests.families.mla import MLA, TinyMla, drawn_mla
from tests.models.config_rows import Carried, Read, Refused, Row

V2_LITE = TinyMla(
    model_type="deepseek_v2", query_rank=None, n_shared=2, normalises=False, scale=1.0, mtp=False
)
V3 = TinyMla(
    model_type="deepseek_v3", n_experts=16, n_groups=4, groups_per_token=2, top_k=3, scale=2.5
)
MOONLIGHT = TinyMla(model_type="deepseek_v3", query_rank=None, n_shared=2, mtp=False, scale=2.446)
_YARN = (
    ("beta_fast", 1.0), ("beta_slow", 1.0), ("factor", 4.0), ("mscale", 1.0),
    ("mscale_all_dim", 1.0), ("original_max_position_embeddings", 128), ("type", "yarn"),
)  # fmt: skip
KIMI_K2 = replace(MOONLIGHT, model_type="kimi_k2", query_rank=40, n_shared=1, yarn=_YARN)
LAYOUTS: dict[str, dict[str, Any]] = {
    "DeepseekV2ForCausalLM": {
        "V2-Lite": V2_LITE,
        "queries of low rank": replace(V2_LITE, query_rank=40, scale=1.5),
        "3D": replace(V2_LITE, fused=True),
        "groups that greedy ignores": replace(V2_LITE, n_groups=4, groups_per_token=2),
        "tied": replace(V2_LITE, tied=True, n_dense=0),
    },
    "DeepseekV3ForCausalLM": {
        "V3": V3,
        "Moonlight": MOONLIGHT,
        "Kimi-K2": KIMI_K2,
        "3D": replace(V3, fused=True),
        "MTP with its own ends": replace(V3, own_ends=True),
        "without MTP": replace(V3, mtp=False, n_dense=2),
        "one of two groups": replace(V3, n_groups=2, groups_per_token=1),
    },
}
_DENSE: dict[str, Row] = {"first_k_dense_replace": Read(2)}
_V2: dict[str, Row] = {
    **MLA,
    **_DENSE,
    "num_key_value_heads": Refused((2, None)),
    "head_dim": Refused((8, 24)),
    "mlp_bias": Refused((True,)),
    "topk_method": Refused(("group_limited_greedy", None)),
    "norm_topk_prob": Refused((True,)),
    # greedy has no groups
    "n_group": Carried(2),
    "topk_group": Carried(2),
}
_V3: dict[str, Row] = {
    **MLA,
    **_DENSE,
    "num_key_value_heads": Refused((2, None)),
    "norm_topk_prob": Read(False),
    "n_group": Read(2),
    "topk_group": Refused((2, None)),  # of one group
    "rope_interleave": Refused((False, None)),
    "num_mtp_layers": Refused((2, None)),
}
V2_FIELDS = replace(V2_LITE, n_layers=4, n_shared=1, vocab=4096, query_rank=40)
V3_FIELDS = replace(MOONLIGHT, n_layers=4, n_shared=1, vocab=4096, query_rank=40, scale=1.5)
# transformers' class -> its table, a config of it, and the family that reads it
FIELDS: dict[Any, tuple[dict[str, Row], Any, Any]] = {
    DeepseekV2Config: (_V2, V2_FIELDS, DeepseekV2),
    DeepseekV3Config: (_V3, V3_FIELDS, DeepseekV3),
}
# what configs are drawn of
CONFIGS = (drawn_mla("deepseek_v2"), drawn_mla("deepseek_v3"))

# Header keys that differ from those of llama.cpp's converter on purpose, each with the reason.
# llama.cpp has no key for its `beta_fast`, so its logits are others
RECORDED = {"DeepseekV3ForCausalLM": ("Kimi-K2",)}
DIFFERENCES = {
    "DeepseekV2ForCausalLM": {
        "deepseek2.attention.q_lora_rank": "the converter writes none where queries are one "
        "product, and the loader then takes no numbers of layers but 26, 27 and 48",
    },
}
