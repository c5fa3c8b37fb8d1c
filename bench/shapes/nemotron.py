"""Nemotron-3 at full size: sizes as their configs and the headers of their weights state them.

Super has 83,800 tensors. Of their config.json, what decides neither weights nor the header of a
GGUF file is left out here.
"""

from __future__ import annotations

from shapes.common import Shapes

NANO_30B = {
    "architectures": ["NemotronHForCausalLM"], "model_type": "nemotron_h", "attention_bias": False,
    "chunk_size": 128, "conv_kernel": 4, "expand": 2, "head_dim": 128, "hidden_size": 2688,
    "hybrid_override_pattern": "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
    "intermediate_size": 1856, "layer_norm_epsilon": 1e-5, "mamba_head_dim": 64,
    "mamba_hidden_act": "silu", "mamba_num_heads": 64, "mamba_proj_bias": False,
    "max_position_embeddings": 262144, "mlp_bias": False, "mlp_hidden_act": "relu2",
    "moe_intermediate_size": 1856, "moe_shared_expert_intermediate_size": 3712, "n_group": 1,
    "n_groups": 8, "n_routed_experts": 128, "n_shared_experts": 1, "norm_eps": 1e-5,
    "norm_topk_prob": True, "num_attention_heads": 32, "num_experts_per_tok": 6,
    "num_hidden_layers": 52, "num_key_value_heads": 2, "partial_rotary_factor": 1.0,
    "rope_theta": 10000, "routed_scaling_factor": 2.5, "sliding_window": None,
    "ssm_state_size": 128, "tie_word_embeddings": False, "time_step_floor": 0.0001,
    "time_step_max": 0.1, "time_step_min": 0.001, "topk_group": 1, "use_bias": False,
    "use_conv_bias": True, "vocab_size": 131072,
}  # fmt: skip
SUPER_120B = {
    **NANO_30B,
    "hidden_size": 4096,
    "hybrid_override_pattern": "MEMEMEM*EMEMEMEM*EMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*"
    "EMEMEMEMEM*EMEMEMEM*EMEMEMEME",
    "intermediate_size": 2688, "mamba_num_heads": 128, "moe_intermediate_size": 2688,
    "moe_latent_size": 1024, "moe_shared_expert_intermediate_size": 5376,
    "mtp_hybrid_override_pattern": "*E", "n_routed_experts": 512, "num_experts_per_tok": 22,
    "num_hidden_layers": 88, "num_nextn_predict_layers": 1, "routed_scaling_factor": 5.0,
}  # fmt: skip


def mamba(prefix: str, config: dict) -> Shapes:
    hidden, heads = config["hidden_size"], config["mamba_num_heads"]
    inner = heads * config["mamba_head_dim"]
    mixed = inner + 2 * config["n_groups"] * config["ssm_state_size"]
    yield f"{prefix}in_proj.weight", (inner + mixed + heads, hidden)
    yield f"{prefix}conv1d.weight", (mixed, 1, config["conv_kernel"])
    yield f"{prefix}conv1d.bias", (mixed,)
    for name in ("dt_bias", "A_log", "D"):
        yield f"{prefix}{name}", (heads,)
    yield f"{prefix}norm.weight", (inner,)
    yield f"{prefix}out_proj.weight", (hidden, inner)


def attention(prefix: str, config: dict) -> Shapes:
    hidden, head = config["hidden_size"], config["head_dim"]
    query, key = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    for name, rows in (("q", query), ("k", key), ("v", key)):
        yield f"{prefix}{name}_proj.weight", (rows, hidden)
    yield f"{prefix}o_proj.weight", (hidden, query)


def experts(prefix: str, config: dict) -> Shapes:
    hidden, width = config["hidden_size"], config["moe_intermediate_size"]
    shared, count = config["moe_shared_expert_intermediate_size"], config["n_routed_experts"]
    entering = config.get("moe_latent_size") or hidden
    yield f"{prefix}gate.weight", (count, hidden)
    yield f"{prefix}gate.e_score_correction_bias", (count,)
    yield f"{prefix}shared_experts.up_proj.weight", (shared, hidden)
    yield f"{prefix}shared_experts.down_proj.weight", (hidden, shared)
    if entering != hidden:
        yield f"{prefix}fc1_latent_proj.weight", (entering, hidden)
        yield f"{prefix}fc2_latent_proj.weight", (hidden, entering)
    for expert in range(count):
        yield f"{prefix}experts.{expert}.up_proj.weight", (width, entering)
        yield f"{prefix}experts.{expert}.down_proj.weight", (entering, width)


MIXERS = {"M": mamba, "*": attention, "E": experts}


def nemotron(config: dict) -> Shapes:
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    yield "backbone.embeddings.weight", (vocab, hidden)
    yield "backbone.norm_f.weight", (hidden,)
    yield "lm_head.weight", (vocab, hidden)
    for layer, letter in enumerate(config["hybrid_override_pattern"]):
        prefix = f"backbone.layers.{layer}."
        yield f"{prefix}norm.weight", (hidden,)
        yield from MIXERS[letter](f"{prefix}mixer.", config)
    for part, letter in enumerate(config.get("mtp_hybrid_override_pattern", "")):
        prefix = f"mtp.layers.{part}."
        yield f"{prefix}norm.weight", (hidden,)
        yield from MIXERS[letter](f"{prefix}mixer.", config)
        if part == 0:
            yield f"{prefix}eh_proj.weight", (hidden, 2 * hidden)
            yield f"{prefix}enorm.weight", (hidden,)
            yield f"{prefix}hnorm.weight", (hidden,)
        else:
            yield f"{prefix}final_layernorm.weight", (hidden,)


SHAPES = {
    "nemotron-3-nano-30b-a3b": (NANO_30B, nemotron),
    "nemotron-3-super-120b-a12b": (SUPER_120B, nemotron),
}
