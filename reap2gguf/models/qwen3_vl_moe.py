"""Qwen3-VL-MoE (Qwen3-VL-30B-A3B, Qwen3-VL-235B-A22B): Qwen3-MoE's text model and a vision tower.

The config nests the text model's (`text_config`) and its names begin with `model.language_model.`.
Experts are fused (3D): published checkpoints store matrices as (in, out), and those that
transformers has saved as (out, in); the shape shows which. GGUF names, types and keys are those of
llama.cpp's `qwen3vlmoe`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from gguf import Keys

from reap2gguf.errors import UnsupportedModelError
from reap2gguf.messages import shown
from reap2gguf.models.description import MAX_LAYERS, SideFile
from reap2gguf.models.experts import ExpertLayout
from reap2gguf.models.linear_from_gguf import rope_sections
from reap2gguf.models.mrope import read_sections, unrotated_pairs
from reap2gguf.models.qwen3_moe import Qwen3Moe
from reap2gguf.models.qwen_vision import (
    DEEPSTACK,
    deepstack_layers,
    refuse_tower,
    tower_caveats,
    vision_projector,
)
from reap2gguf.models.shared import ARRAY, UINT32, Entry

if TYPE_CHECKING:
    from reap2gguf.checkpoint.config import ConfigReader
    from reap2gguf.checkpoint.safetensors_header import StoredTensor
    from reap2gguf.models.description import ModelFacts
    from reap2gguf.models.gguf_keys import GgufKeys

# Radians. A pair of dimensions that turns by less over the whole context need not be rotated.
_STILL = 0.25
_APART = (
    "experts are one tensor each, which transformers does not load in this architecture, neither "
    "from the source nor from the pruned folder; the GGUF files are not affected"
)


class Qwen3VlMoe(Qwen3Moe):
    """One Qwen3-VL-MoE model."""

    model_type: ClassVar[str] = "qwen3_vl_moe"
    gguf_arch: ClassVar[str] = "qwen3vlmoe"
    text_sections: ClassVar[tuple[str, ...]] = ("text_config",)
    carried_prefixes: ClassVar[tuple[str, ...]] = ("model.visual.",)
    experts: ClassVar[ExpertLayout] = ExpertLayout(orientation="either")
    # transformers' value of an absent key, in Qwen3VLMoeTextConfig
    defaults: ClassVar[Mapping[str, int]] = {"num_key_value_heads": 16}
    # what `model_type` may be in the sections; published configs have the second in the last
    section_types: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "text_config": ("qwen3_vl_moe_text",),
        "vision_config": ("qwen3_vl_moe_vision", "qwen3_vl_moe"),
    }

    @classmethod
    def config_from_gguf(cls, keys: GgufKeys) -> dict[str, Any]:
        flat = super().config_from_gguf(keys)
        text = {key: value for key, value in flat.items() if key != "architectures"}
        text["model_type"] = cls.section_types["text_config"][0]
        text["rope_parameters"] = text["rope_parameters"] | rope_sections(keys)
        n_deepstack = keys.integer(Keys.LLM.NUM_DEEPSTACK_LAYERS, 0, MAX_LAYERS, default=0)
        return {
            "architectures": ["Qwen3VLMoeForConditionalGeneration"],
            "model_type": cls.model_type,
            "text_config": text,
            "tie_word_embeddings": text["tie_word_embeddings"],
            "vision_config": {DEEPSTACK: [*range(n_deepstack)], "depth": max(1, n_deepstack)},
        }

    def read_facts(self) -> ModelFacts:
        facts = super().read_facts()
        rotary = self.rope.values
        for key in ("mrope_interleaved", "interleaved"):
            rotary.expect(key, True, why="transformers and llama.cpp interleave the sections")
        if rotary.values.get("mrope_section") is None:
            raise UnsupportedModelError(
                f"{rotary.where}: mrope_section is missing from the rotary embedding's settings, "
                f"expected three numbers: llama.cpp's {self.gguf_arch} needs them"
            )
        turns = self._turns(facts)
        still = [pair for pair, turn in enumerate(turns) if turn < _STILL]
        self.sections = read_sections(rotary, facts.head_dim, facts.head_dim, still)
        unrotated = unrotated_pairs(facts.head_dim, self.sections)
        self.unrotated = {pair: turns[pair] for pair in unrotated}
        self.n_deepstack = self.read_n_deepstack()
        return facts

    def _turns(self, facts: ModelFacts) -> list[float]:
        """How far each pair of a head turns over the whole context, in radians."""
        longest = facts.context_length / max(1.0, self.rope.factor)
        width = facts.head_dim
        return [float(longest * self.rope.theta ** (-2 * i / width)) for i in range(width // 2)]

    @property
    def tower(self) -> ConfigReader:
        """The part of the config around the vision tower's."""
        return self.reader

    def read_n_deepstack(self) -> int:
        """How many of the tower's layers besides its last one enter the text model."""
        read = self.tower.with_values(self.tower.section("vision_config"))
        if read.values.get(DEEPSTACK) is None:
            raise UnsupportedModelError(
                f"{read.where}: vision_config.{DEEPSTACK} is missing, expected a list of the "
                "tower's layers, which may be empty"
            )
        return len(deepstack_layers(read))

    def refuse_model_types(self) -> None:
        super().refuse_model_types()
        read = self.reader
        for section in self.text_sections:
            if not read.section(section):
                raise UnsupportedModelError(
                    f"{read.where}: {section} is {shown(read.values.get(section))}, expected the "
                    f"text model's config in it: model_type is {self.model_type}"
                )
            self._refuse_section_type(read, section)
            if read.section("vision_config"):
                self._refuse_section_type(read, "vision_config")
            read = read.with_values(read.section(section))

    def _refuse_section_type(self, read: ConfigReader, section: str) -> None:
        within = read.with_values(read.section(section))
        # with null, transformers does not find the names of the weights
        within.refuse_nulls(("model_type",))
        why = f"it is the type of {section}"
        within.expect("model_type", *self.section_types[section], why=why)

    def check_routing(self) -> None:
        why = f"transformers' {self.model_type} and llama.cpp's {self.gguf_arch} normalise weights"
        self.text.expect("norm_topk_prob", True, why=why)

    @cached_property
    def text_prefix(self) -> str:
        nested = any(name.startswith("model.language_model.") for name in self.names)
        return "model.language_model." if nested else "model."

    def header(self) -> list[Entry]:
        return [
            *super().header(),
            (Keys.Rope.DIMENSION_SECTIONS, [*self.sections], ARRAY),
            (Keys.LLM.NUM_DEEPSTACK_LAYERS, self.n_deepstack, UINT32),
        ]

    @property
    def has_tower(self) -> bool:
        """Whether the checkpoint holds a vision tower."""
        return any(name.startswith(self.carried_prefixes) for name in self.names)

    def side_files(self, folder: Path, stored: Mapping[str, StoredTensor]) -> tuple[SideFile, ...]:
        if not self.has_tower:
            return ()
        refuse_tower(self.reader, self.facts.hidden_size)
        return (vision_projector(self.reader, folder, stored, self.facts.hidden_size),)

    def caveats(self) -> tuple[str, ...]:
        found = [*super().caveats()]
        found += tower_caveats(self.has_tower, bool(self.tower.section("vision_config")))
        apart = f".{self.experts.path}.0."
        if self.experts.orientation == "either" and any(apart in name for name in self.names):
            found.append(_APART)
        if self.unrotated:
            named = ", ".join(map(str, self.unrotated))
            found.append(
                f"llama.cpp does not rotate the pairs {named} of a head, which transformers turns "
                f"by up to {max(self.unrotated.values()):.2g} radians over the whole context of "
                f"{self.facts.context_length:,} tokens; this is so in every GGUF file of this model"
            )
        return tuple(found)
