"""Mixtral."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from hypothesis import strategies as st
from transformers import MixtralConfig

from reap2gguf.models.mixtral import Mixtral
from tests.models.config_rows import TEXT, Carried, Read, Refused, Row
from tests.models.drawn import COMMON, HEADS, NUMBERS, Drawn, changes_of, rope_changes
from tests.tiny_full_attention import (
    Random,
    Tensors,
    TinyFullAttention,
    drawn_sizes,
    experts_apart,
)


@dataclass(frozen=True)
class TinyMixtral(TinyFullAttention):
    """Under the names of the published checkpoints."""

    architecture: ClassVar[str] = "MixtralForCausalLM"
    model_type: ClassVar[str] = "mixtral"
    count_key: ClassVar[str] = "num_local_experts"

    def own_config(self) -> dict[str, Any]:
        return {"router_jitter_noise": 0.0, "sliding_window": None}

    def feed_forward(self, random: Random, layer: int) -> Tensors:
        moe = "block_sparse_moe."
        experts = experts_apart(random, self, moe + "experts", ("w1", "w3", "w2"))
        return {moe + "gate.weight": random.normal(0.3, self.n_experts, self.hidden), **experts}


TINY = TinyMixtral()
LAYOUTS: dict[str, dict[str, Any]] = {
    "MixtralForCausalLM": {
        "published": TINY,
        "with a size of heads": replace(TINY, head_dim=32),
        "tied": replace(TINY, tied=True),
    },
}

ROWS: dict[str, Row] = {
    **{k: row for k, row in TEXT.items() if k not in ("moe_intermediate_size", "num_experts")},
    "num_local_experts": Read(16),
    "intermediate_size": Read(128),
    "head_dim": Read(32, may_be_null=True),
    "sliding_window": Refused((16, 0)),
    "router_jitter_noise": Carried(0.5),  # of training
}
FIELDS: dict[Any, tuple[dict[str, Row], Any, Any]] = {MixtralConfig: (ROWS, TINY, Mixtral)}

_POOL = {**COMMON, "router_jitter_noise": NUMBERS}


@st.composite
def mixtral(draw: st.DrawFn) -> Drawn:
    text = dict(draw(changes_of(_POOL, 2)))
    if draw(st.booleans()):
        text |= draw(rope_changes())
    return Drawn(TinyMixtral(**draw(drawn_sizes())), draw(HEADS), tuple(text.items()), ())


CONFIGS = (mixtral(),)
