"""ERNIE-4.5-21B-A3B and ERNIE-4.5-300B-A47B.

Stored names follow transformers' `ernie4_5_moe`; experts are one tensor each. GGUF names, types and
keys are those of llama.cpp's `ernie4_5-moe`. The first layers are dense. A router adds a bias, of
shape (1, E), to the softmax of its logits for the choice of experts, and normalises the weights of
those that it chooses. Heads are rotated in pairs of neighbours, by both programs. A module for
multi-token prediction has no experts, and none of the programs computes it: it stays as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from gguf import Keys

from reap2gguf.errors import UnknownTensorError, UnsupportedModelError
from reap2gguf.models.description import MAX_LAYERS, MAX_WIDTH, Carried, Dropped
from reap2gguf.models.facts import CHOSEN_KEY, FACT_KEYS, WIDTH_KEY, read_n_layers
from reap2gguf.models.from_gguf import full_attention_config
from reap2gguf.models.full_attention import (
    refuse_other_types,
    refuse_partial_attention,
    without_derived_sizes,
)
from reap2gguf.models.layer_types import moe_layers_counted
from reap2gguf.models.rules import (
    ATTENTION,
    ATTN_NORM,
    DENSE_FFN,
    FFN_NORM,
    ROUTER,
    SCORE_BIAS,
    SHARED_EXPERTS,
    TensorRule,
)
from reap2gguf.models.shared import UINT32, DecoderModel, Entry
from reap2gguf.models.tying import TyingKeys

if TYPE_CHECKING:
    from reap2gguf.models.description import ModelFacts, Role
    from reap2gguf.models.gguf_keys import GgufKeys

_BIAS = "moe_statics.e_score_correction_bias"
_SCORE_BIAS = replace(SCORE_BIAS, stored=f"mlp.{_BIAS}", parameter=f"mlp.gate.{_BIAS}", shape="1 E")
_CHOSEN, _SHARED = "moe_k", "moe_num_shared_experts"
_FIRST, _LAST, _STEP = "moe_layer_start_index", "moe_layer_end_index", "moe_layer_interval"
_LEAST, _MTP_KEY = "moe_norm_min", "num_nextn_predict_layers"
_MTP = "model.mtp_"  # what the stored names of the module for multi-token prediction begin with
_LEAST_SUM = 2.0**-14  # by which llama.cpp divides weights, where their sum is smaller
_MOST_SHARED = 2**10
# a key of the published configs or of Baidu's own code, the only value computed here, and why
_FIXED: tuple[tuple[str, Any, str], ...] = (
    ("use_bias", False, "has no biases"),
    ("moe_gate_act", "softmax", "takes a softmax of the router's logits"),
    ("scoring_func", "softmax", "takes a softmax of the router's logits"),
    ("moe_use_aux_free", True, "adds a bias to every router's scores"),
    ("moe_norm_gate_logits", True, "normalises the chosen experts' weights"),
    ("norm_topk_prob", True, "normalises the chosen experts' weights"),
    ("routed_scaling_factor", 1, "does not scale the experts' weights"),
    ("moe_group_experts", False, "has no groups of experts"),
    ("n_group", 1, "has no groups of experts"),
    ("topk_group", 1, "has no groups of experts"),
    ("compression_ratio", 1, "does not compress positions"),
)
_CARRIED = (
    "the module for multi-token prediction (model.mtp_*) is copied as it is, and is in no GGUF "
    "file: llama.cpp has no place for it; it was trained on what all experts compute"
)


class Ernie45Moe(DecoderModel):
    """One ERNIE-4.5 with experts, of text alone."""

    model_type: ClassVar[str] = "ernie4_5_moe"
    gguf_arch: ClassVar[str] = "ernie4_5-moe"
    count_keys = ("moe_num_experts", "num_experts")
    chosen_key = _CHOSEN
    fact_keys = (
        *(key for key in FACT_KEYS if key not in (CHOSEN_KEY, "attention_bias")),
        _CHOSEN,
        _SHARED,
        _FIRST,
        _LAST,
        _STEP,
        _LEAST,
        "intermediate_size",
    )
    # transformers' values of absent keys, in Ernie4_5_MoeConfig
    defaults: ClassVar[Mapping[str, int]] = {"num_key_value_heads": 4}
    epsilon = ("rms_norm_eps", 1e-5)
    default_theta = 500_000.0
    tying_keys = TyingKeys(default=True)

    @classmethod
    def config_from_gguf(cls, keys: GgufKeys) -> dict[str, Any]:
        llm = Keys.LLM
        config = full_attention_config(keys)
        n_layers, width = config["num_hidden_layers"], config[WIDTH_KEY]
        keys.expect(llm.INTERLEAVE_MOE_LAYER_STEP, 1, why="llama.cpp loads no other step")
        shared = keys.integer(llm.EXPERT_SHARED_FEED_FORWARD_LENGTH, 0, MAX_WIDTH, default=0)
        if shared % width:
            raise UnsupportedModelError(
                f"{keys.where}: {keys.arch}.expert_shared_feed_forward_length is {shared}, "
                f"expected a multiple of an expert's width, {width}"
            )
        renamed = {"num_experts": "moe_num_experts", CHOSEN_KEY: _CHOSEN}
        found = {renamed.get(key, key): value for key, value in config.items()}
        return {
            "architectures": ["Ernie4_5_MoeForCausalLM"],
            "model_type": cls.model_type,
            **found,
            "intermediate_size": keys.integer(llm.FEED_FORWARD_LENGTH, 1, MAX_WIDTH),
            _FIRST: keys.integer(llm.LEADING_DENSE_BLOCK_COUNT, 0, n_layers, default=0),
            _LAST: n_layers - 1,
            _STEP: 1,
            _SHARED: shared // width,
        }

    def read_facts(self) -> ModelFacts:
        read, arch = self.text, f"llama.cpp's {self.gguf_arch}"
        refuse_other_types(self)
        self.refuse_common()
        read.refuse_spellings((_CHOSEN, CHOSEN_KEY))
        for key, value, what in _FIXED:
            read.expect(key, value, why=f"{arch} {what}")
        read.expect("sliding_window", why=f"{arch} has full attention")
        read.expect(_STEP, 1, why=f"{arch} loads experts for all layers after the dense ones")
        read.number(_LEAST, low=0, high=_LEAST_SUM, default=0)
        last = read_n_layers(read) - 1
        if (end := read.values.get(_LAST, -1)) != -1:
            found = read.integer(_LAST, high=MAX_LAYERS)
            if found < last:
                raise UnsupportedModelError(
                    f"{read.where}: {_LAST} is {end}, expected {last}, the last layer: {arch} has "
                    "no dense layers after those with experts"
                )
        facts = self.common_facts(moe_layers_counted(read, _FIRST, default=1))
        refuse_partial_attention(self, facts)
        return facts

    @cached_property
    def n_shared(self) -> int:
        """How many experts every token goes through, stored as one."""
        return self.text.integer(_SHARED, high=_MOST_SHARED, default=2)  # transformers' default

    def dense_width(self) -> int:
        return self.text.integer("intermediate_size", low=1, high=MAX_WIDTH)

    def config_values(self) -> dict[str, Any]:
        head_dim = self.text.values.get("head_dim")
        sizes = super().config_values()
        if head_dim is None:
            del sizes["head_dim"]  # transformers' config has none then
        return {
            **sizes,
            "intermediate_size": self.dense_width(),
            _SHARED: self.n_shared,
            _FIRST: self.text.integer(_FIRST, default=1),
            _STEP: 1,
            "use_bias": False,
        }

    def sizes(self) -> Mapping[str, int]:
        shared = self.n_shared * self.facts.expert_width
        return {**super().sizes(), "I": self.dense_width(), "S": shared}

    def rules(self, layer: int) -> tuple[TensorRule, ...]:
        sparse = (ROUTER, _SCORE_BIAS, *(SHARED_EXPERTS if self.n_shared else ()))
        ffn = sparse if layer in self.sparse_layers else DENSE_FFN
        return (ATTN_NORM, *ATTENTION, FFN_NORM, *ffn)

    def header(self) -> list[Entry]:
        llm, shared = Keys.LLM, self.sizes()["S"]
        return [
            *without_derived_sizes(self, super().header()),
            (llm.INTERLEAVE_MOE_LAYER_STEP, 1, UINT32),
            (llm.LEADING_DENSE_BLOCK_COUNT, self.facts.moe_layers[0], UINT32),
            (llm.EXPERT_SHARED_COUNT, self.n_shared, UINT32),
            # llama.cpp's converter divides intermediate_size by the number of key-value heads,
            # which is this in the published model
            (llm.EXPERT_SHARED_FEED_FORWARD_LENGTH, shared or None, UINT32),
        ]

    # multi-token prediction

    def _role(self, name: str) -> Role | None:
        if not name.startswith(_MTP):
            return super()._role(name)
        if not self.keep_mtp:
            return Dropped()
        if ".experts." in name:
            raise UnknownTensorError(
                f"tensor {name!r}: the module for multi-token prediction has experts, which cannot "
                "be pruned with the others, expected a dense one, as in the published models; pass "
                "--mtp drop to leave it out"
            )
        return Carried()

    @cached_property
    def _stores_module(self) -> bool:
        return any(name.startswith(_MTP) for name in self.names)

    def pruned_config(self, n_experts: int) -> dict[str, Any]:
        config = super().pruned_config(n_experts)
        if _MTP_KEY in config and not (self.keep_mtp and self._stores_module):
            config[_MTP_KEY] = 0
        return config

    def caveats(self) -> tuple[str, ...]:
        found = super().caveats()
        return (*found, _CARRIED) if self.keep_mtp and self._stores_module else found
