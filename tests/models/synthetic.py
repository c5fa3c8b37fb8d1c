"""A family that no one published, with what the next ones have and those in the table do not.

Dense layers first, a score-correction bias in the router, groups of experts, other names on disk
than in transformers, and the MTP block as one more decoder layer. How it stores its experts, and in
which parts its weights, is for each test to choose.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from gguf import Keys
from safetensors.torch import save_file

from reap2gguf.models.description import MAX_WIDTH, ModelFacts
from reap2gguf.models.experts import ExpertLayout
from reap2gguf.models.from_gguf import common_config, trunk_layers
from reap2gguf.models.gguf_keys import GgufKeys
from reap2gguf.models.layer_types import moe_layers_after_dense
from reap2gguf.models.rules import (
    ATTENTION,
    ATTN_NORM,
    DENSE_FFN,
    FFN_NORM,
    MtpLayout,
    TensorRule,
)
from reap2gguf.models.shared import DecoderModel

ROUTER = TensorRule(
    "block_sparse_moe.gate.weight",
    "ffn_gate_inp.weight",
    "E H",
    parameter="mlp.gate.weight",
    always_f32=True,
)
BIAS = TensorRule(
    "block_sparse_moe.e_score_correction_bias",
    "exp_probs_b.bias",
    "E",
    parameter="mlp.gate.e_score_correction_bias",
)
MTP = MtpLayout(
    layer="",
    rules=(
        TensorRule("eh_proj.weight", "nextn.eh_proj.weight", "H 2H", parameter="fc.weight"),
        TensorRule("enorm.weight", "nextn.enorm.weight", "H", parameter="embedding_norm.weight"),
        TensorRule("hnorm.weight", "nextn.hnorm.weight", "H", parameter="hidden_norm.weight"),
        TensorRule(
            "shared_head.norm.weight", "nextn.shared_head_norm.weight", "H", parameter="norm.weight"
        ),
    ),
)
RENAMED = ExpertLayout(path="block_sparse_moe.experts", gate="w1", up="w3", down="w2")


class SyntheticMoe(DecoderModel):
    """One synthetic model."""

    model_type: ClassVar[str] = "synthetic_moe"
    gguf_arch: ClassVar[str] = "synthetic"
    count_keys = ("n_routed_experts",)
    mtp: ClassVar[MtpLayout | None] = MTP
    experts: ClassVar[ExpertLayout] = RENAMED
    router: ClassVar[tuple[TensorRule, ...]] = (ROUTER, BIAS)

    @classmethod
    def config_from_gguf(cls, keys: GgufKeys) -> dict[str, Any]:
        config = common_config(keys)
        routed = keys.blocks_with("ffn_gate_inp.weight")
        return {
            "architectures": ["SyntheticMoe"],
            "model_type": cls.model_type,
            **{key: value for key, value in config.items() if key != "num_experts"},
            "n_routed_experts": config["num_experts"],
            "first_k_dense_replace": min(routed, default=0),
            "intermediate_size": keys.integer(Keys.LLM.FEED_FORWARD_LENGTH, 1, MAX_WIDTH),
            "n_group": keys.integer(Keys.LLM.EXPERT_GROUP_COUNT, 1, 2**10, default=1),
            "topk_group": keys.integer(Keys.LLM.EXPERT_GROUP_USED_COUNT, 1, 2**10, default=1),
        }

    @classmethod
    def names_from_gguf(cls, keys: GgufKeys, keep_mtp: bool) -> tuple[str, ...]:
        n_layers, n_mtp = trunk_layers(keys)
        found = super().names_from_gguf(keys, keep_mtp)
        has_mtp = keep_mtp and n_mtp
        return (*found, f"model.layers.{n_layers}.eh_proj.weight") if has_mtp else found

    def read_facts(self) -> ModelFacts:
        read = self.text
        self.refuse_common()
        moe = moe_layers_after_dense(read, "first_k_dense_replace")
        has_mtp = self.keep_mtp and any(self.in_mtp(name) for name in self.names)
        n_layers = read.integer("num_hidden_layers")
        facts = self.common_facts((*moe, n_layers) if has_mtp else moe, has_mtp=has_mtp)
        groups = read.integer("n_group", low=1, default=1)
        chosen = read.integer("topk_group", low=1, high=groups, default=1)
        return replace(facts, n_groups=groups, groups_per_token=chosen)

    def sizes(self) -> Mapping[str, int]:
        return {**super().sizes(), "I": self.dense_width() or 0}

    def rules(self, layer: int) -> tuple[TensorRule, ...]:
        ffn = self.router if layer in self.sparse_layers else DENSE_FFN
        return (ATTN_NORM, *ATTENTION, FFN_NORM, *ffn)


@dataclass(frozen=True)
class TinySynthetic:
    """A checkpoint of the family: one dense layer, two sparse ones, and the MTP block."""

    hidden: int = 16
    width: int = 6
    n_experts: int = 8
    n_groups: int = 2
    mtp: bool = True
    dtype: torch.dtype = torch.bfloat16

    def config(self) -> dict[str, Any]:
        return {
            "architectures": ["SyntheticMoe"],
            "model_type": "synthetic_moe",
            "first_k_dense_replace": 1,
            "head_dim": 4,
            "hidden_size": self.hidden,
            "intermediate_size": 24,
            "max_position_embeddings": 64,
            "moe_intermediate_size": self.width,
            "n_group": self.n_groups,
            "n_routed_experts": self.n_experts,
            "num_attention_heads": 4,
            "num_experts_per_tok": 2,
            "num_hidden_layers": 3,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "topk_group": 1,
            "vocab_size": 32,
        }

    def tensors(self) -> dict[str, torch.Tensor]:
        """2D experts under the names of `RENAMED`."""
        generator = torch.Generator().manual_seed(0)

        def values(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator).to(self.dtype)

        hidden, width = self.hidden, self.width
        found = {
            "model.embed_tokens.weight": values(32, hidden),
            "model.norm.weight": values(hidden),
            "lm_head.weight": values(32, hidden),
        }
        for layer in range(3 + self.mtp):
            prefix = f"model.layers.{layer}."
            for name in ("input_layernorm", "post_attention_layernorm"):
                found[f"{prefix}{name}.weight"] = values(hidden)
            for name in "qkvo":
                found[f"{prefix}self_attn.{name}_proj.weight"] = values(hidden, hidden)
            if layer == 0:
                found[prefix + "mlp.gate_proj.weight"] = values(24, hidden)
                found[prefix + "mlp.up_proj.weight"] = values(24, hidden)
                found[prefix + "mlp.down_proj.weight"] = values(hidden, 24)
                continue
            moe = prefix + "block_sparse_moe."
            found[moe + "gate.weight"] = values(self.n_experts, hidden)
            found[moe + "e_score_correction_bias"] = values(self.n_experts).float() + 1e-4
            for expert in range(self.n_experts):
                base = f"{moe}experts.{expert}."
                found[base + "w1.weight"] = values(width, hidden)
                found[base + "w2.weight"] = values(hidden, width)
                found[base + "w3.weight"] = values(width, hidden)
        if self.mtp:
            prefix = "model.layers.3."
            found[prefix + "eh_proj.weight"] = values(hidden, 2 * hidden)
            for name in ("enorm", "hnorm", "shared_head.norm"):
                found[f"{prefix}{name}.weight"] = values(hidden)
        return found

    def write(self, folder: Path, tensors: dict[str, torch.Tensor] | None = None) -> Path:
        """Write config and tensors, or others in place of `tensors()`; the folder."""
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(self.config()))
        save_file(self.tensors() if tensors is None else tensors, folder / "model.safetensors")
        return folder
