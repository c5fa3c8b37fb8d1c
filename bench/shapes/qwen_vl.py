"""Qwen3-VL-MoE and Qwen3-Omni-MoE at full size.

What speaks in Qwen3-Omni is left out: the talker and code2wav are carried as they are.
"""

from __future__ import annotations

from shapes.common import Shapes, attention, experts, norms
from shapes.qwen import vision

VISION = {
    "deepstack_visual_indexes": [8, 16, 24], "depth": 27, "hidden_act": "gelu_pytorch_tanh",
    "hidden_size": 1152, "in_channels": 3, "intermediate_size": 4304,
    "model_type": "qwen3_vl_moe", "num_heads": 16, "num_position_embeddings": 2304,
    "out_hidden_size": 2048, "patch_size": 16, "spatial_merge_size": 2, "temporal_patch_size": 2,
}  # fmt: skip
VL_TEXT = {
    "attention_bias": False, "decoder_sparse_step": 1, "dtype": "bfloat16", "head_dim": 128,
    "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 6144,
    "max_position_embeddings": 262144, "mlp_only_layers": [], "model_type": "qwen3_vl_moe_text",
    "moe_intermediate_size": 768, "norm_topk_prob": True, "num_attention_heads": 32,
    "num_experts": 128, "num_experts_per_tok": 8, "num_hidden_layers": 48,
    "num_key_value_heads": 4, "rms_norm_eps": 1e-6, "rope_theta": 5000000, "vocab_size": 151936,
    "rope_scaling": {
        "mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default",
    },
}  # fmt: skip
VL_30B = {
    "architectures": ["Qwen3VLMoeForConditionalGeneration"], "image_token_id": 151655,
    "model_type": "qwen3_vl_moe", "text_config": VL_TEXT, "tie_word_embeddings": False,
    "video_token_id": 151656, "vision_config": VISION, "vision_end_token_id": 151653,
    "vision_start_token_id": 151652,
}  # fmt: skip
VL_235B = VL_30B | {
    "text_config": VL_TEXT | {
        "hidden_size": 4096, "intermediate_size": 12288, "moe_intermediate_size": 1536,
        "num_attention_heads": 64, "num_hidden_layers": 94,
    },
    "vision_config": VISION | {"out_hidden_size": 4096},
}  # fmt: skip
OMNI_TEXT = VL_TEXT | {
    "intermediate_size": 768, "max_position_embeddings": 65536,
    "model_type": "qwen3_omni_moe_text", "rope_theta": 1000000, "sliding_window": None,
    "vocab_size": 152064, "rope_scaling": {
        "interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default",
        "type": "default",
    },
}  # fmt: skip
AUDIO = {
    "d_model": 1280, "downsample_hidden_size": 480, "encoder_attention_heads": 20,
    "encoder_ffn_dim": 5120, "encoder_layers": 32, "model_type": "qwen3_omni_moe_audio_encoder",
    "num_mel_bins": 128, "output_dim": 2048,
}  # fmt: skip
OMNI_30B = {
    "architectures": ["Qwen3OmniMoeForConditionalGeneration"], "model_type": "qwen3_omni_moe",
    "enable_audio_output": False, "thinker_config": {
        "audio_config": AUDIO, "model_type": "qwen3_omni_moe_thinker", "text_config": OMNI_TEXT,
        "vision_config": VISION | {"model_type": "qwen3_omni_moe_vision_encoder"},
    },
}  # fmt: skip


def text(at: str, head: str, config: dict, fused: bool) -> Shapes:
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    yield f"{at}embed_tokens.weight", (vocab, hidden)
    yield f"{at}norm.weight", (hidden,)
    yield f"{head}lm_head.weight", (vocab, hidden)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"{at}layers.{layer}."
        yield from norms(prefix, hidden)
        yield from attention(prefix, config, 1)
        for name, shape in experts(prefix, config, fused):
            # published as (in, out)
            yield name, (shape[0], shape[2], shape[1]) if len(shape) == 3 else shape


def qwen3_vl(config: dict) -> Shapes:
    yield from text("model.language_model.", "", config["text_config"], fused=True)
    yield from vision(config["vision_config"])


def qwen3_omni(config: dict) -> Shapes:
    thinker = config["thinker_config"]
    yield from text("thinker.model.", "thinker.", thinker["text_config"], fused=False)
    names = {"model.visual.": "thinker.visual.", "deepstack_merger_list": "merger_list"}
    names |= {"merger.norm": "merger.ln_q", "linear_fc1": "mlp.0", "linear_fc2": "mlp.2"}
    for name, shape in vision(thinker["vision_config"]):
        for old, new in names.items():
            name = name.replace(old, new)
        yield name, shape
    audio = thinker["audio_config"]
    hidden, ffn = audio["d_model"], audio["encoder_ffn_dim"]
    for layer in range(audio["encoder_layers"]):
        at = f"thinker.audio_tower.layers.{layer}."
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            yield f"{at}self_attn.{part}.weight", (hidden, hidden)
        yield f"{at}fc1.weight", (ffn, hidden)
        yield f"{at}fc2.weight", (hidden, ffn)


SHAPES = {
    "qwen3-vl-30b-a3b": (VL_30B, qwen3_vl),
    "qwen3-vl-235b-a22b": (VL_235B, qwen3_vl),
    "qwen3-omni-30b-a3b": (OMNI_30B, qwen3_omni),
}
