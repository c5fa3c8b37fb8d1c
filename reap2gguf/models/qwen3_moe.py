"""Qwen3-MoE (Qwen3-30B-A3B, Qwen3-235B-A22B, Qwen3-Coder).

Stored names follow transformers' `qwen3_moe`; experts are one tensor each (2D, as published) or
one tensor per layer (3D). GGUF names, types and keys are those of llama.cpp's `qwen3moe`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from reap2gguf.errors import UnsupportedModelError
from reap2gguf.models.rope import rope_metadata
from reap2gguf.models.rules import (
    ATTENTION,
    ATTN_NORM,
    DENSE_FFN,
    FFN_NORM,
    QK_NORMS,
    ROUTER,
    TensorRule,
)
from reap2gguf.models.shared import (
    QWEN_PRE_TOKENIZERS,
    DecoderModel,
    moe_layers_by_step,
    refuse_common,
)

if TYPE_CHECKING:
    from reap2gguf.models.description import ModelFacts


class Qwen3Moe(DecoderModel):
    """One Qwen3-MoE model."""

    model_type: ClassVar[str] = "qwen3_moe"
    gguf_arch: ClassVar[str] = "qwen3moe"
    pre_tokenizers = QWEN_PRE_TOKENIZERS

    def read_facts(self) -> ModelFacts:
        read = self.reader
        read.expect("model_type", self.model_type, why="the config is of another architecture")
        refuse_common(read, self.gguf_arch)
        read.expect(
            "use_sliding_window", False, why=f"llama.cpp's {self.gguf_arch} has full attention"
        )
        self.check_routing()
        rope_metadata(self.config, self.gguf_arch, read.where)  # refuses what is not implemented
        return self.common_facts(moe_layers_by_step(read))

    def check_routing(self) -> None:
        if not self.reader.boolean("norm_topk_prob", default=False):
            raise UnsupportedModelError(
                f"{self.reader.where}: norm_topk_prob is not true, and llama.cpp's qwen3moe always "
                "normalises the chosen experts' weights"
            )

    def sizes(self) -> Mapping[str, int]:
        return {**super().sizes(), "I": self.dense_width() or 0}

    def rules(self, layer: int) -> tuple[TensorRule, ...]:
        ffn = (ROUTER,) if layer in self.sparse_layers else DENSE_FFN
        return (ATTN_NORM, *ATTENTION, *QK_NORMS, FFN_NORM, *ffn)

    def caveats(self) -> tuple[str, ...]:
        if len(self.facts.moe_layers) == self.facts.n_layers:
            return ()
        caveat = (
            f"llama.cpp's {self.gguf_arch} needs experts in every layer, but this model has dense "
            "layers: its GGUF files are written, but llama.cpp cannot load them"
        )
        return (caveat,)
