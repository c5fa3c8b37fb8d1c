"""Qwen3-MoE and Qwen3.5-MoE."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hypothesis import strategies as st
from transformers import Qwen3_5MoeConfig, Qwen3MoeConfig
from transformers.models.qwen3_5_moe.configuration_qwen3_5_moe import Qwen3_5MoeTextConfig

from reap2gguf.models.qwen3_5_moe import Qwen35Moe
from reap2gguf.models.qwen3_moe import Qwen3Moe
from tests.models.config_rows import EVERY_CONFIG, TEXT, Carried, Elsewhere, Read, Refused, Row
from tests.models.drawn import (
    ABSENT,
    COMMON,
    DTYPES,
    FLAGS,
    HEADS,
    NUMBERS,
    Drawn,
    changes_of,
    rope_changes,
)
from tests.models.oracles import SMALL_VOCAB
from tests.tiny import TinyQwen3Moe, TinyQwen35Moe

QWEN3 = TinyQwen3Moe()
QWEN35 = TinyQwen35Moe()
FLAT = replace(QWEN35, nested=False)
LAYOUTS: dict[str, dict[str, Any]] = {
    "Qwen3MoeForCausalLM": {
        "2D": QWEN3,
        "3D": replace(QWEN3, fused=True),
        "tied": replace(QWEN3, tied=True),
        "dense": replace(QWEN3, n_layers=4, dense_layers=(0, 3)),
        "3D dense": replace(QWEN3, n_layers=3, fused=True, dense_layers=(2,)),
        "local experts": replace(QWEN3, count_key="num_local_experts"),
    },
    "Qwen3_5MoeForConditionalGeneration": {
        "the Hub's": QWEN35,
        "2D": replace(QWEN35, fused=False),
        "3D": replace(QWEN35, fused_mtp=True),
        "2D trunk, 3D MTP": replace(QWEN35, fused=False, fused_mtp=True),
        "without MTP": replace(QWEN35, mtp=False),
        "without tower": replace(QWEN35, vision=False),
        "tied": replace(QWEN35, tied=True),
        "equal heads": replace(QWEN35, value_heads=4),
        "other layers": replace(QWEN35, layers="flfl"),
    },
    "Qwen3_5MoeForCausalLM": {
        "flat": FLAT,
        "flat 2D without MTP": replace(FLAT, fused=False, mtp=False),
    },
}

QWEN3: dict[str, Row] = {
    **TEXT,
    "intermediate_size": Read(128),
    "use_sliding_window": Refused((True, None)),
    "sliding_window": Carried(16),  # without use_sliding_window
    "decoder_sparse_step": Read(2),
    "norm_topk_prob": Refused((False, None, "absent")),
    "mlp_only_layers": Read([1], may_be_null=True),
}
QWEN35_TEXT: dict[str, Row] = {
    **TEXT,
    "head_dim": Read(64),
    "linear_conv_kernel_dim": Read(3),
    "linear_key_head_dim": Refused((32,)),  # llama.cpp has one size for both
    "linear_value_head_dim": Refused((32,)),
    "linear_num_key_heads": Read(2),
    "linear_num_value_heads": Read(16),
    "shared_expert_intermediate_size": Read(64),
    "layer_types": Read(["linear_attention", "full_attention"] * 2, may_be_null=True),
}
QWEN35: dict[str, Row] = {
    **EVERY_CONFIG,
    "text_config": Refused((None, "absent", {})),
    "vision_config": Elsewhere("test_qwen_vision.py"),
    "image_token_id": Carried(7),
    "video_token_id": Carried(7),
    "vision_start_token_id": Carried(7),
    "vision_end_token_id": Carried(7),
    "tie_word_embeddings": Elsewhere("test_tying.py"),
}
TINY3 = TinyQwen3Moe(n_layers=4, vocab=4096)
FLAT_TEXT = TinyQwen35Moe(nested=False, n_heads=4, n_kv_heads=2)
NESTED = TinyQwen35Moe(mtp=False)
# transformers' class -> its table, a config of it, and the family that reads it
FIELDS: dict[Any, tuple[dict[str, Row], Any, Any]] = {
    Qwen3MoeConfig: (QWEN3, TINY3, Qwen3Moe),
    Qwen3_5MoeTextConfig: (QWEN35_TEXT, FLAT_TEXT, Qwen35Moe),
    Qwen3_5MoeConfig: (QWEN35, NESTED, Qwen35Moe),
}

_QWEN35 = {
    **COMMON,
    "full_attention_interval": st.sampled_from([ABSENT, None, 1, 2, 3, 4, 0, -1, 2.0]),
    "linear_conv_kernel_dim": NUMBERS, "linear_key_head_dim": NUMBERS,
    "linear_value_head_dim": NUMBERS, "linear_num_key_heads": NUMBERS,
    "linear_num_value_heads": NUMBERS, "shared_expert_intermediate_size": NUMBERS,
    "attn_output_gate": FLAGS, "mtp_num_hidden_layers": NUMBERS,
    "mtp_use_dedicated_embeddings": FLAGS,
}  # fmt: skip


@st.composite
def qwen3(draw: st.DrawFn) -> Drawn:
    n_experts = draw(st.integers(2, 6))
    n_kv_heads = draw(st.sampled_from([1, 2, 4]))
    tiny = TinyQwen3Moe(
        n_layers=draw(st.integers(1, 3)),
        hidden=draw(st.sampled_from([32, 64, 40])),
        width=draw(st.sampled_from([8, 24, 32])),
        n_experts=n_experts,
        top_k=draw(st.integers(1, n_experts)),
        n_heads=n_kv_heads * draw(st.sampled_from([1, 2])),
        n_kv_heads=n_kv_heads,
        head_dim=draw(st.sampled_from([8, 16, 16, 32, 10, 24])),
        vocab=draw(st.sampled_from([SMALL_VOCAB, 320])),
        fused=draw(st.booleans()),
        tied=draw(st.booleans()),
        count_key=draw(st.sampled_from(["num_experts", "num_local_experts"])),
        dtype=draw(DTYPES),
        dense_layers=draw(st.sampled_from([(), (), (), (), (0,)])),
    )
    text = dict(draw(changes_of(COMMON, 2)))
    if draw(st.booleans()):
        text |= draw(rope_changes())
    return Drawn(tiny, draw(HEADS), tuple(text.items()), ())


@st.composite
def qwen35(draw: st.DrawFn) -> Drawn:
    n_experts = draw(st.integers(2, 5))
    key_heads = draw(st.sampled_from([1, 2, 4]))
    n_kv_heads = draw(st.sampled_from([1, 2]))
    tiny = TinyQwen35Moe(
        hidden=draw(st.sampled_from([32, 64])),
        width=draw(st.sampled_from([16, 32])),
        n_experts=n_experts,
        top_k=draw(st.integers(1, n_experts)),
        layers=draw(st.sampled_from(["lf", "lf", "lf", "fl", "fll", "llf", "lllf", "lffl"])),
        n_heads=n_kv_heads * draw(st.sampled_from([1, 2])),
        n_kv_heads=n_kv_heads,
        head_dim=draw(st.sampled_from([16, 32, 32, 64, 8, 48])),
        key_heads=key_heads,
        value_heads=key_heads * draw(st.sampled_from([1, 2, 3])),
        linear_dim=draw(st.sampled_from([16, 32])),
        vocab=SMALL_VOCAB,
        nested=draw(st.booleans()),
        fused=draw(st.booleans()),
        fused_mtp=draw(st.booleans()),
        mtp=draw(st.booleans()),
        vision=draw(st.sampled_from([False, False, True])),
        tied=draw(st.booleans()),
        dtype=draw(DTYPES),
    )
    text = dict(draw(changes_of(_QWEN35, 2)))
    if draw(st.booleans()):
        text |= draw(rope_changes())
    outer = draw(changes_of(_QWEN35, 1)) if tiny.nested and draw(st.booleans()) else ()
    return Drawn(tiny, draw(HEADS), tuple(text.items()), outer)


# what configs are drawn of
CONFIGS = (qwen3(), qwen35())
