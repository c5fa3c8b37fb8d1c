"""gpt-oss at full size: with experts in MXFP4, as published, and in BF16."""

from __future__ import annotations

from shapes.common import Shapes, ends, norms, projections

COMMON = {
    "architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "attention_bias": True,
    "attention_dropout": 0.0, "eos_token_id": 200002, "experts_per_token": 4, "head_dim": 64,
    "hidden_act": "silu", "hidden_size": 2880, "initial_context_length": 4096,
    "intermediate_size": 2880, "max_position_embeddings": 131072, "num_attention_heads": 64,
    "num_experts_per_tok": 4, "num_key_value_heads": 8, "pad_token_id": 199999,
    "rms_norm_eps": 1e-5, "rope_theta": 150000, "sliding_window": 128, "swiglu_limit": 7.0,
    "rope_scaling": {
        "beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0,
        "original_max_position_embeddings": 4096, "rope_type": "yarn", "truncate": False,
    },
    "tie_word_embeddings": False, "vocab_size": 201088,
}  # fmt: skip
MXFP4 = {
    "quantization_config": {
        "modules_to_not_convert": [
            "model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens",
            "lm_head",
        ],
        "quant_method": "mxfp4",
    }
}  # fmt: skip


def sized(layers: int, experts: int) -> dict:
    kinds = ("sliding_attention", "full_attention")
    types = [kinds[layer % 2] for layer in range(layers)]
    numbers = {"num_hidden_layers": layers, "num_local_experts": experts}
    return {**COMMON, **numbers, "layer_types": types}


def gpt_oss(config: dict) -> Shapes:
    hidden, width = config["hidden_size"], config["intermediate_size"]
    head, count = config["head_dim"], config["num_local_experts"]
    query, key = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    yield from ends(config)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        yield from norms(prefix, hidden)
        yield from projections(prefix, hidden, query, key)
        for name, rows in (("q", query), ("k", key), ("v", key), ("o", hidden)):
            yield f"{prefix}self_attn.{name}_proj.bias", (rows,)
        yield f"{prefix}self_attn.sinks", (config["num_attention_heads"],)
        yield f"{prefix}mlp.router.weight", (count, hidden)
        yield f"{prefix}mlp.router.bias", (count,)
        for name, rows, columns in (("gate_up", 2 * width, hidden), ("down", hidden, width)):
            base = f"{prefix}mlp.experts.{name}_proj"
            yield f"{base}_bias", (count, rows)
            if "quantization_config" in config:
                yield f"{base}_blocks", (count, rows, columns // 32, 16)
                yield f"{base}_scales", (count, rows, columns // 32)
            else:
                yield base, (count, columns, rows)


SHAPES = {
    "gpt-oss-20b": (sized(24, 32) | MXFP4, gpt_oss),
    "gpt-oss-120b": (sized(36, 128) | MXFP4, gpt_oss),
    "gpt-oss-20b-bf16": (sized(24, 32), gpt_oss),
}
