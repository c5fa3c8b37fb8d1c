"""Gemma-4 with experts."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from transformers.models.gemma4.configuration_gemma4 import Gemma4Config, Gemma4TextConfig

from reap2gguf.models.gemma4 import Gemma4
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
)
from tests.models.oracles import SMALL_VOCAB
from tests.tiny import _Random as Random
from tests.tiny import save_sharded
from tests.tokenizer.small_gemma import FEWEST, write_gemma
from tests.tokens import SMALL_VOCAB as VOCAB
from tests.tokens import special_tokens, write_tokenizer

Tensors = dict[str, torch.Tensor]
IMAGES = {
    "do_normalize": False,
    "image_mean": [0.0, 0.0, 0.0],
    "image_processor_type": "Gemma4ImageProcessor",
    "image_std": [1.0, 1.0, 1.0],
    "patch_size": 4,
    "pooling_kernel_size": 3,
    "processor_class": "Gemma4Processor",
}
_KINDS = {"s": "sliding_attention", "f": "full_attention"}


@dataclass(frozen=True)
class TinyGemma4:
    """A Gemma-4-26B-A4B of a few hundred thousand parameters, named as published."""

    layers: str = "ssf"  # a sliding window, or full attention
    hidden: int = 64
    width: int = 40
    dense_width: int = 104
    n_experts: int = 8
    top_k: int = 2
    n_heads: int = 4
    n_kv_heads: int = 2
    n_full_kv_heads: int = 1
    head_dim: int = 16
    full_head_dim: int = 32
    window: int = 12
    share: float = 0.25  # of a head of a full layer that is rotated
    cap: float | None = 30.0
    shared_value: bool = True  # full layers take keys as values
    vocab: int = VOCAB
    nested: bool = True
    resaved: bool = False  # as transformers saves a config
    vision: bool = True  # nested only
    standardize: bool = False  # what the tower gives
    tied: bool = True
    n_shards: int = 1
    dtype: torch.dtype = torch.bfloat16
    seed: int = 0

    @property
    def has_tower(self) -> bool:
        return self.vision and self.nested

    def config(self) -> dict[str, Any]:
        text = {
            "attention_bias": False,
            "attention_dropout": 0.0,
            "attention_k_eq_v": self.shared_value,
            **self._special_tokens(),
            "dtype": "bfloat16",
            "enable_moe_block": True,
            "final_logit_softcapping": self.cap,
            **({} if self.resaved else self._full_heads()),
            "head_dim": self.head_dim,
            "hidden_activation": "gelu_pytorch_tanh",
            "hidden_size": self.hidden,
            "hidden_size_per_layer_input": 0,
            "initializer_range": 0.02,
            "intermediate_size": self.dense_width,
            "layer_types": [_KINDS[kind] for kind in self.layers],
            "max_position_embeddings": 512,
            "model_type": "gemma4_text",
            "moe_intermediate_size": self.width,
            "num_attention_heads": self.n_heads,
            "num_experts": self.n_experts,
            "num_hidden_layers": len(self.layers),
            "num_key_value_heads": self.n_kv_heads,
            "num_kv_shared_layers": 0,
            **(self._by_layer() if self.resaved else {}),
            "rms_norm_eps": 1e-6,
            "rope_parameters": {
                "full_attention": {
                    "partial_rotary_factor": self.share,
                    "rope_theta": 1000000.0,
                    "rope_type": "proportional",
                },
                "sliding_attention": {"rope_theta": 10000.0, "rope_type": "default"},
            },
            "sliding_window": self.window,
            "tie_word_embeddings": self.tied,
            "top_k_experts": self.top_k,
            "use_bidirectional_attention": "vision",
            "use_cache": True,
            "use_double_wide_mlp": False,
            "vocab_size": self.vocab,
            "vocab_size_per_layer_input": self.vocab,
        }
        if not self.nested:
            return {"architectures": ["Gemma4ForCausalLM"], **text}
        return {
            "architectures": ["Gemma4ForConditionalGeneration"],
            "model_type": "gemma4",
            "audio_config": None,
            **{f"{name}_token_id": self.vocab - 1 for name in ("boi", "eoi", "image", "video")},
            "dtype": "bfloat16",
            "text_config": text,
            "tie_word_embeddings": self.tied,
            "vision_config": self._vision_config() if self.has_tower else None,
        }

    def _special_tokens(self) -> dict[str, int]:
        if self.vocab < FEWEST:
            return special_tokens(self.vocab)
        return {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}

    def _full_heads(self) -> dict[str, int]:
        heads = self.n_full_kv_heads if self.shared_value else None
        return {"global_head_dim": self.full_head_dim, "num_global_key_value_heads": heads}

    def _by_layer(self) -> dict[str, Any]:
        own = {"head_dim": self.full_head_dim, "num_key_value_heads": self.full_kv_heads}
        layers = [str(layer) for layer, kind in enumerate(self.layers) if kind == "f"]
        return {"per_layer_config": {layer: {**own} for layer in layers}}

    @property
    def full_kv_heads(self) -> int:
        return self.n_full_kv_heads if self.shared_value else self.n_kv_heads

    def _vision_config(self) -> dict[str, Any]:
        return {
            "hidden_size": 32,
            "intermediate_size": 48,
            "model_type": "gemma4_vision",
            "num_attention_heads": 2,
            "num_hidden_layers": 1,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "patch_size": 4,
            "pooling_kernel_size": 3,
            "position_embedding_size": 64,
            "standardize": self.standardize,
        }

    def tensors(self) -> Tensors:
        found = self._text(Random(self.seed, self.dtype))
        return found | (self._tower() if self.has_tower else {})

    def _text(self, random: Random) -> Tensors:
        base = "model.language_model." if self.nested else "model."
        found = {
            base + "embed_tokens.weight": random.normal(0.1, self.vocab, self.hidden),
            base + "norm.weight": random.normal(0.1, self.hidden) + 1,
        }
        head = random.normal(0.3, self.vocab, self.hidden)
        if not self.tied:
            found["lm_head.weight"] = head
        for layer, kind in enumerate(self.layers):
            own = {**self._attention(random, kind), **self._feed_forward(random)}
            found |= {f"{base}layers.{layer}.{name}": one for name, one in own.items()}
        return found

    def _attention(self, random: Random, kind: str) -> Tensors:
        size, n_kv = self.head_dim, self.n_kv_heads
        if kind == "f":
            size, n_kv = self.full_head_dim, self.full_kv_heads
        query, key = self.n_heads * size, n_kv * size
        found = {
            "self_attn.q_proj.weight": random.matrix(query, self.hidden),
            "self_attn.k_proj.weight": random.matrix(key, self.hidden),
            "self_attn.v_proj.weight": random.matrix(key, self.hidden),
            "self_attn.o_proj.weight": random.matrix(self.hidden, query),
            "self_attn.q_norm.weight": random.normal(0.1, size) + 0.3,
            "self_attn.k_norm.weight": random.normal(0.1, size) + 0.3,
        }
        if kind == "f" and self.shared_value:
            del found["self_attn.v_proj.weight"]
        return found

    def _feed_forward(self, random: Random) -> Tensors:
        """Experts, router, dense feed-forward, norms and the layer's scale."""
        hidden, width = self.hidden, self.width
        found = {
            f"{name}.weight": random.normal(0.1, hidden) + 1
            for name in (
                "input_layernorm",
                "post_attention_layernorm",
                "pre_feedforward_layernorm",
                "pre_feedforward_layernorm_2",
                "post_feedforward_layernorm_1",
                "post_feedforward_layernorm_2",
            )
        }
        # what a layer adds is small: a router rarely hangs on the last bit
        found["post_attention_layernorm.weight"] *= 0.3
        found["post_feedforward_layernorm.weight"] = random.normal(0.05, hidden) + 0.3
        return found | {
            "layer_scalar": random.normal(0.1, 1) + 0.8,
            "mlp.gate_proj.weight": random.matrix(self.dense_width, hidden),
            "mlp.up_proj.weight": random.matrix(self.dense_width, hidden),
            "mlp.down_proj.weight": random.matrix(hidden, self.dense_width),
            "router.proj.weight": random.matrix(self.n_experts, hidden) * 16,
            "router.scale": random.normal(0.1, hidden) + 1,
            "router.per_expert_scale": random.normal(0.3, self.n_experts) + 1,
            "experts.gate_up_proj": random.matrix(self.n_experts, 2 * width, hidden),
            "experts.down_proj": random.matrix(self.n_experts, hidden, width),
        }

    def _tower(self) -> Tensors:
        random, size, at = Random(self.seed + 2, self.dtype), 32, "model.vision_tower."
        block = f"{at}encoder.layers.0."
        found = {
            f"{at}patch_embedder.input_proj.weight": random.matrix(size, 48),
            f"{at}patch_embedder.position_embedding_table": random.normal(0.1, 2, 64, size),
            "model.embed_vision.embedding_projection.weight": random.matrix(self.hidden, size),
        }
        if self.standardize:
            found[f"{at}std_bias"] = random.normal(0.3, size)
            found[f"{at}std_scale"] = random.normal(0.3, size) + 1
        for name, shape in {
            "self_attn.q_proj": (32, size), "self_attn.k_proj": (32, size),
            "self_attn.v_proj": (32, size), "self_attn.o_proj": (size, 32),
            "mlp.gate_proj": (48, size), "mlp.up_proj": (48, size), "mlp.down_proj": (size, 48),
        }.items():  # fmt: skip
            found[f"{block}{name}.linear.weight"] = random.matrix(*shape)
        for name in ("self_attn.q_norm", "self_attn.k_norm"):
            found[f"{block}{name}.weight"] = random.normal(0.1, 16) + 1
        for name in (
            "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm",
            "post_feedforward_layernorm",
        ):  # fmt: skip
            found[f"{block}{name}.weight"] = random.normal(0.1, size) + 1
        return found

    def write(self, folder: Path) -> Path:
        """Write config, shards, index and tokenizer; the folder."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.config(), indent=2))
        if self.vocab < FEWEST:  # of drawn configs, which get another
            write_tokenizer(folder, self.vocab)
        else:
            write_gemma(folder, self.vocab)
        if self.has_tower:
            (folder / "preprocessor_config.json").write_text(json.dumps(IMAGES))
        save_sharded(self.tensors(), folder, self.n_shards)
        return folder


GEMMA4 = TinyGemma4()
TEXT_ALONE = replace(GEMMA4, nested=False)
LAYOUTS: dict[str, dict[str, Any]] = {
    "Gemma4ForConditionalGeneration": {
        "the Hub's": GEMMA4,
        "saved again": replace(GEMMA4, resaved=True),
        "without tower": replace(GEMMA4, vision=False),
        "full first": replace(GEMMA4, layers="fsf"),
    },
    "Gemma4ForCausalLM": {
        "text alone": TEXT_ALONE,
        "no cap, values of their own": replace(TEXT_ALONE, cap=None, shared_value=False),
        "untied": replace(TEXT_ALONE, tied=False, resaved=True),
    },
}

PROJECTOR_DIFFERENCES = {
    "Gemma4ForConditionalGeneration": {
        "clip.use_gelu": "without it llama.cpp approximates GELU by a sigmoid, and transformers by "
        "a tangent; test_gemma4_images.py shows which is the same"
    }
}

# attention of whole blocks; the published widths of experts and dense layers are none of 256
WIDE = {
    name: {"head_dim": 64, "full_head_dim": 128, "width": 176, "dense_width": 288}
    for name in LAYOUTS
}

# what all configs of transformers have; heads and rotary embeddings differ among layers
_TEXT: dict[str, Row] = {
    **EVERY_CONFIG,
    **{
        name: TEXT[name]
        for name in (
            "vocab_size", "hidden_size", "num_attention_heads", "max_position_embeddings",
            "initializer_range", "rms_norm_eps", "use_cache", "tie_word_embeddings",
            "attention_bias", "attention_dropout", "moe_intermediate_size", "num_experts",
            "pad_token_id", "bos_token_id", "eos_token_id",
        )
    },
    "num_hidden_layers": Read(6),
    "num_key_value_heads": Elsewhere("test_gemma4.py"),
    "head_dim": Elsewhere("test_gemma4.py"),
    "rope_parameters": Elsewhere("test_gemma4.py"),
    "layer_types": Read(
        ["sliding_attention", "full_attention", "full_attention"], may_be_null=True
    ),
    "hidden_activation": Refused(("gelu", "silu", None)),
    "intermediate_size": Read(128),
    "sliding_window": Read(8),
    "final_logit_softcapping": Read(20.0, may_be_null=True),
    "use_bidirectional_attention": Refused(("all", "text")),
    "vocab_size_per_layer_input": Carried(7),
    "hidden_size_per_layer_input": Refused((256, "absent", None)),
    "attention_k_eq_v": Read(False),
    "num_kv_shared_layers": Refused((1, None)),
    "enable_moe_block": Refused((False, "absent", None)),
    "use_double_wide_mlp": Carried(True),
    "top_k_experts": Read(3),
}  # fmt: skip
_TOKEN = Carried(7)
_OUTER: dict[str, Row] = {
    **EVERY_CONFIG,
    "text_config": Refused((None, "absent", {})),
    "vision_config": Carried({"hidden_size": 16, "num_attention_heads": 1}),
    "audio_config": Carried({"hidden_size": 16}),
    "tie_word_embeddings": Elsewhere("test_tying.py"),
    "initializer_range": Carried(0.5),
    **{f"{name}_token_id": _TOKEN for name in ("boi", "eoi", "image", "video", "boa", "audio")},
    "eoa_token_index": _TOKEN,
}
FIELDS: dict[Any, tuple[dict[str, Row], Any, Any]] = {
    Gemma4TextConfig: (_TEXT, replace(TEXT_ALONE, vocab=4096), Gemma4),
    Gemma4Config: (_OUTER, GEMMA4, Gemma4),
}

_DRAWN = {
    **COMMON,
    "attention_k_eq_v": FLAGS, "enable_moe_block": FLAGS, "use_double_wide_mlp": FLAGS,
    "hidden_size_per_layer_input": NUMBERS, "num_kv_shared_layers": NUMBERS,
    "top_k_experts": NUMBERS, "global_head_dim": NUMBERS, "num_global_key_value_heads": NUMBERS,
    "final_logit_softcapping": st.sampled_from([ABSENT, None, 0, 5.0, 30, -1.0, "30"]),
    "hidden_activation": st.sampled_from([ABSENT, None, "gelu_pytorch_tanh", "gelu", "silu"]),
    "use_bidirectional_attention": st.sampled_from([ABSENT, None, "vision", "all", True]),
    "per_layer_config": st.sampled_from([ABSENT, None, {}, {"0": {"head_dim": 8}}]),
    "rope_parameters": st.sampled_from([ABSENT, None, {}, {"rope_theta": 5.0}]),
    "rope_theta": NUMBERS,
}  # fmt: skip


@st.composite
def gemma4(draw: st.DrawFn) -> Drawn:
    n_experts = draw(st.integers(2, 6))
    n_kv_heads = draw(st.sampled_from([1, 2]))
    tiny = TinyGemma4(
        layers=draw(st.sampled_from(["sf", "ssf", "fsf", "sfff"])),
        hidden=draw(st.sampled_from([32, 64, 40])),
        width=draw(st.sampled_from([8, 24, 32])),
        dense_width=draw(st.sampled_from([24, 56])),
        n_experts=n_experts,
        top_k=draw(st.integers(1, n_experts)),
        n_heads=2 * draw(st.sampled_from([1, 2])),
        n_kv_heads=n_kv_heads,
        n_full_kv_heads=draw(st.sampled_from([1, 2])),
        head_dim=draw(st.sampled_from([8, 16, 32, 12])),
        full_head_dim=draw(st.sampled_from([16, 32, 24])),
        window=draw(st.sampled_from([4, 12, 100])),
        share=0.25,
        cap=draw(st.sampled_from([None, 5.0, 30.0])),
        shared_value=draw(st.booleans()),
        vocab=draw(st.sampled_from([SMALL_VOCAB, 320])),
        nested=draw(st.booleans()),
        resaved=draw(st.booleans()),
        vision=draw(st.booleans()),
        tied=draw(st.booleans()),
        dtype=draw(DTYPES),
    )
    text = draw(changes_of(_DRAWN, 2)) if draw(st.booleans()) else ()
    outer = draw(changes_of(COMMON, 1)) if draw(st.integers(0, 3)) == 0 else ()
    return Drawn(tiny, draw(HEADS), text, outer)


# what configs are drawn of
CONFIGS = (gemma4(),)
