"""Qwen2-MoE (Qwen1.5-MoE-A2.7B, Qwen2-57B-A14B): Qwen3-MoE's relative with a shared expert.

Its attention has biases in place of norms, and the chosen experts' weights are not normalised.
GGUF names, types and keys are those of llama.cpp's `qwen2moe`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from gguf import Keys

from reap2gguf.models.description import MAX_WIDTH
from reap2gguf.models.full_attention import refuse_other_widths, refuse_tied
from reap2gguf.models.qwen3_moe import Qwen3Moe
from reap2gguf.models.rules import (
    ATTENTION,
    ATTN_NORM,
    DENSE_FFN,
    FFN_NORM,
    QKV_BIASES,
    ROUTER,
    SHARED_EXPERT,
    TensorRule,
)
from reap2gguf.models.scored_router import NOT_NORMALISED
from reap2gguf.models.shared import UINT32, Entry

if TYPE_CHECKING:
    from reap2gguf.models.description import ModelFacts
    from reap2gguf.models.gguf_keys import GgufKeys

_SHARED_WIDTH = "shared_expert_intermediate_size"


class Qwen2Moe(Qwen3Moe):
    """One Qwen2-MoE model."""

    model_type: ClassVar[str] = "qwen2_moe"
    gguf_arch: ClassVar[str] = "qwen2moe"
    fact_keys = (*Qwen3Moe.fact_keys, "qkv_bias", _SHARED_WIDTH)
    defaults: ClassVar[Mapping[str, int]] = {"num_key_value_heads": 16}

    def read_facts(self) -> ModelFacts:
        facts = super().read_facts()
        self.has_biases = self.text.boolean("qkv_bias", default=True)
        refuse_other_widths(self, facts)
        refuse_tied(self, facts)
        return facts

    def check_routing(self) -> None:
        why = "llama.cpp's qwen2moe does not normalise the chosen experts' weights"
        self.text.expect("norm_topk_prob", False, why=why)

    @classmethod
    def config_from_gguf(cls, keys: GgufKeys) -> dict[str, Any]:
        llm = Keys.LLM
        # llama.cpp's value of an absent key
        dense = keys.integer(llm.FEED_FORWARD_LENGTH, 0, MAX_WIDTH, default=0) or None
        shared = llm.EXPERT_SHARED_FEED_FORWARD_LENGTH
        return {
            **super().config_from_gguf(keys),
            "architectures": ["Qwen2MoeForCausalLM"],
            "norm_topk_prob": False,
            "qkv_bias": bool(keys.blocks_with("attn_q.bias")),
            _SHARED_WIDTH: keys.integer(shared, 1, MAX_WIDTH, default=dense),
        }

    def config_values(self) -> dict[str, Any]:
        return {
            **super().config_values(),
            "norm_topk_prob": False,
            "qkv_bias": self.has_biases,
            "sliding_window": 0,  # transformers' for none
            _SHARED_WIDTH: self.sizes()["S"],
        }

    def sizes(self) -> Mapping[str, int]:
        # transformers' value of an absent key, in Qwen2MoeConfig
        width = self.text.integer(_SHARED_WIDTH, low=1, high=MAX_WIDTH, default=5632)
        return {**super().sizes(), "S": width}

    def rules(self, layer: int) -> tuple[TensorRule, ...]:
        ffn = (ROUTER, *SHARED_EXPERT) if layer in self.sparse_layers else DENSE_FFN
        biases = QKV_BIASES if self.has_biases else ()
        return (ATTN_NORM, *ATTENTION, *biases, FFN_NORM, *ffn)

    def header(self) -> list[Entry]:
        shared = (Keys.LLM.EXPERT_SHARED_FEED_FORWARD_LENGTH, self.sizes()["S"], UINT32)
        return [*super().header(), shared]

    def caveats(self) -> tuple[str, ...]:
        return (*super().caveats(), NOT_NORMALISED)
