"""Gemma-4-26B-A4B: sliding windows, and a dense feed-forward beside the experts.

The published layout nests the text model (`text_config`, `model.language_model.*`); a text model
alone is flat. All experts of a layer are two tensors (3D), and GGUF keeps gate and up together.
Layers with full attention have larger heads, fewer of them for keys, and take the keys as values.
GGUF names, types and keys are those of llama.cpp's `gemma4`.

The vision tower stays in the safetensors as it is, and becomes llama.cpp's projector file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from gguf import Keys

from reap2gguf.errors import UnsupportedModelError
from reap2gguf.messages import shown
from reap2gguf.models.description import MAX_WIDTH, GgufTensor, made_tensor
from reap2gguf.models.experts import ExpertLayout
from reap2gguf.models.facts import FACT_KEYS, read_n_layers, refuse_model_types
from reap2gguf.models.gemma4_config import (
    SLIDING,
    config_of_header,
    read_full_heads,
    read_ropes,
    read_types,
)
from reap2gguf.models.gemma_vision import gemma_projector, why_not_written
from reap2gguf.models.layer_types import FULL
from reap2gguf.models.qwen_vision import tower_caveats
from reap2gguf.models.rules import ATTENTION, ATTN_NORM, DENSE_FFN, QK_NORMS, ROUTER, TensorRule
from reap2gguf.models.shared import ARRAY, FLOAT32, UINT32, DecoderModel, Entry
from reap2gguf.models.tying import TyingKeys

if TYPE_CHECKING:
    from pathlib import Path

    from reap2gguf.checkpoint.safetensors_header import StoredTensor
    from reap2gguf.models.description import ModelFacts, SideFile
    from reap2gguf.models.gguf_keys import GgufKeys
    from reap2gguf.models.rope import Rope

_CAP = "final_logit_softcapping"
_MOST = 1e6
# llama.cpp divides a pair's angle by it: those that are not rotated do not turn
_STILL = 1e30
_FREQUENCIES = "rope_freqs.weight"
_VALUE = "attn_v.weight"
_OF_LAYERS = ("head_dim", "num_key_value_heads")
_GLOBAL = {"Q H": "GQ H", "KV H": "GKV H", "H Q": "H GQ", "D": "GD"}


def _global(rule: TensorRule) -> TensorRule:
    """The rule of the same tensor in a layer with full attention."""
    return replace(rule, shape=_GLOBAL[rule.shape])


_NORMS = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
    "post_feedforward_layernorm_1": "post_ffw_norm_1",
    "post_feedforward_layernorm_2": "post_ffw_norm_2",
    "pre_feedforward_layernorm_2": "pre_ffw_norm_2",
}
_BESIDE = (
    *(TensorRule(f"{name}.weight", f"{gguf}.weight", "H") for name, gguf in _NORMS.items()),
    TensorRule("layer_scalar", "layer_output_scale.weight", "1"),
    *DENSE_FFN,
    replace(ROUTER, stored="router.proj.weight"),
    TensorRule("router.scale", "ffn_gate_inp.scale", "H"),
    # llama.cpp multiplies what an expert gives by it, transformers the expert's weight
    TensorRule("router.per_expert_scale", "ffn_down_exps.scale", "E"),
)


class Gemma4(DecoderModel):
    """One Gemma-4 with experts."""

    model_type: ClassVar[str] = "gemma4"
    gguf_arch: ClassVar[str] = "gemma4"
    text_sections = ("text_config",)
    carried_prefixes = (
        "model.vision_tower.",
        "model.embed_vision.",
        "model.audio_tower.",
        "model.embed_audio.",
    )
    experts = ExpertLayout(path="experts", module="experts", projections=("gate_up", "down"))
    count_keys = ("num_experts",)  # transformers has no other spelling for this family
    chosen_key = "top_k_experts"
    activation = ("hidden_activation", "gelu_pytorch_tanh", "GeGLU")
    has_layer_sizes = True
    # transformers' values of absent keys, in Gemma4TextConfig
    defaults: ClassVar[Mapping[str, int]] = {"num_key_value_heads": 4, "head_dim": 256}
    fact_keys = (
        *(key for key in FACT_KEYS if key not in ("hidden_act", "num_experts_per_tok")),
        "hidden_activation",
        "top_k_experts",
        "intermediate_size",
        "sliding_window",
        "attention_k_eq_v",
        "enable_moe_block",
        "hidden_size_per_layer_input",
        "num_kv_shared_layers",
        "use_double_wide_mlp",
        "per_layer_config",
        "global_head_dim",
    )
    tying_keys = TyingKeys(default=True)

    @classmethod
    def config_from_gguf(cls, keys: GgufKeys) -> dict[str, Any]:
        return {
            "architectures": ["Gemma4ForCausalLM"],
            "model_type": f"{cls.model_type}_text",
            **config_of_header(keys),
        }

    def read_facts(self) -> ModelFacts:
        refuse_model_types(self.reader, self.text, self.model_type)
        self._refuse()
        n_layers = read_n_layers(self.text)
        self.layer_types = read_types(self.text, n_layers)
        self.is_shared_value = self.text.boolean("attention_k_eq_v", default=False)
        facts = self.common_facts(range(n_layers))
        self.full = read_full_heads(self.text, self.layer_types, self.is_shared_value)
        if facts.n_heads % self.full.n_kv_heads:
            raise UnsupportedModelError(
                f"{self.text.where}: num_attention_heads is {facts.n_heads}, expected a multiple "
                f"of the {self.full.n_kv_heads} key-value heads of layers with full attention"
            )
        first = self.full.n_kv_heads if self.layer_types[0] == FULL else facts.n_kv_heads
        return replace(facts, first_gqa=facts.n_heads // first)

    def _refuse(self) -> None:
        """Refuse, by name, what the larger and the smaller models of the family have instead."""
        self.refuse_common()
        read = self.text
        if not read.boolean("enable_moe_block", default=False):
            raise UnsupportedModelError(
                f"{read.where}: enable_moe_block is not true: the model has no experts to prune; "
                "pass a Mixture-of-Experts model, such as Gemma-4-26B-A4B"
            )
        # transformers' default is 256
        if read.integer("hidden_size_per_layer_input", high=MAX_WIDTH, default=256):
            raise UnsupportedModelError(
                f"{read.where}: hidden_size_per_layer_input is "
                f"{shown(read.values.get('hidden_size_per_layer_input', 256))}, expected 0: "
                "embeddings of each layer are not implemented; no published model with experts "
                "has them"
            )
        why = "no layer takes keys and values of another"
        read.expect("num_kv_shared_layers", 0, why=why)
        why = "every token of a text attends to those before it"
        read.expect("use_bidirectional_attention", "vision", why=why)
        read.boolean("use_double_wide_mlp", default=False)  # of layers with shared keys alone

    @cached_property
    def ropes(self) -> Mapping[str, Rope]:
        """The rotary embedding of each type of layers."""
        return read_ropes(self.text)

    @cached_property
    def rope(self) -> Rope:
        return self.ropes[FULL]

    @property
    def window(self) -> int:
        """How many tokens a layer with a sliding window attends to, its own included."""
        # transformers' value of an absent key
        return self.text.integer("sliding_window", low=1, default=512)

    @property
    def logit_cap(self) -> float | None:
        if self.text.values.get(_CAP) is None:
            return None
        return self.text.number(_CAP, low=1e-3, high=_MOST)

    @property
    def scales_experts(self) -> bool:
        return True

    @property
    def text_prefix(self) -> str:
        return "model.language_model." if self.is_nested else "model."

    def dense_width(self) -> int:
        return self.text.integer("intermediate_size", low=1, high=MAX_WIDTH)

    def config_values(self) -> dict[str, Any]:
        found = super().config_values()
        return {
            **{key: value for key, value in found.items() if key not in _OF_LAYERS},
            "rope_parameters": {kind: rope.config_values() for kind, rope in self.ropes.items()},
            "layer_types": list(self.layer_types),
            "intermediate_size": self.dense_width(),
            "sliding_window": self.window,
            "attention_k_eq_v": self.is_shared_value,
            "enable_moe_block": True,
            "hidden_size_per_layer_input": 0,
            "num_kv_shared_layers": 0,
            _CAP: self.logit_cap,
        }

    def config_values_of_layers(self) -> Mapping[int, Mapping[str, Any]]:
        facts, full = self.facts, self.full
        heads = {
            SLIDING: {"head_dim": facts.head_dim, "num_key_value_heads": facts.n_kv_heads},
            FULL: {"head_dim": full.head_dim, "num_key_value_heads": full.n_kv_heads},
        }
        return {layer: heads[one] for layer, one in enumerate(self.layer_types)}

    def sizes(self) -> Mapping[str, int]:
        return {
            **super().sizes(),
            "I": self.dense_width(),
            "GD": self.full.head_dim,
            "GQ": self.facts.n_heads * self.full.head_dim,
            "GKV": self.full.n_kv_heads * self.full.head_dim,
        }

    def rules(self, layer: int) -> tuple[TensorRule, ...]:
        attention: tuple[TensorRule, ...] = (*ATTENTION, *QK_NORMS)
        if self.layer_types[layer] == FULL:
            attention = tuple(
                _global(rule)
                for rule in attention
                if rule.gguf != _VALUE or not self.is_shared_value
            )
        return (ATTN_NORM, *attention, *_BESIDE)

    def _gguf_tensors(self, stored: Mapping[str, StoredTensor]) -> Iterator[GgufTensor]:
        pairs = self.full.head_dim // 2
        values = np.full(pairs, _STILL, np.float32)
        values[: self._rotated_pairs] = 1
        yield made_tensor(_FREQUENCIES, values, "rope_parameters of config.json")
        yield from super()._gguf_tensors(stored)

    @property
    def _rotated_pairs(self) -> int:
        """How many pairs of a head are rotated in a layer with full attention: the first ones."""
        share = self.rope.values.number("partial_rotary_factor", low=0, high=1)
        return int(share * self.full.head_dim // 2)

    def header(self) -> list[Entry]:
        facts, llm, attention, rope = self.facts, Keys.LLM, Keys.Attention, Keys.Rope
        is_sliding = [one == SLIDING for one in self.layer_types]
        kv_heads = [facts.n_kv_heads if one else self.full.n_kv_heads for one in is_sliding]
        others = (attention.HEAD_COUNT_KV, attention.KEY_LENGTH, attention.VALUE_LENGTH)
        return [
            *(entry for entry in super().header() if entry[0] not in others),
            (attention.HEAD_COUNT_KV, kv_heads, ARRAY),
            (attention.KEY_LENGTH, self.full.head_dim, UINT32),
            (attention.VALUE_LENGTH, self.full.head_dim, UINT32),
            (attention.KEY_LENGTH_SWA, facts.head_dim, UINT32),
            (attention.VALUE_LENGTH_SWA, facts.head_dim, UINT32),
            # llama.cpp's converter leaves out none, for which llama.cpp takes 30; 0 is none
            (llm.FINAL_LOGIT_SOFTCAPPING, self.logit_cap or 0.0, FLOAT32),
            (attention.SLIDING_WINDOW, self.window, UINT32),
            (attention.SLIDING_WINDOW_PATTERN, is_sliding, ARRAY),
            (attention.SHARED_KV_LAYERS, 0, UINT32),
            (llm.EMBD_LENGTH_PER_LAYER_INP, 0, UINT32),
            (rope.DIMENSION_COUNT, self.full.head_dim, UINT32),
            (rope.DIMENSION_COUNT_SWA, facts.head_dim, UINT32),
            (rope.FREQ_BASE_SWA, self.ropes[SLIDING].theta, FLOAT32),
        ]

    def caveats(self) -> tuple[str, ...]:
        found = [*super().caveats()]
        found += tower_caveats(self.has_tower, bool(self.reader.section("vision_config")))
        if self.has_tower and (why := why_not_written(self.reader, self.names)):
            found.append(
                f"no projector file (mmproj) is written, because {why}: images need the "
                "safetensors, or the mmproj file of the unpruned model, which pruning does not "
                "change"
            )
        return tuple(found)

    @property
    def has_tower(self) -> bool:
        """Whether the checkpoint holds a tower."""
        return any(name.startswith(self.carried_prefixes) for name in self.names)

    def side_files(self, folder: Path, stored: Mapping[str, StoredTensor]) -> tuple[SideFile, ...]:
        if not self.has_tower or why_not_written(self.reader, self.names):
            return ()
        return (gemma_projector(self.reader, folder, stored, self.facts.hidden_size),)
