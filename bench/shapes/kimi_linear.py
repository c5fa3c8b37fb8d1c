"""Kimi-Linear at full size: 20 layers of Kimi Delta Attention, 7 of latent attention."""

from __future__ import annotations

from shapes.common import Shapes, norms
from shapes.deepseek2 import attention

KIMI_LINEAR = {
    "architectures": ["KimiLinearForCausalLM"], "model_type": "kimi_linear",
    "first_k_dense_replace": 1, "head_dim": 72, "hidden_act": "silu", "hidden_size": 2304,
    "intermediate_size": 9216, "kv_lora_rank": 512,
    "linear_attn_config": {
        "full_attn_layers": [4, 8, 12, 16, 20, 24, 27], "head_dim": 128,
        "kda_layers": [1, 2, 3, 5, 6, 7, 9, 10, 11, 13, 14, 15, 17, 18, 19, 21, 22, 23, 25, 26],
        "num_heads": 32, "short_conv_kernel_size": 4,
    },
    "mla_use_nope": True, "model_max_length": 1048576, "moe_intermediate_size": 1024,
    "moe_layer_freq": 1, "moe_renormalize": True, "moe_router_activation_func": "sigmoid",
    "num_attention_heads": 32, "num_expert_group": 1, "num_experts": 256,
    "num_experts_per_token": 8, "num_hidden_layers": 27, "num_key_value_heads": 32,
    "num_nextn_predict_layers": 0, "num_shared_experts": 1, "pad_token_id": 163839,
    "q_lora_rank": None, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-05,
    "rope_scaling": None, "rope_theta": 10000.0, "routed_scaling_factor": 2.446,
    "tie_word_embeddings": False, "topk_group": 1, "use_grouped_topk": True, "v_head_dim": 128,
    "vocab_size": 163840,
}  # fmt: skip


def delta_attention(prefix: str, config: dict) -> Shapes:
    linear, hidden = config["linear_attn_config"], config["hidden_size"]
    heads, head = linear["num_heads"], linear["head_dim"]
    for name in "qkv":
        yield f"{prefix}{name}_proj.weight", (heads * head, hidden)
        kernel = linear["short_conv_kernel_size"]
        yield f"{prefix}{name}_conv1d.weight", (heads * head, 1, kernel)
    for name in "fg":
        yield f"{prefix}{name}_a_proj.weight", (head, hidden)
        yield f"{prefix}{name}_b_proj.weight", (heads * head, head)
    yield f"{prefix}A_log", (1, 1, heads, 1)
    yield f"{prefix}dt_bias", (heads * head,)
    yield f"{prefix}b_proj.weight", (heads, hidden)
    yield f"{prefix}o_norm.weight", (head,)
    yield f"{prefix}o_proj.weight", (hidden, heads * head)


def ffn(prefix: str, hidden: int, width: int, names: str) -> Shapes:
    gate, up, down = names.split()
    yield f"{prefix}{gate}.weight", (width, hidden)
    yield f"{prefix}{up}.weight", (width, hidden)
    yield f"{prefix}{down}.weight", (hidden, width)


def model(config: dict) -> Shapes:
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    width, count = config["moe_intermediate_size"], config["num_experts"]
    yield "model.embed_tokens.weight", (vocab, hidden)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (vocab, hidden)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        yield from norms(prefix, hidden)
        full = layer + 1 in config["linear_attn_config"]["full_attn_layers"]
        yield from (attention if full else delta_attention)(f"{prefix}self_attn.", config)
        apart = "gate_proj up_proj down_proj"
        if layer < config["first_k_dense_replace"]:
            yield from ffn(f"{prefix}mlp.", hidden, config["intermediate_size"], apart)
            continue
        moe = f"{prefix}block_sparse_moe."
        yield f"{moe}gate.weight", (count, hidden)
        yield f"{moe}gate.e_score_correction_bias", (count,)
        yield from ffn(f"{moe}shared_experts.", hidden, config["num_shared_experts"] * width, apart)
        for expert in range(count):
            yield from ffn(f"{moe}experts.{expert}.", hidden, width, "w1 w3 w2")


SHAPES = {"kimi-linear-48b-a3b": (KIMI_LINEAR, model)}
