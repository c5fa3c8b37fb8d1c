"""GraniteMoE (Granite-3.1-3B-A800M, -1B-A400M) and its form with shared experts.

Embeddings, residuals, attention and logits are multiplied by numbers of the config. All experts of
a layer are one tensor (3D). GGUF names, types and keys are those of llama.cpp's `granitemoe`, which
rotates heads in pairs, as Mixtral's `llama` does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from gguf import Keys

from reap2gguf.models.description import MAX_WIDTH, Transform, picked
from reap2gguf.models.experts import ExpertLayout
from reap2gguf.models.full_attention import UNIFORM_FACT_KEYS, refuse_other_widths
from reap2gguf.models.mixtral import PairedHeads
from reap2gguf.models.rules import ATTENTION, ATTN_NORM, FFN_NORM, ROUTER, TensorRule
from reap2gguf.models.shared import FLOAT32, UINT32, Entry

if TYPE_CHECKING:
    from reap2gguf.models.description import ModelFacts
    from reap2gguf.models.gguf_keys import GgufKeys

_ROUTER = replace(
    ROUTER,
    stored="block_sparse_moe.router.layer.weight",
    parameter="block_sparse_moe.router.weight",
)
_GATE_UP = TensorRule(
    "shared_mlp.input_linear.weight", "ffn_gate_shexp.weight", "2S H", gguf_shape="S H"
)
_SHARED_EXPERT = (
    _GATE_UP,
    replace(_GATE_UP, gguf="ffn_up_shexp.weight"),
    TensorRule("shared_mlp.output_linear.weight", "ffn_down_shexp.weight", "H S"),
)
_LOGITS = "logits_scaling"
_SCALES = {
    "attention_multiplier": Keys.Attention.SCALE,
    "embedding_multiplier": Keys.LLM.EMBEDDING_SCALE,
    "residual_multiplier": Keys.LLM.RESIDUAL_SCALE,
    _LOGITS: Keys.LLM.LOGIT_SCALE,
}
# to llama.cpp, 0 is the same as no key
_LEAST, _MOST = 1e-6, 1e6
_SHARED_WIDTH = "shared_intermediate_size"


class GraniteMoe(PairedHeads):
    """One GraniteMoE model."""

    model_type: ClassVar[str] = "granitemoe"
    gguf_arch: ClassVar[str] = "granitemoe"
    experts = ExpertLayout(
        path="block_sparse_moe",
        path_apart="block_sparse_moe.experts",
        module="block_sparse_moe.experts",
        gate_up="input_linear",
        down="output_linear",
    )
    count_keys = ("num_local_experts",)  # transformers has no other spelling for this family
    fact_keys = (*UNIFORM_FACT_KEYS, *_SCALES)

    def read_facts(self) -> ModelFacts:
        facts = super().read_facts()
        refuse_other_widths(self, facts)
        return facts

    @classmethod
    def config_from_gguf(cls, keys: GgufKeys) -> dict[str, Any]:
        config = super().config_from_gguf(keys)
        head_dim = config["hidden_size"] // config["num_attention_heads"]
        # llama.cpp's values of absent keys
        defaults = {"attention_multiplier": head_dim**-0.5, _LOGITS: None}
        scales = {
            name: keys.number(key, _LEAST, _MOST, default=defaults.get(name, 1.0))
            for name, key in _SCALES.items()
        }
        return {"architectures": ["GraniteMoeForCausalLM"], **config, **scales}

    def config_values(self) -> dict[str, Any]:
        return {**super().config_values(), **self._scales()}

    def _scales(self) -> dict[str, float]:
        """The multipliers; transformers' value of an absent one is 1."""
        return {
            name: self.text.number(name, low=_LEAST, high=_MOST, default=1.0) for name in _SCALES
        }

    @property
    def logits_divisor(self) -> float:
        return self._scales()[_LOGITS]

    def rules(self, layer: int) -> tuple[TensorRule, ...]:
        return (ATTN_NORM, *ATTENTION, FFN_NORM, _ROUTER)

    def header(self) -> list[Entry]:
        # llama.cpp's converter leaves out what the config leaves out, which llama.cpp computes
        # with other values than transformers
        scales = [(_SCALES[name], value, FLOAT32) for name, value in self._scales().items()]
        return [*super().header(), *scales]


class GraniteMoeShared(GraniteMoe):
    """One GraniteMoE model, with a shared expert in every layer unless its width is 0."""

    model_type: ClassVar[str] = "granitemoeshared"
    fact_keys = (*GraniteMoe.fact_keys, _SHARED_WIDTH)

    @classmethod
    def config_from_gguf(cls, keys: GgufKeys) -> dict[str, Any]:
        key = Keys.LLM.EXPERT_SHARED_FEED_FORWARD_LENGTH
        return {
            **super().config_from_gguf(keys),
            "architectures": ["GraniteMoeSharedForCausalLM"],
            _SHARED_WIDTH: keys.integer(key, 0, MAX_WIDTH, default=0),
        }

    def config_values(self) -> dict[str, Any]:
        return {**super().config_values(), _SHARED_WIDTH: self._shared_width}

    @property
    def _shared_width(self) -> int:
        # transformers' value of an absent key, in GraniteMoeSharedConfig
        return self.text.integer(_SHARED_WIDTH, low=0, high=MAX_WIDTH, default=0)

    def sizes(self) -> Mapping[str, int]:
        return {**super().sizes(), "S": self._shared_width}

    def rules(self, layer: int) -> tuple[TensorRule, ...]:
        return (*super().rules(layer), *(_SHARED_EXPERT if self._shared_width else ()))

    def transform(self, rule: TensorRule) -> Transform | None:
        width = self._shared_width
        halves = {
            "ffn_gate_shexp.weight": slice(0, width),
            "ffn_up_shexp.weight": slice(width, 2 * width),
        }
        return picked(halves[rule.gguf]) if rule.gguf in halves else super().transform(rule)

    def header(self) -> list[Entry]:
        width = self._shared_width or None
        key = Keys.LLM.EXPERT_SHARED_FEED_FORWARD_LENGTH
        return [*super().header(), (key, width, UINT32)]
