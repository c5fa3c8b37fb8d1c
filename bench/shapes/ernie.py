"""ERNIE-4.5-21B-A3B and ERNIE-4.5-300B-A47B at full size."""

from __future__ import annotations

from shapes.common import Shapes, ends, norms, plain_attention
from shapes.glm import feed_forward

COMMON = {
    "architectures": ["Ernie4_5_MoeForCausalLM"], "model_type": "ernie4_5_moe",
    "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "max_position_embeddings": 131072,
    "moe_layer_interval": 1, "moe_num_experts": 64, "num_nextn_predict_layers": 1,
    "pad_token_id": 0, "rms_norm_eps": 1e-05, "rope_theta": 500000, "use_bias": False,
    "vocab_size": 103424,
}  # fmt: skip
ERNIE_21B = COMMON | {
    "hidden_size": 2560, "intermediate_size": 12288, "moe_intermediate_size": 1536, "moe_k": 6,
    "moe_layer_end_index": 27, "moe_layer_start_index": 1, "moe_num_shared_experts": 2,
    "num_attention_heads": 20, "num_hidden_layers": 28, "num_key_value_heads": 4,
    "tie_word_embeddings": True,
}  # fmt: skip
ERNIE_300B = COMMON | {
    "hidden_size": 8192, "intermediate_size": 28672, "moe_intermediate_size": 3584, "moe_k": 8,
    "moe_layer_end_index": 53, "moe_layer_start_index": 3, "moe_num_shared_experts": 0,
    "num_attention_heads": 64, "num_hidden_layers": 54, "num_key_value_heads": 8,
    "tie_word_embeddings": False,
}  # fmt: skip


def ernie(config: dict) -> Shapes:
    hidden, width = config["hidden_size"], config["moe_intermediate_size"]
    yield from ends(config)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        mlp = f"{prefix}mlp."
        yield from norms(prefix, hidden)
        yield from plain_attention(prefix, config)
        if layer < config["moe_layer_start_index"]:
            yield from feed_forward(mlp, hidden, config["intermediate_size"])
            continue
        yield f"{mlp}gate.weight", (config["moe_num_experts"], hidden)
        yield f"{mlp}moe_statics.e_score_correction_bias", (1, config["moe_num_experts"])
        for expert in range(config["moe_num_experts"]):
            yield from feed_forward(f"{mlp}experts.{expert}.", hidden, width)
        if n_shared := config["moe_num_shared_experts"]:
            yield from feed_forward(f"{mlp}shared_experts.", hidden, n_shared * width)


SHAPES = {"ernie-4.5-21b-a3b": (ERNIE_21B, ernie), "ernie-4.5-300b-a47b": (ERNIE_300B, ernie)}
