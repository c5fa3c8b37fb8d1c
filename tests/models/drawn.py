"""What configs of any family are drawn of: every field inside and outside of its range."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st

from tests.exporting.files import write_small_tokenizer
from tests.models.oracles import SMALL_VOCAB
from tests.tiny import TinyQwen3Moe, TinyQwen35Moe, save_sharded

VISION_CONFIG = TinyQwen35Moe().config()["vision_config"]


class _Absent:
    """Stands for a key that is not there; its name is the same in every process."""

    def __repr__(self) -> str:
        return "absent"


ABSENT = _Absent()


def text_of(config: dict[str, Any]) -> dict[str, Any]:
    """The section of a config that is the text model's, or the config."""
    for section in ("thinker_config", "text_config"):
        config = config.get(section, config)
    return config


@dataclass(frozen=True)
class Drawn:
    """A checkpoint to write: what its tensors are, and what its config says instead."""

    tiny: Any  # a dataclass of tests/families
    head: str  # "as configured", "own", "copy" or "none"
    text: tuple[tuple[str, Any], ...]  # changes of the text model's config
    outer: tuple[tuple[str, Any], ...]  # changes of the config around it

    def write(self, folder: Path) -> None:
        self.tiny.write(folder)
        assert write_small_tokenizer(folder) <= SMALL_VOCAB
        config = self.tiny.config()
        text = text_of(config)
        for level in (config, text):
            for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
                level.pop(key, None)
        if "text_config" in config:  # else transformers makes a large tower
            config.setdefault("vision_config", VISION_CONFIG)
        for level, changes in ((text, self.text), (config, self.outer)):
            for key, value in changes:
                level.pop(key, None)
                if value is not ABSENT:
                    level[key] = value
        (folder / "config.json").write_text(json.dumps(config))
        self._write_tensors(folder)

    def _write_tensors(self, folder: Path) -> None:
        tensors = self.tiny.tensors()
        names = ("embed_tokens.weight", "embeddings.weight")
        embedding = next(t for name, t in tensors.items() if name.endswith(names))
        if isinstance(self.tiny, TinyQwen3Moe):
            # so large that what a layer does is seen in the logits
            large = {n: t * 4 for n, t in tensors.items() if t.ndim > 1 and "mlp.gate." not in n}
            tensors |= large
            embedding = tensors["model.embed_tokens.weight"]
        head_name = f"{getattr(self.tiny, 'head_path', '')}lm_head.weight"
        if self.head == "none":
            tensors.pop(head_name, None)
        elif self.head != "as configured":
            noise = torch.randn(embedding.shape, generator=torch.Generator().manual_seed(7))
            own = (noise * 0.3).to(embedding.dtype)
            tensors[head_name] = own if self.head == "own" else embedding.clone()
        save_sharded(tensors, folder, 1)


# what is drawn in place of numbers that should be there
NUMBERS = st.sampled_from([ABSENT, None, 0, 1, 2, 3, 4, -1, 8.0, "4", True, [2]])
FLAGS = st.sampled_from([ABSENT, None, True, False, 0, 1, "false"])
FACTORS = st.sampled_from([0.5, 1.0, 1, 2.0, 4.0, 40.0, 0, -1.0, None, "4"])

_YARN = {
    "attention_factor": st.sampled_from([None, 1.0, 0.5, 1.3, 0.0, -1.0, "1"]),
    "beta_fast": st.sampled_from([None, 32, 32.0, 0, 16.0, "32"]),
    "beta_slow": st.sampled_from([None, 1, 1.0, 0, 4.0]),
    "mscale": st.sampled_from([None, 1.0, 0.7, 0, 1, -1.0]),
    "mscale_all_dim": st.sampled_from([None, 1.0, 0.5, 0, 1]),
    "truncate": st.sampled_from([None, True, False, 0]),
    "extrapolation_factor": st.sampled_from([None, 1.0, 0.5, 0]),
    "original_max_position_embeddings": st.sampled_from([128, 512, 16, 4, 1, 0, None, 128.0, "9"]),
    "partial_rotary_factor": st.sampled_from([0.25, 0.5, 1.0, 1, 0.1, 0.0, 2.0, None]),
    "rope_theta": st.sampled_from([1e4, 10000, 1e6, 5.0, 1.0, 0.5, 0, None, "1e4"]),
    "mrope_section": st.sampled_from([[2, 1, 1], [1, 1, 2], [4, 2, 2], [11, 11, 10], [0, 0, 0],
                                      [1, 1], [1, 1, 1, 1], [3], None, "2"]),
    "mrope_interleaved": st.sampled_from([True, False, None]),
    "finetuned": st.just(True),
    "low_freq_factor": st.just(1.0),
    "unheard_of": st.sampled_from([None, 3]),
    "full_attention": st.sampled_from([{"rope_type": "default"}, None]),
}  # fmt: skip


@st.composite
def rotary(draw: st.DrawFn) -> dict[str, Any]:
    """Settings of a rotary embedding: mostly sound, with a few settings of any kind."""
    kinds = ["default", "yarn", "yarn", "yarn", "linear", "dynamic", "llama3", "longrope", None, 7]
    kind = draw(st.sampled_from(kinds))
    found: dict[str, Any] = {draw(st.sampled_from(["rope_type", "rope_type", "type"])): kind}
    if kind != "default" or draw(st.booleans()):
        found["factor"] = draw(st.one_of(st.sampled_from([2.0, 4.0]), FACTORS))
    for key in draw(st.lists(st.sampled_from(sorted(_YARN)), max_size=3, unique=True)):
        found[key] = draw(_YARN[key])
    return found


@st.composite
def rope_changes(draw: st.DrawFn) -> dict[str, Any]:
    """Where a config has the settings: in either key, in both, and beside them."""
    changes: dict[str, Any] = {}
    settings_of_both = draw(rotary())
    for key in draw(st.sampled_from([("rope_scaling",), ("rope_parameters",),
                                     ("rope_scaling", "rope_parameters"), ()])):  # fmt: skip
        changes[key] = settings_of_both if draw(st.booleans()) else draw(rotary())
    if draw(st.booleans()):
        keys = ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings")
        key = draw(st.sampled_from(keys))
        changes[key] = draw(st.one_of(_YARN[key], st.just(ABSENT)))
    return changes


COMMON = {
    "num_experts": NUMBERS, "num_local_experts": NUMBERS, "n_routed_experts": NUMBERS,
    "num_experts_per_tok": NUMBERS, "num_hidden_layers": NUMBERS, "num_attention_heads": NUMBERS,
    "num_key_value_heads": NUMBERS, "moe_intermediate_size": NUMBERS, "hidden_size": NUMBERS,
    "vocab_size": NUMBERS, "head_dim": NUMBERS, "intermediate_size": NUMBERS,
    "max_position_embeddings": st.sampled_from([ABSENT, None, 64, 128, 512, 1, 0, 64.0, "64"]),
    "rms_norm_eps": st.sampled_from([ABSENT, None, 1e-6, 1e-5, 0.1, 0.0, 1, -1.0, "1e-6"]),
    "hidden_act": st.sampled_from([ABSENT, None, "silu", "swish", "gelu", "relu", 1]),
    "attention_bias": FLAGS, "norm_topk_prob": FLAGS, "use_sliding_window": FLAGS,
    "tie_word_embeddings": FLAGS, "use_cache": FLAGS, "output_router_logits": FLAGS,
    "sliding_window": NUMBERS, "attention_dropout": st.sampled_from([ABSENT, None, 0.0, 0.5, 1]),
    "decoder_sparse_step": NUMBERS, "mlp_only_layers": st.sampled_from([ABSENT, None, [], [0], 0]),
    "initializer_range": st.sampled_from([ABSENT, None, 0.02, 2]),
    "pad_token_id": st.sampled_from([ABSENT, None, 0, 7, -1, 290, 291, 10**6, "0"]),
    "layer_types": st.sampled_from([ABSENT, None, [], ["full_attention"], ["full_attention"] * 2,
                                    ["sliding_attention", "full_attention"], "full_attention",
                                    ["linear_attention", "full_attention"],
                                    ["full_attention", "linear_attention"],
                                    ["linear_attention"] * 2, ["attention"] * 2]),
    "dtype": st.sampled_from([ABSENT, None, "bfloat16", "float32", "auto"]),
    "torch_dtype": st.sampled_from([ABSENT, None, "bfloat16", "float32"]),
    "model_type": st.sampled_from([ABSENT, None, "qwen3_moe", "qwen3_5_moe", "qwen3_5_moe_text",
                                   "qwen2_moe", "unheard_of", 3]),
    "quantization_config": st.sampled_from([None, {}, {"quant_method": "bitsandbytes"}, "fp8"]),
    "per_layer_config": st.sampled_from([None, {}, {"0": {"hidden_size": 8}}]),
    "num_labels": st.sampled_from([None, 2, 10**9]), "is_causal": FLAGS, "logit_scale": NUMBERS,
    "pruned_heads": st.sampled_from([None, {}]), "auto_map": st.just({"AutoConfig": "x.Y"}),
    "id2label": st.sampled_from([None, {"0": "a"}, []]), "is_encoder_decoder": FLAGS,
    "transformers_weights": st.sampled_from([None, "x.safetensors"]),
    "attention_chunk_size": NUMBERS, "output_attentions": FLAGS, "fusion_config": FLAGS,
    "output_hidden_states": FLAGS, "return_dict": FLAGS, "chunk_size_feed_forward": NUMBERS,
}  # fmt: skip


@st.composite
def changes_of(draw: st.DrawFn, pool: dict[str, Any], most: int) -> tuple[tuple[str, Any], ...]:
    keys = draw(st.lists(st.sampled_from(sorted(pool)), max_size=most, unique=True))
    return tuple((key, draw(pool[key])) for key in keys)


HEADS = st.sampled_from(["as configured"] * 3 + ["own", "copy", "none"])
DTYPES = st.sampled_from([torch.bfloat16, torch.float32, torch.float16])
