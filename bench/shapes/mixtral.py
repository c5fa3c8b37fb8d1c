"""Mixtral at full size."""

from __future__ import annotations

from shapes.common import Shapes, ends, norms, plain_attention

COMMON = {
    "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "hidden_act": "silu",
    "num_experts_per_tok": 2, "num_key_value_heads": 8, "num_local_experts": 8,
    "rms_norm_eps": 1e-5, "rope_theta": 1000000.0, "sliding_window": None,
    "tie_word_embeddings": False, "vocab_size": 32000,
}  # fmt: skip
MIXTRAL_8X7B = {
    **COMMON, "hidden_size": 4096, "intermediate_size": 14336, "max_position_embeddings": 32768,
    "num_attention_heads": 32, "num_hidden_layers": 32,
}  # fmt: skip
MIXTRAL_8X22B = {
    **COMMON, "hidden_size": 6144, "intermediate_size": 16384, "max_position_embeddings": 65536,
    "num_attention_heads": 48, "num_hidden_layers": 56,
}  # fmt: skip


def mixtral(config: dict) -> Shapes:
    hidden, width = config["hidden_size"], config["intermediate_size"]
    yield from ends(config)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        moe = f"{prefix}block_sparse_moe."
        yield from norms(prefix, hidden)
        yield from plain_attention(prefix, config)
        yield f"{moe}gate.weight", (config["num_local_experts"], hidden)
        for expert in range(config["num_local_experts"]):
            yield f"{moe}experts.{expert}.w1.weight", (width, hidden)
            yield f"{moe}experts.{expert}.w2.weight", (hidden, width)
            yield f"{moe}experts.{expert}.w3.weight", (width, hidden)


SHAPES = {"mixtral-8x7b": (MIXTRAL_8X7B, mixtral), "mixtral-8x22b": (MIXTRAL_8X22B, mixtral)}
