"""MiniMax-M2, M2.1, M2.5 and M2.7 at full size."""

from __future__ import annotations

from shapes.common import Shapes, ends, norms, projections

# Published in FP8, in blocks of 128 by 128; here the weights that these decode to.
MINIMAX_M2 = {
    "architectures": ["MiniMaxM2ForCausalLM"], "model_type": "minimax_m2",
    "attention_dropout": 0.0, "attn_type_list": [1] * 62, "head_dim": 128, "hidden_act": "silu",
    "hidden_size": 3072, "initializer_range": 0.02, "intermediate_size": 1536,
    "max_position_embeddings": 196608, "mtp_transformer_layers": 1, "num_attention_heads": 48,
    "num_experts_per_tok": 8, "num_hidden_layers": 62, "num_key_value_heads": 8,
    "num_local_experts": 256, "num_mtp_modules": 3, "output_router_logits": False,
    "qk_norm_type": "per_layer", "rms_norm_eps": 1e-06, "rope_theta": 5000000, "rotary_dim": 64,
    "router_aux_loss_coef": 0.001, "router_jitter_noise": 0.0, "scoring_func": "sigmoid",
    "shared_intermediate_size": 0, "sliding_window": None, "tie_word_embeddings": False,
    "use_cache": True, "use_mtp": True, "use_qk_norm": True, "use_routing_bias": True,
    "vocab_size": 200064,
}  # fmt: skip
MINIMAX_M27 = MINIMAX_M2 | {"dtype": "bfloat16", "max_position_embeddings": 204800}


def minimax(config: dict) -> Shapes:
    hidden, width, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    query, key = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    yield from ends(config)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        moe = f"{prefix}block_sparse_moe."
        yield from norms(prefix, hidden)
        yield from projections(prefix, hidden, query, key)
        yield f"{prefix}self_attn.q_norm.weight", (query,)
        yield f"{prefix}self_attn.k_norm.weight", (key,)
        yield f"{moe}gate.weight", (config["num_local_experts"], hidden)
        yield f"{moe}e_score_correction_bias", (config["num_local_experts"],)
        for expert in range(config["num_local_experts"]):
            yield f"{moe}experts.{expert}.w1.weight", (width, hidden)
            yield f"{moe}experts.{expert}.w2.weight", (hidden, width)
            yield f"{moe}experts.{expert}.w3.weight", (width, hidden)


SHAPES = {"minimax-m2": (MINIMAX_M2, minimax), "minimax-m2.7": (MINIMAX_M27, minimax)}
