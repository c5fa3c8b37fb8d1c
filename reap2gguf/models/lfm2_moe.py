"""LFM2-MoE (LFM2-8B-A1B, LFM2-24B-A2B): short convolutions between layers with attention.

Stored names follow transformers' `lfm2_moe`; experts are one tensor each. GGUF names, types and
keys are those of llama.cpp's `lfm2moe`, where layers without key-value heads are convolutions and
the norm after the last layer is called token_embd_norm.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from gguf import Keys

from reap2gguf.errors import UnsupportedModelError
from reap2gguf.messages import shown
from reap2gguf.models.description import MAX_LAYERS, MAX_WIDTH, Floats, Transform
from reap2gguf.models.experts import ExpertLayout
from reap2gguf.models.facts import FACT_KEYS, read_n_layers
from reap2gguf.models.from_gguf import common_config, kv_heads_by_layer
from reap2gguf.models.layer_types import FULL
from reap2gguf.models.rope import check_rotary_width
from reap2gguf.models.rules import EMBEDDING, HEAD, QK_NORMS, TensorRule
from reap2gguf.models.scored_router import Scores
from reap2gguf.models.shared import ARRAY, UINT32, DecoderModel, Entry
from reap2gguf.models.tying import KEY as TIE_KEY
from reap2gguf.models.tying import TyingKeys

if TYPE_CHECKING:
    from reap2gguf.models.description import ModelFacts
    from reap2gguf.models.gguf_keys import GgufKeys

CONV = "conv"
_NORM = TensorRule("{text}embedding_norm.weight", "token_embd_norm.weight", "H")
_NORMS = (
    TensorRule("operator_norm.weight", "attn_norm.weight", "H"),
    TensorRule("ffn_norm.weight", "ffn_norm.weight", "H"),
)
_SHORT_CONVOLUTION = (
    TensorRule(
        "conv.conv.weight",
        "shortconv.conv.weight",
        "H 1 kernel",
        gguf_shape="H kernel",
        always_f32=True,
    ),
    TensorRule("conv.in_proj.weight", "shortconv.in_proj.weight", "3H H"),
    TensorRule("conv.out_proj.weight", "shortconv.out_proj.weight", "H H"),
)
_ATTENTION = (
    TensorRule("self_attn.q_proj.weight", "attn_q.weight", "H H"),
    TensorRule("self_attn.k_proj.weight", "attn_k.weight", "KV H", input_of="self_attn.q_proj"),
    TensorRule("self_attn.v_proj.weight", "attn_v.weight", "KV H", input_of="self_attn.q_proj"),
    TensorRule("self_attn.out_proj.weight", "attn_output.weight", "H H"),
    replace(QK_NORMS[0], stored="self_attn.q_layernorm.weight"),
    replace(QK_NORMS[1], stored="self_attn.k_layernorm.weight"),
)
_DENSE_FFN = (
    TensorRule("feed_forward.w1.weight", "ffn_gate.weight", "I H"),
    TensorRule("feed_forward.w3.weight", "ffn_up.weight", "I H", input_of="feed_forward.w1"),
    TensorRule("feed_forward.w2.weight", "ffn_down.weight", "H I"),
)
_ROUTER = (
    TensorRule("feed_forward.gate.weight", "ffn_gate_inp.weight", "E H", always_f32=True),
    TensorRule("feed_forward.expert_bias", "exp_probs_b.bias", "E"),
)


def _put_back_convolution(values: Floats, stored: Floats) -> None:
    stored[...] = values.reshape(stored.shape)


# llama.cpp's convolution has no axis of one
_SQUEEZED = Transform(lambda values: np.squeeze(values, 1), _put_back_convolution)


class Lfm2Moe(DecoderModel):
    """One LFM2-MoE model."""

    model_type: ClassVar[str] = "lfm2_moe"
    gguf_arch: ClassVar[str] = "lfm2moe"
    norm_module: ClassVar[str] = "embedding_norm"
    outer = (EMBEDDING, _NORM, HEAD)
    experts = ExpertLayout(
        path="feed_forward.experts",
        module="feed_forward.experts",
        gate="w1",
        up="w3",
        down="w2",
    )
    count_keys = ("num_experts",)  # transformers has no other spelling for this family
    fact_keys = (
        *FACT_KEYS,
        "norm_eps",
        "intermediate_size",
        "num_dense_layers",
        "conv_L_cache",
        "conv_bias",
        "use_expert_bias",
        "routed_scaling_factor",
        "norm_topk_prob",
        "tie_embedding",
    )
    # transformers' values of absent keys, in Lfm2MoeConfig
    defaults: ClassVar[Mapping[str, int]] = {"num_key_value_heads": 8}
    epsilon = ("norm_eps", 1e-5)
    default_theta = 1_000_000.0
    tying_keys = TyingKeys(default=True, alias="tie_embedding")

    @classmethod
    def config_from_gguf(cls, keys: GgufKeys) -> dict[str, Any]:
        has_attention, n_kv_heads = kv_heads_by_layer(keys)
        config = common_config(keys, Scores.SIGMOID, n_kv_heads)
        n_layers, llm = config["num_hidden_layers"], Keys.LLM
        why = "whole heads are rotated"
        keys.expect(Keys.Rope.DIMENSION_COUNT, config["head_dim"], why=why)
        return {
            "architectures": ["Lfm2MoeForCausalLM"],
            "model_type": cls.model_type,
            **{key: value for key, value in config.items() if key != "rms_norm_eps"},
            "norm_eps": config["rms_norm_eps"],
            "intermediate_size": keys.integer(llm.FEED_FORWARD_LENGTH, 1, MAX_WIDTH),
            "layer_types": [FULL if one else CONV for one in has_attention],
            # llama.cpp's value of an absent key
            "num_dense_layers": keys.integer(llm.LEADING_DENSE_BLOCK_COUNT, 0, n_layers, default=0),
            "conv_L_cache": keys.integer(Keys.ShortConv.L_CACHE, 2, MAX_WIDTH),
            "norm_topk_prob": True,
        }

    def read_facts(self) -> ModelFacts:
        read = self.reader
        if (found := self.config.get("model_type")) != self.model_type:
            raise UnsupportedModelError(
                f"{read.where}: model_type is {shown(found)}, expected '{self.model_type}': "
                "transformers chooses the architecture by it"
            )
        self._refuse()
        n_layers = read_n_layers(read)
        self.layer_types = self._read_layer_types(n_layers)
        n_dense = read.integer("num_dense_layers", high=MAX_LAYERS, default=2)
        facts = self.common_facts(range(n_dense, n_layers))
        hidden, n_heads = facts.hidden_size, facts.n_heads
        if hidden % n_heads or facts.head_dim != hidden // n_heads:
            raise UnsupportedModelError(
                f"{read.where}: {n_heads} heads of size {facts.head_dim}, expected head_dim times "
                f"num_attention_heads to be hidden_size, {hidden}: llama.cpp's {self.gguf_arch} "
                "computes with no other size of heads"
            )
        why = f"llama.cpp's {self.gguf_arch} rotates whole heads"
        self.rope.values.expect("partial_rotary_factor", 1, why=why)
        check_rotary_width(self.rope, facts.head_dim, facts.head_dim)
        return facts if self.layer_types[0] == FULL else replace(facts, first_gqa=0)

    def _refuse(self) -> None:
        """Refuse, by name, what llama.cpp's lfm2moe does not do."""
        self.refuse_common()
        read, arch = self.reader, f"llama.cpp's {self.gguf_arch}"
        read.refuse_spellings(("tie_embedding", TIE_KEY))
        read.refuse_spellings(("norm_eps", "rms_norm_eps"))
        read.expect("conv_bias", False, why=f"{arch} has no biases")
        read.expect("use_expert_bias", True, why=f"{arch} adds a bias to every router's scores")
        read.expect("norm_topk_prob", True, why=f"{arch} normalises the experts' weights")
        read.expect("routed_scaling_factor", 1, why=f"{arch} does not scale the experts' weights")

    def _read_layer_types(self, n_layers: int) -> tuple[str, ...]:
        types = self.reader.values.get("layer_types")
        known = (CONV, FULL)
        if (
            not isinstance(types, list)
            or len(types) != n_layers
            or any(one not in known for one in types)
        ):
            raise UnsupportedModelError(
                f"{self.reader.where}: layer_types is {shown(types)}, expected {n_layers} of "
                f"{CONV} and {FULL}"
            )
        for one in known:
            if one not in types:
                raise UnsupportedModelError(
                    f"{self.reader.where}: no layer of layer_types is {one}, expected layers of "
                    "both kinds: transformers fails without attention, llama.cpp without conv"
                )
        return tuple(types)

    @cached_property
    def kernel(self) -> int:
        """How many tokens a convolution reaches over, its own included."""
        # transformers' value of an absent key
        return self.reader.integer("conv_L_cache", low=2, high=MAX_WIDTH, default=3)

    def dense_width(self) -> int:
        return self.reader.integer("intermediate_size", low=1, high=MAX_WIDTH)

    def config_values(self) -> dict[str, Any]:
        return {
            **super().config_values(),
            "layer_types": list(self.layer_types),
            "num_dense_layers": self.facts.moe_layers[0],
            "intermediate_size": self.dense_width(),
            "conv_L_cache": self.kernel,
            "conv_bias": False,
            "use_expert_bias": True,
            "norm_topk_prob": True,
            "routed_scaling_factor": 1.0,
        }

    def sizes(self) -> Mapping[str, int]:
        return {**super().sizes(), "I": self.dense_width(), "kernel": self.kernel}

    def rules(self, layer: int) -> tuple[TensorRule, ...]:
        mixer = _SHORT_CONVOLUTION if self.layer_types[layer] == CONV else _ATTENTION
        return (*_NORMS, *mixer, *(_ROUTER if layer in self.sparse_layers else _DENSE_FFN))

    def transform(self, rule: TensorRule) -> Transform | None:
        return _SQUEEZED if rule.gguf == "shortconv.conv.weight" else None

    def header(self) -> list[Entry]:
        facts, llm, attention = self.facts, Keys.LLM, Keys.Attention
        kv_heads = [facts.n_kv_heads if one == FULL else 0 for one in self.layer_types]
        # the size of a head is its share of the hidden size, and has no key
        others = (attention.HEAD_COUNT_KV, attention.KEY_LENGTH, attention.VALUE_LENGTH)
        return [
            *(entry for entry in super().header() if entry[0] not in others),
            (attention.HEAD_COUNT_KV, kv_heads, ARRAY),
            (llm.LEADING_DENSE_BLOCK_COUNT, facts.moe_layers[0], UINT32),
            (llm.EXPERT_GATING_FUNC, int(Scores.SIGMOID), UINT32),
            (llm.VOCAB_SIZE, facts.vocab_size, UINT32),
            (Keys.ShortConv.L_CACHE, self.kernel, UINT32),
        ]
