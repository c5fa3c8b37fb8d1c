"""Qwen3-Next at full size: 76,000 tensors, since each matrix of an expert is one of its own."""

from __future__ import annotations

from shapes.common import Shapes, attention, experts, norms, shared_expert

NEXT_80B = {
    "architectures": ["Qwen3NextForCausalLM"], "model_type": "qwen3_next", "attention_bias": False,
    "decoder_sparse_step": 1, "full_attention_interval": 4, "head_dim": 256, "hidden_act": "silu",
    "hidden_size": 2048, "intermediate_size": 5120, "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128, "linear_num_key_heads": 16, "linear_num_value_heads": 32,
    "linear_value_head_dim": 128, "max_position_embeddings": 262144, "mlp_only_layers": [],
    "moe_intermediate_size": 512, "norm_topk_prob": True, "num_attention_heads": 16,
    "num_experts": 512, "num_experts_per_tok": 10, "num_hidden_layers": 48,
    "num_key_value_heads": 2, "partial_rotary_factor": 0.25, "rms_norm_eps": 1e-6,
    "rope_scaling": None, "rope_theta": 10000000, "shared_expert_intermediate_size": 512,
    "tie_word_embeddings": False, "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip
# not known here: its rope_theta, and whether its MTP block is published
CODER_NEXT = {**NEXT_80B, "rope_theta": 5000000}


def deltanet(prefix: str, config: dict) -> Shapes:
    hidden, heads = config["hidden_size"], config["linear_num_value_heads"]
    keys = config["linear_num_key_heads"] * config["linear_key_head_dim"]
    values = heads * config["linear_value_head_dim"]
    mixed = 2 * keys + values
    yield f"{prefix}linear_attn.in_proj_qkvz.weight", (mixed + values, hidden)
    yield f"{prefix}linear_attn.in_proj_ba.weight", (2 * heads, hidden)
    yield f"{prefix}linear_attn.conv1d.weight", (mixed, 1, config["linear_conv_kernel_dim"])
    yield f"{prefix}linear_attn.A_log", (heads,)
    yield f"{prefix}linear_attn.dt_bias", (heads,)
    yield f"{prefix}linear_attn.norm.weight", (config["linear_value_head_dim"],)
    yield f"{prefix}linear_attn.out_proj.weight", (hidden, values)


def trunk(config: dict) -> Shapes:
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    yield "model.embed_tokens.weight", (vocab, hidden)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (vocab, hidden)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        full = (layer + 1) % config["full_attention_interval"] == 0
        yield from norms(prefix, hidden)
        yield from attention(prefix, config, 2) if full else deltanet(prefix, config)
        yield from experts(prefix, config, fused=False)
        yield from shared_expert(prefix, config)


def with_mtp(config: dict) -> Shapes:
    yield from trunk(config)
    hidden, prefix = config["hidden_size"], "mtp.layers.0."
    yield "mtp.fc.weight", (hidden, 2 * hidden)
    for name in ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden"):
        yield f"mtp.{name}.weight", (hidden,)
    yield from norms(prefix, hidden)
    yield from attention(prefix, config, 2)
    yield from experts(prefix, config, fused=False)
    yield from shared_expert(prefix, config)


SHAPES = {
    "qwen3-next-80b-a3b": (NEXT_80B, with_mtp),
    "qwen3-coder-next": (CODER_NEXT, trunk),
}
