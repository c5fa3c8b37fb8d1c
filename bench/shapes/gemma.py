"""Gemma-4-26B-A4B at full size."""

from __future__ import annotations

from shapes.common import Shapes, projections

FULL, SLIDING = "full_attention", "sliding_attention"
# sizes of a tower of this kind, not those of a published header
VISION = {
    "head_dim": 72, "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 1152,
    "intermediate_size": 4304, "model_type": "gemma4_vision", "num_attention_heads": 16,
    "num_hidden_layers": 27, "num_key_value_heads": 16, "patch_size": 16,
    "pooling_kernel_size": 3, "position_embedding_size": 10240, "rms_norm_eps": 1e-6,
    "standardize": True, "use_clipped_linears": False,
}  # fmt: skip
TEXT = {
    "attention_bias": False, "attention_dropout": 0.0, "attention_k_eq_v": True,
    "bos_token_id": 2, "dtype": "bfloat16", "enable_moe_block": True, "eos_token_id": 1,
    "final_logit_softcapping": 30.0, "global_head_dim": 512, "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 2816,
    "hidden_size_per_layer_input": 0, "initializer_range": 0.02, "intermediate_size": 2112,
    "layer_types": ([SLIDING] * 5 + [FULL]) * 5, "max_position_embeddings": 262144,
    "model_type": "gemma4_text", "moe_intermediate_size": 704, "num_attention_heads": 16,
    "num_experts": 128, "num_global_key_value_heads": 2, "num_hidden_layers": 30,
    "num_key_value_heads": 8, "num_kv_shared_layers": 0, "pad_token_id": 0, "rms_norm_eps": 1e-6,
    "rope_parameters": {
        FULL: {"partial_rotary_factor": 0.25, "rope_theta": 1e6, "rope_type": "proportional"},
        SLIDING: {"rope_theta": 1e4, "rope_type": "default"},
    },
    "sliding_window": 1024, "tie_word_embeddings": True, "top_k_experts": 8,
    "use_bidirectional_attention": "vision", "use_cache": True, "use_double_wide_mlp": False,
    "vocab_size": 262144, "vocab_size_per_layer_input": 262144,
}  # fmt: skip
A4B = {
    "architectures": ["Gemma4ForConditionalGeneration"], "audio_config": None,
    "audio_token_id": 258881, "boa_token_id": 256000, "boi_token_id": 255999, "dtype": "bfloat16",
    "eoa_token_index": 258883, "eoi_token_id": 258882, "eos_token_id": [1, 106],
    "image_token_id": 258880, "model_type": "gemma4", "text_config": TEXT,
    "tie_word_embeddings": True, "video_token_id": 258884, "vision_config": VISION,
}  # fmt: skip
NORMS = (
    "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm",
    "post_feedforward_layernorm", "post_feedforward_layernorm_1", "post_feedforward_layernorm_2",
    "pre_feedforward_layernorm_2",
)  # fmt: skip


def layer(prefix: str, config: dict, kind: str) -> Shapes:
    hidden, count, width = (
        config[key] for key in ("hidden_size", "num_experts", "moe_intermediate_size")
    )
    is_full = kind == FULL
    head = config["global_head_dim" if is_full else "head_dim"]
    n_keys = config["num_global_key_value_heads" if is_full else "num_key_value_heads"]
    for name, shape in projections(
        prefix, hidden, config["num_attention_heads"] * head, n_keys * head
    ):
        if not is_full or "v_proj" not in name:
            yield name, shape
    yield f"{prefix}self_attn.q_norm.weight", (head,)
    yield f"{prefix}self_attn.k_norm.weight", (head,)
    for norm in NORMS:
        yield f"{prefix}{norm}.weight", (hidden,)
    yield f"{prefix}layer_scalar", (1,)
    dense = config["intermediate_size"]
    yield f"{prefix}mlp.gate_proj.weight", (dense, hidden)
    yield f"{prefix}mlp.up_proj.weight", (dense, hidden)
    yield f"{prefix}mlp.down_proj.weight", (hidden, dense)
    yield f"{prefix}router.proj.weight", (count, hidden)
    yield f"{prefix}router.scale", (hidden,)
    yield f"{prefix}router.per_expert_scale", (count,)
    yield f"{prefix}experts.gate_up_proj", (count, 2 * width, hidden)
    yield f"{prefix}experts.down_proj", (count, hidden, width)


def tower(vision: dict, hidden: int) -> Shapes:
    size, width, at = vision["hidden_size"], vision["intermediate_size"], "model.vision_tower."
    yield f"{at}patch_embedder.input_proj.weight", (size, 3 * vision["patch_size"] ** 2)
    yield (
        f"{at}patch_embedder.position_embedding_table",
        (2, vision["position_embedding_size"], size),
    )
    for name in ("std_bias", "std_scale"):
        yield f"{at}{name}", (size,)
    for block in range(vision["num_hidden_layers"]):
        prefix = f"{at}encoder.layers.{block}."
        for name in ("q", "k", "v", "o"):
            yield f"{prefix}self_attn.{name}_proj.linear.weight", (size, size)
        for name in ("q", "k"):
            yield f"{prefix}self_attn.{name}_norm.weight", (vision["head_dim"],)
        yield f"{prefix}mlp.gate_proj.linear.weight", (width, size)
        yield f"{prefix}mlp.up_proj.linear.weight", (width, size)
        yield f"{prefix}mlp.down_proj.linear.weight", (size, width)
        for norm in NORMS[:4]:
            yield f"{prefix}{norm}.weight", (size,)
    yield "model.embed_vision.embedding_projection.weight", (hidden, size)


def gemma4(config: dict) -> Shapes:
    text = config["text_config"]
    hidden, at = text["hidden_size"], "model.language_model."
    yield f"{at}embed_tokens.weight", (text["vocab_size"], hidden)
    yield f"{at}norm.weight", (hidden,)
    for number, kind in enumerate(text["layer_types"]):
        yield from layer(f"{at}layers.{number}.", text, kind)
    yield from tower(config["vision_config"], hidden)


SHAPES = {"gemma-4-26b-a4b": (A4B, gemma4)}
