"""Qwen3-MoE and Qwen3.5-MoE (with Qwen3.6, which is the same) at full size."""

from __future__ import annotations

from shapes.common import Shapes, attention, experts, norms, shared_expert

QWEN3_30B = {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "attention_bias": False,
    "decoder_sparse_step": 1, "head_dim": 128, "hidden_act": "silu", "hidden_size": 2048,
    "intermediate_size": 6144, "max_position_embeddings": 40960, "mlp_only_layers": [],
    "moe_intermediate_size": 768, "norm_topk_prob": True, "num_attention_heads": 32,
    "num_experts": 128, "num_experts_per_tok": 8, "num_hidden_layers": 48,
    "num_key_value_heads": 4, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0,
    "tie_word_embeddings": False, "vocab_size": 151936,
}  # fmt: skip
QWEN35_TEXT = {
    "model_type": "qwen3_5_moe_text", "attention_bias": False, "attn_output_gate": True,
    "full_attention_interval": 4, "head_dim": 256, "hidden_act": "silu", "hidden_size": 2048,
    "linear_conv_kernel_dim": 4, "linear_key_head_dim": 128, "linear_num_key_heads": 16,
    "linear_num_value_heads": 32, "linear_value_head_dim": 128, "max_position_embeddings": 262144,
    "moe_intermediate_size": 512, "mtp_num_hidden_layers": 1, "num_attention_heads": 16,
    "num_experts": 256, "num_experts_per_tok": 8, "num_hidden_layers": 40,
    "num_key_value_heads": 2, "rms_norm_eps": 1e-6, "shared_expert_intermediate_size": 512,
    "vocab_size": 248320, "rope_parameters": {
        "mrope_section": [11, 11, 10], "partial_rotary_factor": 0.25, "rope_theta": 10000000,
        "rope_type": "default",
    },
}  # fmt: skip
QWEN35_VISION = {
    "depth": 27, "hidden_size": 1152, "hidden_act": "gelu_pytorch_tanh", "intermediate_size": 4304,
    "num_heads": 16, "in_channels": 3, "patch_size": 16, "spatial_merge_size": 2,
    "temporal_patch_size": 2, "out_hidden_size": 2048, "num_position_embeddings": 2304,
    "deepstack_visual_indexes": [],
}  # fmt: skip
QWEN35_35B = {
    "architectures": ["Qwen3_5MoeForConditionalGeneration"], "model_type": "qwen3_5_moe",
    "tie_word_embeddings": False, "text_config": QWEN35_TEXT, "vision_config": QWEN35_VISION,
}  # fmt: skip


def qwen35_like(hidden: int, **text: int) -> dict:
    """The config of a larger model of the family, with other sizes than Qwen3.5-35B-A3B."""
    return {
        **QWEN35_35B,
        "text_config": {**QWEN35_TEXT, "hidden_size": hidden, **text},
        "vision_config": {**QWEN35_VISION, "out_hidden_size": hidden},
    }


# The text models have the sizes that their model cards state. Those of the towers are not known
# here, and taken from Qwen3.5-35B-A3B.
QWEN35_122B = qwen35_like(
    3072,
    linear_num_value_heads=64,
    moe_intermediate_size=1024,
    num_attention_heads=32,
    num_hidden_layers=48,
    shared_expert_intermediate_size=1024,
)
QWEN35_397B = qwen35_like(
    4096,
    linear_num_value_heads=64,
    moe_intermediate_size=1024,
    num_attention_heads=32,
    num_experts=512,
    num_experts_per_tok=10,
    num_hidden_layers=60,
    shared_expert_intermediate_size=1024,
)


def qwen3(config: dict) -> Shapes:
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    yield "model.embed_tokens.weight", (vocab, hidden)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (vocab, hidden)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        yield from norms(prefix, hidden)
        yield from attention(prefix, config, 1)
        yield from experts(prefix, config, fused=False)


def deltanet(prefix: str, config: dict) -> Shapes:
    hidden, heads = config["hidden_size"], config["linear_num_value_heads"]
    keys = config["linear_num_key_heads"] * config["linear_key_head_dim"]
    values = heads * config["linear_value_head_dim"]
    mixed = 2 * keys + values
    yield f"{prefix}linear_attn.in_proj_qkv.weight", (mixed, hidden)
    yield f"{prefix}linear_attn.in_proj_z.weight", (values, hidden)
    yield f"{prefix}linear_attn.in_proj_a.weight", (heads, hidden)
    yield f"{prefix}linear_attn.in_proj_b.weight", (heads, hidden)
    yield f"{prefix}linear_attn.conv1d.weight", (mixed, 1, config["linear_conv_kernel_dim"])
    yield f"{prefix}linear_attn.A_log", (heads,)
    yield f"{prefix}linear_attn.dt_bias", (heads,)
    yield f"{prefix}linear_attn.norm.weight", (config["linear_value_head_dim"],)
    yield f"{prefix}linear_attn.out_proj.weight", (hidden, values)


def vision(config: dict) -> Shapes:
    hidden, ffn = config["hidden_size"], config["intermediate_size"]
    merged = hidden * config["spatial_merge_size"] ** 2
    patch = (hidden, 3, 2, config["patch_size"], config["patch_size"])
    pairs = [("patch_embed.proj", patch), ("merger.norm", (hidden,))]
    pairs += [("merger.linear_fc1", (merged, merged))]
    pairs += [("merger.linear_fc2", (config["out_hidden_size"], merged))]
    for number in range(len(config["deepstack_visual_indexes"])):
        at = f"deepstack_merger_list.{number}."
        pairs += [(f"{at}norm", (merged,)), (f"{at}linear_fc1", (merged, merged))]
        pairs += [(f"{at}linear_fc2", (config["out_hidden_size"], merged))]
    for block in range(config["depth"]):
        at = f"blocks.{block}."
        pairs += [(f"{at}norm1", (hidden,)), (f"{at}norm2", (hidden,))]
        pairs += [(f"{at}attn.qkv", (3 * hidden, hidden)), (f"{at}attn.proj", (hidden, hidden))]
        pairs += [(f"{at}mlp.linear_fc1", (ffn, hidden)), (f"{at}mlp.linear_fc2", (hidden, ffn))]
    for name, shape in pairs:
        yield f"model.visual.{name}.weight", shape
        yield f"model.visual.{name}.bias", shape[:1]
    yield "model.visual.pos_embed.weight", (config["num_position_embeddings"], hidden)


def qwen35(config: dict) -> Shapes:
    text = config["text_config"]
    hidden, vocab = text["hidden_size"], text["vocab_size"]
    yield "model.language_model.embed_tokens.weight", (vocab, hidden)
    yield "model.language_model.norm.weight", (hidden,)
    yield "lm_head.weight", (vocab, hidden)
    for layer in range(text["num_hidden_layers"]):
        prefix = f"model.language_model.layers.{layer}."
        full = (layer + 1) % text["full_attention_interval"] == 0
        yield from norms(prefix, hidden)
        yield from attention(prefix, text, 2) if full else deltanet(prefix, text)
        yield from experts(prefix, text, fused=True)
        yield from shared_expert(prefix, text)
    yield "mtp.fc.weight", (hidden, 2 * hidden)
    for name in ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden"):
        yield f"mtp.{name}.weight", (hidden,)
    prefix = "mtp.layers.0."
    yield from norms(prefix, hidden)
    yield from attention(prefix, text, 2)
    yield from experts(prefix, text, fused=False)
    yield from shared_expert(prefix, text)
    yield from vision(config["vision_config"])


SHAPES = {
    "qwen3-30b-a3b": (QWEN3_30B, qwen3),
    "qwen3.5-35b-a3b": (QWEN35_35B, qwen35),
    "qwen3.5-122b-a10b": (QWEN35_122B, qwen35),
    "qwen3.5-397b-a17b": (QWEN35_397B, qwen35),
    "qwen3.6-35b-a3b": (QWEN35_35B, qwen35),  # the same sizes
}
