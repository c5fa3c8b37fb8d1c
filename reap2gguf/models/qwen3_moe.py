"""Qwen3-MoE (Qwen3-30B-A3B, Qwen3-235B-A22B, Qwen3-Coder).

Stored names follow transformers' `qwen3_moe`; experts are one tensor each (2D, as published) or
one tensor per layer (3D). GGUF names, types and keys are those of llama.cpp's `qwen3moe`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from gguf import Keys

from reap2gguf.errors import UnsupportedModelError
from reap2gguf.models.description import MAX_WIDTH
from reap2gguf.models.facts import FACT_KEYS
from reap2gguf.models.from_gguf import full_attention_config
from reap2gguf.models.full_attention import (
    refuse_other_types,
    refuse_partial_attention,
    without_derived_sizes,
)
from reap2gguf.models.layer_types import moe_layers_by_step
from reap2gguf.models.rules import (
    ATTENTION,
    ATTN_NORM,
    DENSE_FFN,
    FFN_NORM,
    QK_NORMS,
    ROUTER,
    TensorRule,
)
from reap2gguf.models.shared import DecoderModel, Entry

if TYPE_CHECKING:
    from reap2gguf.models.description import ModelFacts
    from reap2gguf.models.gguf_keys import GgufKeys


class Qwen3Moe(DecoderModel):
    """One Qwen3-MoE model."""

    model_type: ClassVar[str] = "qwen3_moe"
    gguf_arch: ClassVar[str] = "qwen3moe"
    fact_keys: ClassVar[tuple[str, ...]] = (
        *FACT_KEYS,
        "intermediate_size",
        "decoder_sparse_step",
        "norm_topk_prob",
        "use_sliding_window",
    )
    defaults: ClassVar[Mapping[str, int]] = {"num_key_value_heads": 4}

    def read_facts(self) -> ModelFacts:
        refuse_other_types(self)
        self.refuse_common()
        why = f"llama.cpp's {self.gguf_arch} has full attention"
        self.text.expect("use_sliding_window", False, why=why)
        self.check_routing()
        facts = self.common_facts(moe_layers_by_step(self.text))
        refuse_partial_attention(self, facts)
        return facts

    def check_routing(self) -> None:
        key = "norm_topk_prob"
        if self.reader.boolean(key, default=False):
            return
        found = "false" if key in self.config else "absent, which transformers reads as false"
        raise UnsupportedModelError(
            f"{self.reader.where}: {key} is {found}, and llama.cpp's qwen3moe always normalises "
            "the chosen experts' weights; published Qwen3-MoE models have it true, so set it if "
            "yours was trained so"
        )

    @classmethod
    def config_from_gguf(cls, keys: GgufKeys) -> dict[str, Any]:
        config = full_attention_config(keys)
        n_layers = config["num_hidden_layers"]
        routed = keys.blocks_with(ROUTER.gguf)
        if keys.has(Keys.LLM.FEED_FORWARD_LENGTH):
            config["intermediate_size"] = keys.integer(Keys.LLM.FEED_FORWARD_LENGTH, 1, MAX_WIDTH)
        return {
            "architectures": ["Qwen3MoeForCausalLM"],
            "model_type": cls.model_type,
            **config,
            "mlp_only_layers": [layer for layer in range(n_layers) if layer not in routed],
            "norm_topk_prob": True,
        }

    def config_values(self) -> dict[str, Any]:
        return {**super().config_values(), "norm_topk_prob": True, "sliding_window": None}

    def sizes(self) -> Mapping[str, int]:
        width = self.dense_width()
        if width is None and len(self.facts.moe_layers) < self.facts.n_layers:
            raise UnsupportedModelError(
                f"{self.reader.where}: intermediate_size is missing, expected the width of the "
                "dense layers"
            )
        return {**super().sizes(), "I": width or 0}

    def rules(self, layer: int) -> tuple[TensorRule, ...]:
        ffn = (ROUTER,) if layer in self.sparse_layers else DENSE_FFN
        return (ATTN_NORM, *ATTENTION, *QK_NORMS, FFN_NORM, *ffn)

    def header(self) -> list[Entry]:
        return without_derived_sizes(self, super().header())

    def caveats(self) -> tuple[str, ...]:
        if len(self.facts.moe_layers) == self.facts.n_layers:
            return super().caveats()
        caveat = (
            f"llama.cpp's {self.gguf_arch} needs experts in every layer, but this model has dense "
            "layers: its GGUF files are written, but llama.cpp cannot load them"
        )
        return (*super().caveats(), caveat)
