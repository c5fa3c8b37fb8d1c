"""Mixtral (8x7B, 8x22B): llama.cpp's `llama` with experts.

Checkpoints have names of their own (`block_sparse_moe`, w1, w2, w3), which transformers renames as
it loads them. llama.cpp rotates neighbouring dimensions of a head together, transformers those of
its two halves: the rows of queries and keys are in another order in GGUF files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from gguf import Keys

from reap2gguf.errors import UnsupportedModelError
from reap2gguf.models.description import MAX_EXPERTS, Transform
from reap2gguf.models.experts import ExpertLayout
from reap2gguf.models.from_gguf import uniform_config
from reap2gguf.models.full_attention import (
    UNIFORM_FACT_KEYS,
    read_uniform_facts,
    uniform_header,
)
from reap2gguf.models.rules import (
    ATTENTION,
    ATTN_NORM,
    FFN_NORM,
    ROUTER,
    TensorRule,
    paired_halves,
)
from reap2gguf.models.shared import UINT32, DecoderModel, Entry

if TYPE_CHECKING:
    from reap2gguf.models.description import ModelFacts
    from reap2gguf.models.gguf_keys import GgufKeys

_ROUTER = replace(ROUTER, stored="block_sparse_moe.gate.weight", parameter="mlp.gate.weight")


class PairedHeads(DecoderModel):
    """A decoder whose layers are all alike and whose heads llama.cpp rotates in pairs."""

    width_key = "intermediate_size"
    count_keys: ClassVar[tuple[str, ...]] = ("num_local_experts", "num_experts")

    def read_facts(self) -> ModelFacts:
        return read_uniform_facts(self)

    @classmethod
    def config_from_gguf(cls, keys: GgufKeys) -> dict[str, Any]:
        if keys.integer(Keys.LLM.EXPERT_COUNT, 0, MAX_EXPERTS, default=0) == 0:
            raise UnsupportedModelError(
                f"{keys.where}: {keys.arch}.expert_count is missing or 0: this is a dense model, "
                "expected one with experts (a Mixture of Experts)"
            )
        config = uniform_config(keys)
        return {
            "model_type": cls.model_type,
            "num_local_experts": config.pop("num_experts"),
            **config,
        }

    def transform(self, rule: TensorRule) -> Transform | None:
        heads = {"attn_q.weight": self.facts.n_heads, "attn_k.weight": self.facts.n_kv_heads}
        if rule.gguf not in heads:
            return None
        return paired_halves(heads[rule.gguf], self.facts.head_dim)

    def header(self) -> list[Entry]:
        return [
            *uniform_header(self, super().header()),
            (Keys.LLM.VOCAB_SIZE, self.facts.vocab_size, UINT32),
            (Keys.Rope.DIMENSION_COUNT, self.facts.head_dim, UINT32),
        ]


class Mixtral(PairedHeads):
    """One Mixtral model."""

    model_type: ClassVar[str] = "mixtral"
    gguf_arch: ClassVar[str] = "llama"
    experts = ExpertLayout(path="block_sparse_moe.experts", gate="w1", up="w3", down="w2")
    # transformers takes null for the default
    fact_keys = tuple(key for key in UNIFORM_FACT_KEYS if key != "head_dim")
    defaults: ClassVar[Mapping[str, int]] = {"num_key_value_heads": 8}
    epsilon = ("rms_norm_eps", 1e-5)
    default_theta = 1e6

    @classmethod
    def config_from_gguf(cls, keys: GgufKeys) -> dict[str, Any]:
        config = super().config_from_gguf(keys)
        if config["rope_parameters"]["rope_type"] == "yarn":
            # transformers computes it from this alone
            config.setdefault("head_dim", config["hidden_size"] // config["num_attention_heads"])
        return {"architectures": ["MixtralForCausalLM"], **config}

    def read_facts(self) -> ModelFacts:
        facts = super().read_facts()
        if self.rope.kind == "yarn" and self.text.values.get("head_dim") is None:
            raise UnsupportedModelError(
                f"{self.reader.where}: head_dim is missing, without which transformers does not "
                f"compute YaRN in this architecture; set it to {facts.head_dim}"
            )
        return facts

    def config_values(self) -> dict[str, Any]:
        head_dim = self.text.values.get("head_dim")
        return {**super().config_values(), "head_dim": head_dim, "sliding_window": None}

    def rules(self, layer: int) -> tuple[TensorRule, ...]:
        return (ATTN_NORM, *ATTENTION, FFN_NORM, _ROUTER)
