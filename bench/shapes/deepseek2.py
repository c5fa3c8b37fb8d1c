"""GLM-4.7-Flash, DeepSeek-V2-Lite, Moonlight, DeepSeek-V3 and Kimi-K2 at full size, in BF16."""

from __future__ import annotations

from shapes.common import Shapes, norms
from shapes.glm import feed_forward

_COMMON = {
    "attention_bias": False, "attention_dropout": 0.0, "hidden_act": "silu", "kv_lora_rank": 512,
    "initializer_range": 0.02, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True, "n_group": 1,
    "topk_group": 1, "pretraining_tp": 1,
}  # fmt: skip
FLASH = _COMMON | {
    "architectures": ["Glm4MoeLiteForCausalLM"], "model_type": "glm4_moe_lite",
    "first_k_dense_replace": 1, "hidden_size": 2048, "intermediate_size": 10240,
    "max_position_embeddings": 202752, "moe_intermediate_size": 1536, "n_routed_experts": 64,
    "n_shared_experts": 1, "norm_topk_prob": True, "num_attention_heads": 20,
    "num_experts_per_tok": 4, "num_hidden_layers": 47, "num_key_value_heads": 20,
    "num_nextn_predict_layers": 1, "partial_rotary_factor": 1.0, "q_lora_rank": 768,
    "qk_nope_head_dim": 192, "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 1000000,
    "routed_scaling_factor": 1.8, "topk_method": "noaux_tc", "v_head_dim": 256,
    "vocab_size": 154880,
}  # fmt: skip
_YARN = {
    "beta_fast": 32, "beta_slow": 1, "factor": 40, "original_max_position_embeddings": 4096,
    "type": "yarn",
}  # fmt: skip
V2_LITE = _COMMON | {
    "architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2",
    "first_k_dense_replace": 1, "hidden_size": 2048, "intermediate_size": 10944,
    "max_position_embeddings": 163840, "moe_intermediate_size": 1408, "moe_layer_freq": 1,
    "n_routed_experts": 64, "n_shared_experts": 2, "norm_topk_prob": False,
    "num_attention_heads": 16, "num_experts_per_tok": 6, "num_hidden_layers": 27,
    "num_key_value_heads": 16, "q_lora_rank": None, "rms_norm_eps": 1e-06,
    "rope_scaling": _YARN | {"mscale": 0.707, "mscale_all_dim": 0.707}, "rope_theta": 10000,
    "routed_scaling_factor": 1.0, "scoring_func": "softmax", "topk_method": "greedy",
    "vocab_size": 102400,
}  # fmt: skip
_V3_CLASS = {
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "moe_layer_freq": 1,
    "norm_topk_prob": True, "scoring_func": "sigmoid", "topk_method": "noaux_tc",
}  # fmt: skip
MOONLIGHT = V2_LITE | _V3_CLASS | {
    "intermediate_size": 11264, "max_position_embeddings": 8192, "num_nextn_predict_layers": 0,
    "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 50000.0,
    "routed_scaling_factor": 2.446, "vocab_size": 163840,
}  # fmt: skip
V3 = _COMMON | _V3_CLASS | {
    "first_k_dense_replace": 3, "hidden_size": 7168, "intermediate_size": 18432,
    "max_position_embeddings": 163840, "moe_intermediate_size": 2048, "n_group": 8,
    "n_routed_experts": 256, "n_shared_experts": 1, "num_attention_heads": 128,
    "num_experts_per_tok": 8, "num_hidden_layers": 61, "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1, "q_lora_rank": 1536, "rms_norm_eps": 1e-06,
    "rope_scaling": _YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}, "rope_theta": 10000,
    "routed_scaling_factor": 2.5, "topk_group": 4, "vocab_size": 129280,
}  # fmt: skip
KIMI_K2 = V3 | {
    "model_type": "kimi_k2", "first_k_dense_replace": 1, "max_position_embeddings": 131072,
    "n_group": 1, "n_routed_experts": 384, "num_attention_heads": 64, "num_key_value_heads": 64,
    "num_nextn_predict_layers": 0,
    "rope_scaling": V3["rope_scaling"] | {"beta_fast": 1.0, "factor": 32.0}, "rope_theta": 50000.0,
    "routed_scaling_factor": 2.827, "topk_group": 1, "vocab_size": 163840,
}  # fmt: skip


def attention(prefix: str, config: dict) -> Shapes:
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    nope, rotated = config["qk_nope_head_dim"], config["qk_rope_head_dim"]
    rank, value, queries = config["kv_lora_rank"], config["v_head_dim"], heads * (nope + rotated)
    if config["q_lora_rank"]:
        yield f"{prefix}q_a_proj.weight", (config["q_lora_rank"], hidden)
        yield f"{prefix}q_a_layernorm.weight", (config["q_lora_rank"],)
        yield f"{prefix}q_b_proj.weight", (queries, config["q_lora_rank"])
    else:
        yield f"{prefix}q_proj.weight", (queries, hidden)
    yield f"{prefix}kv_a_proj_with_mqa.weight", (rank + rotated, hidden)
    yield f"{prefix}kv_a_layernorm.weight", (rank,)
    yield f"{prefix}kv_b_proj.weight", (heads * (nope + value), rank)
    yield f"{prefix}o_proj.weight", (hidden, heads * value)


def layer(prefix: str, config: dict, dense: bool) -> Shapes:
    hidden, width = config["hidden_size"], config["moe_intermediate_size"]
    yield from norms(prefix, hidden)
    yield from attention(f"{prefix}self_attn.", config)
    mlp = f"{prefix}mlp."
    if dense:
        yield from feed_forward(mlp, hidden, config["intermediate_size"])
        return
    yield f"{mlp}gate.weight", (config["n_routed_experts"], hidden)
    if config["topk_method"] == "noaux_tc":
        yield f"{mlp}gate.e_score_correction_bias", (config["n_routed_experts"],)
    yield from feed_forward(f"{mlp}shared_experts.", hidden, config["n_shared_experts"] * width)
    for expert in range(config["n_routed_experts"]):
        yield from feed_forward(f"{mlp}experts.{expert}.", hidden, width)


def model(config: dict) -> Shapes:
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    yield "model.embed_tokens.weight", (vocab, hidden)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (vocab, hidden)
    n_layers = config["num_hidden_layers"]
    for number in range(n_layers):
        dense = number < config["first_k_dense_replace"]
        yield from layer(f"model.layers.{number}.", config, dense)
    if not config.get("num_nextn_predict_layers"):
        return
    prefix = f"model.layers.{n_layers}."
    yield from layer(prefix, config, dense=False)
    yield f"{prefix}eh_proj.weight", (hidden, 2 * hidden)
    for name in ("enorm", "hnorm", "shared_head.norm"):
        yield f"{prefix}{name}.weight", (hidden,)


def with_ends(config: dict) -> Shapes:
    """With an embedding and a head of the MTP block's own."""
    yield from model(config)
    prefix = f"model.layers.{config['num_hidden_layers']}."
    for name in ("embed_tokens", "shared_head.head"):
        yield f"{prefix}{name}.weight", (config["vocab_size"], config["hidden_size"])


SHAPES = {
    "glm-4.7-flash": (FLASH, model),
    "deepseek-v2-lite": (V2_LITE, model),
    "moonlight-16b": (MOONLIGHT, model),
    "deepseek-v3": (V3, with_ends),  # and DeepSeek-R1
    "kimi-k2": (KIMI_K2, model),
}
