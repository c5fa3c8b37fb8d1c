"""GraniteMoE, with shared experts and without."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from hypothesis import strategies as st
from transformers import GraniteMoeConfig, GraniteMoeSharedConfig

from reap2gguf.models.granite_moe import GraniteMoe, GraniteMoeShared
from tests.models.config_rows import TEXT, Elsewhere, Read, Row
from tests.models.drawn import COMMON, HEADS, NUMBERS, Drawn, changes_of, rope_changes
from tests.tiny_full_attention import (
    Random,
    Tensors,
    TinyFullAttention,
    drawn_sizes,
    experts_apart,
    fused,
    swiglu,
)


@dataclass(frozen=True)
class TinyGraniteMoe(TinyFullAttention):
    """All experts of a layer in one tensor, as in every published checkpoint."""

    architecture: ClassVar[str] = "GraniteMoeForCausalLM"
    model_type: ClassVar[str] = "granitemoe"
    count_key: ClassVar[str] = "num_local_experts"

    tied: bool = True

    def own_config(self) -> dict[str, Any]:
        return {
            "attention_bias": False,
            "attention_multiplier": 0.2,  # and not 64 ** -0.5
            "embedding_multiplier": 3.0,
            "residual_multiplier": 1.5,
            "logits_scaling": 6.0,
        }

    def feed_forward(self, random: Random, layer: int) -> Tensors:
        moe = "block_sparse_moe."
        experts = experts_apart(random, self, moe, ("gate", "up", "down"))
        return {
            moe + "router.layer.weight": random.normal(0.3, self.n_experts, self.hidden),
            **fused(experts, moe + "input_linear.weight", moe + "output_linear.weight"),
        }


@dataclass(frozen=True)
class TinyGraniteMoeShared(TinyGraniteMoe):
    """With an expert that every token goes through."""

    architecture: ClassVar[str] = "GraniteMoeSharedForCausalLM"
    model_type: ClassVar[str] = "granitemoeshared"

    shared_width: int = 160

    def own_config(self) -> dict[str, Any]:
        return {**super().own_config(), "shared_intermediate_size": self.shared_width}

    def feed_forward(self, random: Random, layer: int) -> Tensors:
        found = super().feed_forward(random, layer)
        if self.shared_width:
            gate, up, down = swiglu(random, self, "", self.shared_width).values()
            found["shared_mlp.input_linear.weight"] = torch.cat((gate, up))
            found["shared_mlp.output_linear.weight"] = down
        return found


TINY = TinyGraniteMoe()
SHARED = TinyGraniteMoeShared()
LAYOUTS: dict[str, dict[str, Any]] = {
    "GraniteMoeForCausalLM": {"published": TINY, "with a head": replace(TINY, tied=False)},
    "GraniteMoeSharedForCausalLM": {
        "published": SHARED,
        "without shared experts": replace(SHARED, shared_width=0, tied=False),
    },
}

ROWS: dict[str, Row] = {
    **{k: row for k, row in TEXT.items() if k not in ("moe_intermediate_size", "num_experts")},
    "num_local_experts": Read(16),
    "intermediate_size": Read(128),
    "attention_multiplier": Read(0.125),
    "embedding_multiplier": Read(12.0),
    "residual_multiplier": Read(0.5),
    "logits_scaling": Read(8.0),
}
SHARED_ROWS: dict[str, Row] = {
    **ROWS,
    "shared_intermediate_size": Elsewhere("test_granite_moe.py"),
}
FIELDS: dict[Any, tuple[dict[str, Row], Any, Any]] = {
    GraniteMoeConfig: (ROWS, TINY, GraniteMoe),
    GraniteMoeSharedConfig: (SHARED_ROWS, SHARED, GraniteMoeShared),
}

_SCALES = ("attention_multiplier", "embedding_multiplier", "residual_multiplier", "logits_scaling")
_POOL = {**COMMON, "shared_intermediate_size": NUMBERS} | dict.fromkeys(_SCALES, NUMBERS)


@st.composite
def granite(draw: st.DrawFn) -> Drawn:
    sizes = draw(drawn_sizes(heads=False))
    tiny = (
        TinyGraniteMoeShared(**sizes, shared_width=draw(st.sampled_from([0, 8, 40])))
        if draw(st.booleans())
        else TinyGraniteMoe(**sizes)
    )
    text = dict(draw(changes_of(_POOL, 2)))
    if draw(st.booleans()):
        text |= draw(rope_changes())
    return Drawn(tiny, draw(HEADS), tuple(text.items()), ())


CONFIGS = (granite(),)
