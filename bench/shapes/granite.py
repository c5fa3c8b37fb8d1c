"""GraniteMoE at full size."""

from __future__ import annotations

from shapes.common import Shapes, ends, norms, plain_attention

COMMON = {
    "architectures": ["GraniteMoeForCausalLM"], "model_type": "granitemoe",
    "attention_bias": False, "attention_multiplier": 0.015625, "embedding_multiplier": 12.0,
    "hidden_act": "silu", "intermediate_size": 512, "logits_scaling": 6.0,
    "max_position_embeddings": 131072, "num_experts_per_tok": 8, "num_key_value_heads": 8,
    "residual_multiplier": 0.22, "rms_norm_eps": 1e-6, "rope_theta": 1500000.0,
    "tie_word_embeddings": True, "vocab_size": 49155,
}  # fmt: skip
GRANITE_3B = {
    **COMMON, "hidden_size": 1536, "num_attention_heads": 24, "num_hidden_layers": 32,
    "num_local_experts": 40,
}  # fmt: skip
GRANITE_1B = {
    **COMMON, "hidden_size": 1024, "num_attention_heads": 16, "num_hidden_layers": 24,
    "num_local_experts": 32,
}  # fmt: skip


def granite(config: dict) -> Shapes:
    hidden, width = config["hidden_size"], config["intermediate_size"]
    count = config["num_local_experts"]
    yield from ends(config)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        moe = f"{prefix}block_sparse_moe."
        yield from norms(prefix, hidden)
        yield from plain_attention(prefix, config)
        yield f"{moe}router.layer.weight", (count, hidden)
        yield f"{moe}input_linear.weight", (count, 2 * width, hidden)
        yield f"{moe}output_linear.weight", (count, hidden, width)


SHAPES = {
    "granite-3.1-3b-a800m": (GRANITE_3B, granite),
    "granite-3.1-1b-a400m": (GRANITE_1B, granite),
}
