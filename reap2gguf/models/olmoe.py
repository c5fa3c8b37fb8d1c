"""OLMoE (OLMoE-1B-7B): norms of whole queries and keys, and weights that are not normalised.

GGUF names, types and keys are those of llama.cpp's `olmoe`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from reap2gguf.errors import UnsupportedModelError
from reap2gguf.models.from_gguf import uniform_config
from reap2gguf.models.full_attention import (
    UNIFORM_FACT_KEYS,
    read_uniform_facts,
    refuse_other_widths,
    refuse_tied,
    uniform_header,
)
from reap2gguf.models.rules import (
    ATTENTION,
    ATTN_NORM,
    FFN_NORM,
    QK_NORMS,
    ROUTER,
    TensorRule,
)
from reap2gguf.models.scored_router import NOT_NORMALISED
from reap2gguf.models.shared import DecoderModel, Entry

if TYPE_CHECKING:
    from reap2gguf.models.description import ModelFacts
    from reap2gguf.models.gguf_keys import GgufKeys

_Q_NORM, _K_NORM = QK_NORMS
_ROW_NORMS = (replace(_Q_NORM, shape="Q"), replace(_K_NORM, shape="KV"))


class Olmoe(DecoderModel):
    """One OLMoE model."""

    model_type: ClassVar[str] = "olmoe"
    gguf_arch: ClassVar[str] = "olmoe"
    width_key = "intermediate_size"
    fact_keys = (*UNIFORM_FACT_KEYS, "norm_topk_prob")
    epsilon = ("rms_norm_eps", 1e-5)

    def read_facts(self) -> ModelFacts:
        read = self.text
        why = "llama.cpp's olmoe does not normalise the chosen experts' weights"
        read.expect("norm_topk_prob", False, why=why)
        read.expect("clip_qkv", why="llama.cpp's olmoe does not clip queries, keys and values")
        facts = read_uniform_facts(self)
        refuse_other_widths(self, facts)
        refuse_tied(self, facts)
        if facts.n_kv_heads != facts.n_heads:
            raise UnsupportedModelError(
                f"{read.where}: num_key_value_heads is {facts.n_kv_heads}, expected "
                f"num_attention_heads, {facts.n_heads}: the norm of the keys in llama.cpp's olmoe "
                "is as wide as that of the queries"
            )
        return facts

    @classmethod
    def config_from_gguf(cls, keys: GgufKeys) -> dict[str, Any]:
        return {
            "architectures": ["OlmoeForCausalLM"],
            "model_type": cls.model_type,
            **uniform_config(keys),
            "norm_topk_prob": False,
        }

    def config_values(self) -> dict[str, Any]:
        return {**super().config_values(), "norm_topk_prob": False, "clip_qkv": None}

    def rules(self, layer: int) -> tuple[TensorRule, ...]:
        return (ATTN_NORM, *ATTENTION, *_ROW_NORMS, FFN_NORM, ROUTER)

    def header(self) -> list[Entry]:
        # llama.cpp's converter writes 1e-05 for any rms_norm_eps; here it is the config's
        return uniform_header(self, super().header())

    def caveats(self) -> tuple[str, ...]:
        return (*super().caveats(), NOT_NORMALISED)
