"""GLM-4.5-Air, GLM-4.5, GLM-4.6 and GLM-4.7 at full size."""

from __future__ import annotations

from shapes.common import Shapes, norms

AIR = {
    "architectures": ["Glm4MoeForCausalLM"], "model_type": "glm4_moe", "attention_bias": True,
    "attention_dropout": 0.0, "first_k_dense_replace": 1, "head_dim": 128, "hidden_act": "silu",
    "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 10944,
    "max_position_embeddings": 131072, "moe_intermediate_size": 1408, "n_group": 1,
    "n_routed_experts": 128, "n_shared_experts": 1, "norm_topk_prob": True,
    "num_attention_heads": 96, "num_experts_per_tok": 8, "num_hidden_layers": 46,
    "num_key_value_heads": 8, "num_nextn_predict_layers": 1, "partial_rotary_factor": 0.5,
    "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 1000000,
    "routed_scaling_factor": 1.0, "tie_word_embeddings": False, "topk_group": 1,
    "torch_dtype": "bfloat16", "use_cache": True, "use_qk_norm": False, "vocab_size": 151552,
}  # fmt: skip
GLM45 = AIR | {
    "first_k_dense_replace": 3, "hidden_size": 5120, "intermediate_size": 12288,
    "moe_intermediate_size": 1536, "n_routed_experts": 160, "num_hidden_layers": 92,
    "routed_scaling_factor": 2.5, "use_qk_norm": True,
}  # fmt: skip
GLM46 = GLM45 | {"max_position_embeddings": 202752}


def feed_forward(prefix: str, hidden: int, width: int) -> Shapes:
    yield f"{prefix}gate_proj.weight", (width, hidden)
    yield f"{prefix}up_proj.weight", (width, hidden)
    yield f"{prefix}down_proj.weight", (hidden, width)


def layer(prefix: str, config: dict, dense: bool) -> Shapes:
    hidden, head = config["hidden_size"], config["head_dim"]
    query, key = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    yield from norms(prefix, hidden)
    for name, rows in (("q", query), ("k", key), ("v", key)):
        yield f"{prefix}self_attn.{name}_proj.weight", (rows, hidden)
        yield f"{prefix}self_attn.{name}_proj.bias", (rows,)
    yield f"{prefix}self_attn.o_proj.weight", (hidden, query)
    if config["use_qk_norm"]:
        yield f"{prefix}self_attn.q_norm.weight", (head,)
        yield f"{prefix}self_attn.k_norm.weight", (head,)
    mlp, width = f"{prefix}mlp.", config["moe_intermediate_size"]
    if dense:
        yield from feed_forward(mlp, hidden, config["intermediate_size"])
        return
    yield f"{mlp}gate.weight", (config["n_routed_experts"], hidden)
    yield f"{mlp}gate.e_score_correction_bias", (config["n_routed_experts"],)
    yield from feed_forward(f"{mlp}shared_experts.", hidden, config["n_shared_experts"] * width)
    for expert in range(config["n_routed_experts"]):
        yield from feed_forward(f"{mlp}experts.{expert}.", hidden, width)


def trunk(config: dict) -> Shapes:
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    yield "model.embed_tokens.weight", (vocab, hidden)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (vocab, hidden)
    for number in range(config["num_hidden_layers"]):
        dense = number < config["first_k_dense_replace"]
        yield from layer(f"model.layers.{number}.", config, dense)


def glm46(config: dict) -> Shapes:
    yield from trunk(config)
    if not config["num_nextn_predict_layers"]:
        return
    hidden, prefix = config["hidden_size"], f"model.layers.{config['num_hidden_layers']}."
    yield from layer(prefix, config, dense=False)
    yield f"{prefix}eh_proj.weight", (hidden, 2 * hidden)
    for name in ("enorm", "hnorm", "shared_head.norm"):
        yield f"{prefix}{name}.weight", (hidden,)


def glm45(config: dict) -> Shapes:
    """With an embedding and a head of the MTP block's own."""
    yield from glm46(config)
    if not config["num_nextn_predict_layers"]:
        return
    hidden, prefix = config["hidden_size"], f"model.layers.{config['num_hidden_layers']}."
    for name in ("embed_tokens", "shared_head.head"):
        yield f"{prefix}{name}.weight", (config["vocab_size"], hidden)


SHAPES = {
    "glm-4.5-air": (AIR, glm45),
    "glm-4.5": (GLM45, glm45),
    "glm-4.6": (GLM46, glm46),  # and GLM-4.7
}
