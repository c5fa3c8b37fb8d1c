"""GLM-4.5-Air, GLM-4.5, GLM-4.6 and GLM-4.7.

Stored names follow transformers' `glm4_moe`; experts are one tensor each (2D, as published) or one
tensor per layer (3D). GGUF names, types and keys are those of llama.cpp's `glm4moe`. A router adds
a bias to the sigmoids of its logits for the choice of experts, in one group. The MTP block is one
more decoder layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from gguf import Keys

from reap2gguf.errors import UnsupportedModelError
from reap2gguf.messages import shown
from reap2gguf.models.description import MAX_WIDTH
from reap2gguf.models.facts import FACT_KEYS, read_n_layers
from reap2gguf.models.from_gguf import common_config
from reap2gguf.models.linear_from_gguf import rotated_share
from reap2gguf.models.nextn import NextnDecoder
from reap2gguf.models.rope import Rope, check_rotary_width, read_rope
from reap2gguf.models.rules import (
    ATTENTION,
    ATTN_NORM,
    DENSE_FFN,
    QK_NORMS,
    QKV_BIASES,
    ROUTER,
    SCORE_BIAS,
    SHARED_EXPERTS,
    TensorRule,
)
from reap2gguf.models.scored_router import (
    Scores,
    read_scale,
    router_config,
    router_entries,
)
from reap2gguf.models.shared import UINT32, Entry

if TYPE_CHECKING:
    from reap2gguf.models.description import ModelFacts
    from reap2gguf.models.gguf_keys import GgufKeys

_POST_NORM = TensorRule("post_attention_layernorm.weight", "post_attention_norm.weight", "H")
_DENSE_KEY = "first_k_dense_replace"


class Glm4Moe(NextnDecoder):
    """One GLM-4.5, 4.6 or 4.7."""

    model_type: ClassVar[str] = "glm4_moe"
    gguf_arch: ClassVar[str] = "glm4moe"
    count_keys = ("n_routed_experts", "num_local_experts")
    has_attention_biases = True
    epsilon = ("rms_norm_eps", 1e-5)
    fact_keys = (
        *FACT_KEYS,
        "intermediate_size",
        _DENSE_KEY,
        "n_shared_experts",
        "n_group",
        "topk_group",
        "norm_topk_prob",
        "routed_scaling_factor",
        "use_qk_norm",
        "num_mtp_layers",
    )
    defaults: ClassVar[Mapping[str, int]] = {"num_key_value_heads": 8}

    @classmethod
    def config_from_gguf(cls, keys: GgufKeys) -> dict[str, Any]:
        config = common_config(keys, scores=Scores.SIGMOID)
        share = rotated_share(keys, config["head_dim"])
        last = config["num_hidden_layers"] - 1
        return {
            "architectures": ["Glm4MoeForCausalLM"],
            "model_type": cls.model_type,
            **config,
            **router_config(keys),
            "attention_bias": f"blk.0.{QKV_BIASES[0].gguf}" in keys.tensors,
            "intermediate_size": keys.integer(Keys.LLM.FEED_FORWARD_LENGTH, 1, MAX_WIDTH),
            "rope_parameters": config["rope_parameters"] | {"partial_rotary_factor": share},
            "use_qk_norm": f"blk.0.{QK_NORMS[0].gguf}" in keys.tensors,
            "n_routed_experts": config.pop("num_experts"),
            _DENSE_KEY: keys.integer(Keys.LLM.LEADING_DENSE_BLOCK_COUNT, 0, last, default=0),
        }

    def read_facts(self) -> ModelFacts:
        read = self.text
        if (found := self.config.get("model_type")) != self.model_type:
            raise UnsupportedModelError(
                f"{read.where}: model_type is {shown(found)}, expected '{self.model_type}': "
                "transformers chooses the architecture by it"
            )
        self.refuse_common()
        for key in ("n_group", "topk_group"):
            read.expect(key, 1, why="these models have no groups of experts")
        read.expect("mlp_layer_types", why=f"transformers reads {_DENSE_KEY} instead")
        # by these, transformers' cache would forget tokens
        full = ["full_attention"] * read_n_layers(read)
        why = f"llama.cpp's {self.gguf_arch} has full attention"
        read.expect("sliding_window", why=why)
        read.expect("layer_types", full, why=why)
        self.has_biases = read.boolean("attention_bias", default=False)
        self.has_qk_norms = read.boolean("use_qk_norm", default=False)
        facts = self.facts_with_block(self._moe_layers())
        check_rotary_width(self.rope, self._rotary_width(facts.head_dim), facts.head_dim)
        return facts

    def _moe_layers(self) -> range:
        n_layers = read_n_layers(self.text)
        # transformers' default
        first = self.text.integer(_DENSE_KEY, high=n_layers - 1, default=1)
        return range(first, n_layers)

    @cached_property
    def rope(self) -> Rope:
        return read_rope(self.text, default_share=0.5)

    def _rotary_width(self, head_dim: int) -> int:
        """The dimensions of a head that are rotated: the first ones."""
        return int(head_dim * self.rope.values.number("partial_rotary_factor", low=0, high=1))

    def dense_width(self) -> int:
        return self.text.integer("intermediate_size", low=1, high=MAX_WIDTH)

    def config_values(self) -> dict[str, Any]:
        return {
            **super().config_values(),
            _DENSE_KEY: self.facts.moe_layers[0],
            "attention_bias": self.has_biases,
            "intermediate_size": self.dense_width(),
            "n_shared_experts": self._n_shared,
            "norm_topk_prob": self._normalises,
            "routed_scaling_factor": read_scale(self.text),
            "use_qk_norm": self.has_qk_norms,
        }

    @property
    def _n_shared(self) -> int:
        return self.text.integer("n_shared_experts", low=1)

    @property
    def _normalises(self) -> bool:
        return self.text.boolean("norm_topk_prob", default=True)

    def sizes(self) -> Mapping[str, int]:
        shared = self._n_shared * self.facts.expert_width
        return {**super().sizes(), "I": self.dense_width(), "S": shared}

    def rules(self, layer: int) -> tuple[TensorRule, ...]:
        is_sparse = layer in self.sparse_layers
        return (
            ATTN_NORM,
            *ATTENTION,
            *(QKV_BIASES if self.has_biases else ()),
            *(QK_NORMS if self.has_qk_norms else ()),
            _POST_NORM,
            *((ROUTER, SCORE_BIAS, *SHARED_EXPERTS) if is_sparse else DENSE_FFN),
        )

    def header(self) -> list[Entry]:
        first = self.facts.moe_layers[0]
        return [
            *super().header(),
            (Keys.Rope.DIMENSION_COUNT, self._rotary_width(self.facts.head_dim), UINT32),
            (Keys.LLM.EXPERT_GROUP_COUNT, 1, UINT32),
            (Keys.LLM.EXPERT_GROUP_USED_COUNT, 1, UINT32),
            *router_entries(self.text, first, Scores.SIGMOID, normalises=True),
        ]
