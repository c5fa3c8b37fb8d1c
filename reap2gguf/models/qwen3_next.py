"""Qwen3-Next (Qwen3-Next-80B-A3B, Qwen3-Coder-Next): DeltaNet, a shared expert and an MTP block.

The config is flat, experts are one tensor each (2D), and no key tells of the MTP block: it is
there if its tensors are. Queries, keys, values and gates of the linear attention are stored as one
matrix, of which GGUF makes two; `in_proj_ba`, of beta and decay, stays one. GGUF names, types and
keys are those of llama.cpp's `qwen3next`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from gguf import Keys

from reap2gguf.errors import UnsupportedModelError
from reap2gguf.messages import shown
from reap2gguf.models.deltanet import DeltaNet, PackedDeltaNet
from reap2gguf.models.description import MAX_WIDTH, ModelFacts
from reap2gguf.models.hybrid import MTP_KEY, HybridMoe
from reap2gguf.models.rules import TensorRule

if TYPE_CHECKING:
    from reap2gguf.models.gguf_keys import GgufKeys

_PACKED = "linear_attn.in_proj_qkvz.weight"
_LEGACY = "blk.0.ssm_in.weight"


class Qwen3Next(HybridMoe):
    """One Qwen3-Next model."""

    model_type: ClassVar[str] = "qwen3_next"
    gguf_arch: ClassVar[str] = "qwen3next"
    fact_keys: ClassVar[tuple[str, ...]] = (
        *HybridMoe.fact_keys,
        "intermediate_size",
        "decoder_sparse_step",
        "norm_topk_prob",
    )
    layout: ClassVar[type[DeltaNet]] = PackedDeltaNet
    inputs = (
        TensorRule(_PACKED, "attn_qkv.weight", "packed H", gguf_shape="mixed H"),
        TensorRule(_PACKED, "attn_gate.weight", "packed H", gguf_shape="values H"),
        TensorRule("linear_attn.in_proj_ba.weight", "ssm_ba.weight", "2heads H"),
    )

    @classmethod
    def config_from_gguf(cls, keys: GgufKeys) -> dict[str, Any]:
        if _LEGACY in keys.tensors:
            raise UnsupportedModelError(
                f"{keys.where}: tensor {_LEGACY!r} is of llama.cpp's first converter of "
                "Qwen3-Next, expected attn_qkv and attn_gate in its place; use a newer file"
            )
        config = super().config_from_gguf(keys)
        if keys.has(Keys.LLM.FEED_FORWARD_LENGTH):
            config["intermediate_size"] = keys.integer(Keys.LLM.FEED_FORWARD_LENGTH, 1, MAX_WIDTH)
        return {
            "architectures": ["Qwen3NextForCausalLM"],
            "model_type": cls.model_type,
            **config,
            "norm_topk_prob": True,
        }

    def read_facts(self) -> ModelFacts:
        if (found := self.config.get("model_type")) != self.model_type:
            raise UnsupportedModelError(
                f"{self.reader.where}: model_type is {shown(found)}, expected '{self.model_type}': "
                "transformers chooses the architecture by it"
            )
        return super().read_facts()

    def config_values(self) -> dict[str, Any]:
        return {**super().config_values(), "norm_topk_prob": True, "mlp_only_layers": []}

    def sizes(self) -> Mapping[str, int]:
        sizes = super().sizes()
        return {**sizes, "packed": sizes["mixed"] + sizes["values"]}

    def claims_mtp(self) -> bool:
        # published configs have no key for it
        return super().claims_mtp() if MTP_KEY in self.text.values else self.facts.has_mtp
