"""Qwen3.5-MoE (of Qwen3.5 and Qwen3.6): DeltaNet, a shared expert, a vision tower and an MTP block.

The Hub's layout nests the text model's config and names (`text_config`, `model.language_model.*`)
and fuses the experts (3D) except those of the MTP block (2D); re-saved checkpoints are flat, or 2D
throughout, or have lost the MTP block. All of them are read; what is written keeps the source's
layout. GGUF names, types and keys are those of llama.cpp's `qwen35moe`, where the MTP block is the
last layer and has `nextn.*`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt

from reap2gguf.models.facts import refuse_model_types
from reap2gguf.models.from_gguf import trunk_layers
from reap2gguf.models.hybrid import MTP_KEY, HybridMoe
from reap2gguf.models.linear_from_gguf import rope_sections
from reap2gguf.models.mrope import read_sections
from reap2gguf.models.qwen_vision import DEEPSTACK, refuse_tower, tower_caveats, vision_projector
from reap2gguf.models.rules import TensorRule

if TYPE_CHECKING:
    from reap2gguf.checkpoint.safetensors_header import StoredTensor
    from reap2gguf.models.description import ModelFacts, SideFile
    from reap2gguf.models.gguf_keys import GgufKeys

_QKV = "linear_attn.in_proj_qkv"
_VISION = ("model.visual.", "visual.")


class Qwen35Moe(HybridMoe):
    """One Qwen3.5-MoE model."""

    model_type: ClassVar[str] = "qwen3_5_moe"
    gguf_arch: ClassVar[str] = "qwen35moe"
    text_sections = ("text_config",)
    carried_prefixes = _VISION
    inputs = (
        TensorRule(f"{_QKV}.weight", "attn_qkv.weight", "mixed H"),
        TensorRule("linear_attn.in_proj_z.weight", "attn_gate.weight", "values H", input_of=_QKV),
        TensorRule("linear_attn.in_proj_a.weight", "ssm_alpha.weight", "heads H", input_of=_QKV),
        TensorRule("linear_attn.in_proj_b.weight", "ssm_beta.weight", "heads H", input_of=_QKV),
    )

    @classmethod
    def config_from_gguf(cls, keys: GgufKeys) -> dict[str, Any]:
        config = super().config_from_gguf(keys)
        return {
            "architectures": ["Qwen3_5MoeForCausalLM"],
            "model_type": f"{cls.model_type}_text",
            **config,
            "rope_parameters": config["rope_parameters"] | rope_sections(keys),
            MTP_KEY: trunk_layers(keys)[1],
        }

    def read_facts(self) -> ModelFacts:
        refuse_model_types(self.reader, self.text, self.model_type)
        facts = super().read_facts()
        self.rope.values.expect(
            "mrope_interleaved", True, why="transformers and llama.cpp interleave the sections"
        )
        self.sections = read_sections(self.rope.values, self.rotary_width, facts.head_dim)
        return facts

    @cached_property
    def text_prefix(self) -> str:
        nested = any(name.startswith("model.language_model.") for name in self.names)
        return "model.language_model." if nested else "model."

    def dense_width(self) -> int | None:
        return None  # every layer has experts, and the config has no other width

    def rope_sections(self) -> tuple[int, ...] | None:
        return self.sections

    def pruned_config(self, n_experts: int) -> dict[str, Any]:
        config = super().pruned_config(n_experts)
        if self.facts.has_mtp:  # without the key, there would be none
            (config.get("text_config") or config)[MTP_KEY] = 1
        return config

    def column_order(self, name: str) -> npt.NDArray[np.int64] | None:
        if name.endswith(".ssm_out.weight"):
            return self.deltanet.value_order(self.deltanet.value_dim)
        return None

    def side_files(self, folder: Path, stored: Mapping[str, StoredTensor]) -> tuple[SideFile, ...]:
        if not any(name.startswith(_VISION) for name in self.names):
            return ()
        refuse_tower(self.reader, self.facts.hidden_size)
        read = self.reader.with_values(self.reader.section("vision_config"))
        read.expect(DEEPSTACK, [], why="llama.cpp's qwen35moe takes the tower's last layer alone")
        return (vision_projector(self.reader, folder, stored, self.facts.hidden_size),)

    def caveats(self) -> tuple[str, ...]:
        found = [*super().caveats()]
        has_tower = any(name.startswith(_VISION) for name in self.names)
        found += tower_caveats(has_tower, bool(self.config.get("vision_config")))
        return tuple(found)
