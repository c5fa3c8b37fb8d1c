"""Qwen2-MoE at full size."""

from __future__ import annotations

from shapes.common import Shapes, ends, experts, norms, plain_attention, shared_expert

COMMON = {
    "architectures": ["Qwen2MoeForCausalLM"], "model_type": "qwen2_moe", "decoder_sparse_step": 1,
    "hidden_act": "silu", "norm_topk_prob": False, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0,
    "tie_word_embeddings": False, "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip
QWEN15_MOE = {
    **COMMON, "hidden_size": 2048, "intermediate_size": 5632, "max_position_embeddings": 8192,
    "max_window_layers": 21, "moe_intermediate_size": 1408, "num_attention_heads": 16,
    "num_experts": 60, "num_experts_per_tok": 4, "num_hidden_layers": 24,
    "num_key_value_heads": 16, "shared_expert_intermediate_size": 5632, "sliding_window": 32768,
}  # fmt: skip
QWEN2_57B = {
    **COMMON, "hidden_size": 3584, "intermediate_size": 18944, "max_position_embeddings": 131072,
    "max_window_layers": 28, "moe_intermediate_size": 2560, "num_attention_heads": 28,
    "num_experts": 64, "num_experts_per_tok": 8, "num_hidden_layers": 28, "num_key_value_heads": 4,
    "shared_expert_intermediate_size": 20480, "sliding_window": 131072,
}  # fmt: skip


def qwen2(config: dict) -> Shapes:
    hidden = config["hidden_size"]
    key = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    yield from ends(config)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        yield from norms(prefix, hidden)
        yield from plain_attention(prefix, config)
        for name, size in (("q", hidden), ("k", key), ("v", key)):
            yield f"{prefix}self_attn.{name}_proj.bias", (size,)
        yield from experts(prefix, config, fused=False)
        yield from shared_expert(prefix, config)


SHAPES = {"qwen1.5-moe-a2.7b": (QWEN15_MOE, qwen2), "qwen2-57b-a14b": (QWEN2_57B, qwen2)}
