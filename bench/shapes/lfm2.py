"""LFM2-MoE at full size."""

from __future__ import annotations

from shapes.common import Shapes

CONV, FULL = "conv", "full_attention"
LFM2_8B = {
    "architectures": ["Lfm2MoeForCausalLM"], "model_type": "lfm2_moe", "conv_L_cache": 3,
    "conv_bias": False, "hidden_size": 2048, "intermediate_size": 7168,
    "layer_types": [FULL if layer in (2, 6, 10, 14, 18, 21) else CONV for layer in range(24)],
    "max_position_embeddings": 128000, "moe_intermediate_size": 1792, "norm_eps": 1e-5,
    "norm_topk_prob": True, "num_attention_heads": 32, "num_dense_layers": 2, "num_experts": 32,
    "num_experts_per_tok": 4, "num_hidden_layers": 24, "num_key_value_heads": 8,
    "rope_theta": 1000000.0, "routed_scaling_factor": 1.0, "tie_word_embeddings": True,
    "use_expert_bias": True, "vocab_size": 65536,
}  # fmt: skip
# Sizes as in its announcement: 30 convolutions, 10 layers with attention, 64 experts of 1536. Which
# layers these are, and the width of the two dense ones, are not stated there.
LFM2_24B = LFM2_8B | {
    "layer_types": [FULL if layer % 4 == 2 else CONV for layer in range(40)],
    "moe_intermediate_size": 1536, "num_experts": 64, "num_hidden_layers": 40,
}  # fmt: skip


def lfm2(config: dict) -> Shapes:
    hidden, head = config["hidden_size"], config["hidden_size"] // config["num_attention_heads"]
    yield "model.embed_tokens.weight", (config["vocab_size"], hidden)
    yield "model.embedding_norm.weight", (hidden,)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        yield f"{prefix}operator_norm.weight", (hidden,)
        yield f"{prefix}ffn_norm.weight", (hidden,)
        if config["layer_types"][layer] == CONV:
            yield f"{prefix}conv.conv.weight", (hidden, 1, config["conv_L_cache"])
            yield f"{prefix}conv.in_proj.weight", (3 * hidden, hidden)
            yield f"{prefix}conv.out_proj.weight", (hidden, hidden)
        else:
            keys = config["num_key_value_heads"] * head
            for name, rows in (("q", hidden), ("k", keys), ("v", keys), ("out", hidden)):
                yield f"{prefix}self_attn.{name}_proj.weight", (rows, hidden)
            yield f"{prefix}self_attn.q_layernorm.weight", (head,)
            yield f"{prefix}self_attn.k_layernorm.weight", (head,)
        mlp = f"{prefix}feed_forward."
        if layer < config["num_dense_layers"]:
            yield from ffn(mlp, hidden, config["intermediate_size"])
            continue
        yield f"{mlp}gate.weight", (config["num_experts"], hidden)
        yield f"{mlp}expert_bias", (config["num_experts"],)
        for expert in range(config["num_experts"]):
            yield from ffn(f"{mlp}experts.{expert}.", hidden, config["moe_intermediate_size"])


def ffn(prefix: str, hidden: int, width: int) -> Shapes:
    yield f"{prefix}w1.weight", (width, hidden)
    yield f"{prefix}w2.weight", (hidden, width)
    yield f"{prefix}w3.weight", (width, hidden)


SHAPES = {"lfm2-8b-a1b": (LFM2_8B, lfm2), "lfm2-24b-a2b": (LFM2_24B, lfm2)}
