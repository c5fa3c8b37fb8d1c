"""Checkpoints that another program wrote in a layout of its own, known by their tensors' names."""

from __future__ import annotations

import re
from collections.abc import Iterable

# What is looked for in a stored name, and what a name with it means. The first that fits is named.
_SIGNS: tuple[tuple[str, str], ...] = (
    (
        r"\.lora_([AB]\b|embedding_|magnitude_)|\.modules_to_save\.|^base_model\.model\.",
        (
            "an adapter (LoRA) that is not merged; merge it with peft's `merge_and_unload`, save "
            "the merged model, and pass that"
        ),
    ),
    (
        r"\bswitch_mlp\.",
        "a checkpoint in MLX's layout; pass the Hugging Face checkpoint that it was converted from",
    ),
    (
        r"(^|\.)_orig_mod\.",
        (
            "saved from a model wrapped by torch.compile; save its `_orig_mod` instead, or remove "
            "`_orig_mod.` from the names"
        ),
    ),
    (
        r"(^|\.)(_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)\.",
        (
            "saved from a model wrapped for training (FSDP, activation checkpointing); save the "
            "unwrapped model, with `save_pretrained`"
        ),
    ),
    (
        r"^module\.",
        (
            "saved from a model wrapped by DistributedDataParallel; save its `module` instead, or "
            "remove `module.` from the names"
        ),
    ),
    (
        r"^language_model\.",
        (
            "in the layout of older vision-language savers (MLX-VLM, transformers before 5), which "
            "transformers does not load either; rename `language_model.model.` to "
            "`model.language_model.` and `language_model.lm_head.` to `lm_head.`"
        ),
    ),
    (
        r"\bdecoder\.layers\.\d+\.(mlp|self_attention)\.",
        "a checkpoint in Megatron's layout; export it to Hugging Face's first",
    ),
    (
        r"^ernie\.|\bup_gate_proj\.",
        (
            "a checkpoint in PaddlePaddle's layout, whose matrices are transposed; pass the one "
            "for transformers, whose name ends in -PT"
        ),
    ),
    (
        r"\bexperts\.w(13|2)_weight\b|\bqkv_proj\.",
        (
            "in the fused layout in which vLLM and SGLang hold a model; pass the Hugging Face "
            "checkpoint that they loaded"
        ),
    ),
)


def foreign_layout(names: Iterable[str]) -> str | None:
    """What wrote a checkpoint whose names no architecture has, in one sentence; None if unknown."""
    names = sorted(names)
    for pattern, meaning in _SIGNS:
        sign = re.compile(pattern)
        if found := next((name for name in names if sign.search(name)), None):
            return f"tensor {found!r}: this is {meaning}"
    return None
