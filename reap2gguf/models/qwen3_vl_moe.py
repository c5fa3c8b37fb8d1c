"""Qwen3-VL-MoE (Qwen3-VL-30B-A3B, Qwen3-VL-235B-A22B) and Qwen3-Omni-MoE (Qwen3-Omni-30B-A3B).

Their text model is Qwen3-MoE's. Qwen3-VL nests its config (`text_config`) and its names
(`model.language_model.*`). Its experts are fused (3D): published checkpoints store matrices as
(in, out), and those that transformers has saved as (out, in); the shape shows which.

Qwen3-Omni's is that of the thinker (`thinker_config.text_config`, `thinker.model.*`), with one
tensor per expert (2D). Its towers for images and sound, and what speaks (the talker, which has
experts of its own, and code2wav), stay in the safetensors: llama.cpp's converter writes the text
model alone. GGUF names, types and keys are those of llama.cpp's `qwen3vlmoe`.
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
from reap2gguf.models.facts import refuse_hidden_effects
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
from reap2gguf.models.tying import KEY as TIE_KEY

if TYPE_CHECKING:
    from reap2gguf.checkpoint.config import ConfigReader
    from reap2gguf.checkpoint.safetensors_header import StoredTensor
    from reap2gguf.models.description import ModelFacts
    from reap2gguf.models.gguf_keys import GgufKeys

# Radians. A pair of dimensions that turns by less over the whole context need not be rotated.
_STILL = 0.25
_NESTED = "model.language_model."
_SPEECH = ("talker.", "code2wav.")
_OMNI_TOWERS = ("thinker.visual.", "thinker.audio_tower.")


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
        self._refuse_nesting()
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
        if self.n_deepstack >= facts.n_layers:
            raise UnsupportedModelError(
                f"{rotary.where}: {DEEPSTACK} names {self.n_deepstack} layers of the tower, "
                f"expected fewer than the text model's {facts.n_layers}: llama.cpp adds nothing to "
                "its last one"
            )
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

    def _refuse_nesting(self) -> None:
        """Refuse sections that are missing, or whose types transformers would build otherwise."""
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
        return _NESTED if any(name.startswith(_NESTED) for name in self.names) else "model."

    def header(self) -> list[Entry]:
        return [
            *super().header(),
            (Keys.Rope.DIMENSION_SECTIONS, [*self.sections], ARRAY),
            (Keys.LLM.NUM_DEEPSTACK_LAYERS, self.n_deepstack, UINT32),
        ]

    def check_tensors(self, stored: Mapping[str, StoredTensor]) -> None:
        super().check_tensors(stored)
        # a GGUF header's tensors are described one per expert, under flat names
        first = f"{_NESTED}layers.{self.facts.moe_layers[0]}.{self.experts.path}.0."
        if found := [name for name in stored if name.startswith(first)]:
            raise UnsupportedModelError(
                f"tensor {found[0]!r}: experts are one tensor each, and transformers reads only "
                "fused ones in this architecture; store gate_up_proj and down_proj of all experts "
                "of a layer as one tensor each"
            )

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
        if self.unrotated:
            named = ", ".join(map(str, self.unrotated))
            found.append(
                f"llama.cpp does not rotate the pairs {named} of a head, which transformers turns "
                f"by up to {max(self.unrotated.values()):.2g} radians over the whole context of "
                f"{self.facts.context_length:,} tokens; this is so in every GGUF file of this model"
            )
        return tuple(found)


class Qwen3OmniMoe(Qwen3VlMoe):
    """One Qwen3-Omni-MoE model."""

    model_type: ClassVar[str] = "qwen3_omni_moe"
    text_sections: ClassVar[tuple[str, ...]] = ("thinker_config", "text_config")
    carried_prefixes = (*_OMNI_TOWERS, *_SPEECH)
    head_prefix: ClassVar[str] = "thinker."
    count_keys = ("num_experts",)  # transformers has no other spelling for this text model
    experts: ClassVar[ExpertLayout] = ExpertLayout()
    # transformers' value of an absent key, in Qwen3OmniMoeTextConfig
    defaults: ClassVar[Mapping[str, int]] = {"num_key_value_heads": 4}
    section_types: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "thinker_config": ("qwen3_omni_moe_thinker",),
        "text_config": ("qwen3_omni_moe_text",),
        "vision_config": ("qwen3_omni_moe_vision_encoder",),
    }

    @classmethod
    def is_in_gguf(cls, keys: GgufKeys) -> bool:
        return False  # its text model is written as Qwen3-VL's, which reads it

    @property
    def tower(self) -> ConfigReader:
        return self.reader.with_values(self.reader.section("thinker_config"))

    def read_n_deepstack(self) -> int:
        return 0  # what the converter writes, whatever the tower has

    def check_routing(self) -> None:
        super().check_routing()
        refuse_hidden_effects(self.tower)
        why = f"llama.cpp's {self.gguf_arch} has full attention"
        self.text.expect("sliding_window", why=why)
        why = "a head that is the embedding is not implemented in this architecture"
        for reader in (self.reader, self.tower, self.text):
            reader.expect(TIE_KEY, False, why=why)

    @cached_property
    def text_prefix(self) -> str:
        return "thinker.model."

    def side_files(self, folder: Path, stored: Mapping[str, StoredTensor]) -> tuple[SideFile, ...]:
        return ()

    def caveats(self) -> tuple[str, ...]:
        found = [*super().caveats()]
        if any(name.startswith(_OMNI_TOWERS) for name in self.names):
            found.append(
                "GGUF files hold the text model alone: llama.cpp's converter (October 2026) does "
                "not write a projector of this architecture, so images and sound need the "
                "safetensors"
            )
        if any(name.startswith(_SPEECH) for name in self.names):
            found.append(
                "what speaks (talker, code2wav) is unchanged and reads hidden states of the pruned "
                "thinker; speech is not evaluated"
            )
        return tuple(found)
