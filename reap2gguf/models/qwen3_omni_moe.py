"""Qwen3-Omni-MoE (Qwen3-Omni-30B-A3B): the thinker's text model, which is Qwen3-VL-MoE's.

The thinker's config and names are nested (`thinker_config.text_config`, `thinker.model.*`), and its
experts are one tensor each (2D). Its towers for images and sound, and the models that speak (the
talker, which has experts of its own, and code2wav), stay in the safetensors. The GGUF is what
llama.cpp's converter makes of it: a `qwen3vlmoe` for text, and no projector, which it cannot write.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from reap2gguf.models.experts import ExpertLayout
from reap2gguf.models.facts import refuse_hidden_effects
from reap2gguf.models.qwen3_vl_moe import Qwen3VlMoe
from reap2gguf.models.tying import KEY as TIE_KEY

if TYPE_CHECKING:
    from reap2gguf.checkpoint.config import ConfigReader
    from reap2gguf.checkpoint.safetensors_header import StoredTensor
    from reap2gguf.models.description import SideFile

_SPEECH = ("talker.", "code2wav.")
_TOWERS = ("thinker.visual.", "thinker.audio_tower.")


class Qwen3OmniMoe(Qwen3VlMoe):
    """One Qwen3-Omni-MoE model."""

    model_type: ClassVar[str] = "qwen3_omni_moe"
    text_sections: ClassVar[tuple[str, ...]] = ("thinker_config", "text_config")
    carried_prefixes = (*_TOWERS, *_SPEECH)
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
        if any(name.startswith(_TOWERS) for name in self.names):
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
