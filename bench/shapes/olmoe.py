"""OLMoE at full size."""

from __future__ import annotations

from shapes.common import Shapes, ends, experts, norms, plain_attention

OLMOE_1B_7B = {
    "architectures": ["OlmoeForCausalLM"], "model_type": "olmoe", "attention_bias": False,
    "clip_qkv": None, "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 1024,
    "max_position_embeddings": 4096, "norm_topk_prob": False, "num_attention_heads": 16,
    "num_experts": 64, "num_experts_per_tok": 8, "num_hidden_layers": 16,
    "num_key_value_heads": 16, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    "tie_word_embeddings": False, "vocab_size": 50304,
}  # fmt: skip


def olmoe(config: dict) -> Shapes:
    hidden = config["hidden_size"]
    yield from ends(config)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        yield from norms(prefix, hidden)
        yield from plain_attention(prefix, config)
        yield f"{prefix}self_attn.q_norm.weight", (hidden,)
        yield f"{prefix}self_attn.k_norm.weight", (hidden,)
        yield from experts(prefix, config, fused=False)


SHAPES = {"olmoe-1b-7b": (OLMOE_1B_7B, olmoe)}
