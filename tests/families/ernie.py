"""ERNIE-4.5 with experts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from hypothesis import strategies as st
from transformers import Ernie4_5_MoeConfig

from reap2gguf.models.ernie4_5_moe import Ernie45Moe
from tests.models.config_rows import TEXT, Elsewhere, Read, Refused, Row
from tests.models.drawn import (
    ABSENT,
    COMMON,
    FLAGS,
    HEADS,
    NUMBERS,
    Drawn,
    changes_of,
    rope_changes,
)
from tests.tiny_full_attention import (
    Random,
    Tensors,
    TinyFullAttention,
    drawn_sizes,
    experts_apart,
    norm,
    swiglu,
)


@dataclass(frozen=True)
class TinyErnie45Moe(TinyFullAttention):
    """As published; its biases, of shape (1, E), change which experts are chosen."""

    architecture: ClassVar[str] = "Ernie4_5_MoeForCausalLM"
    model_type: ClassVar[str] = "ernie4_5_moe"
    count_key: ClassVar[str] = "moe_num_experts"
    width_key: ClassVar[str] = "moe_intermediate_size"

    n_layers: int = 3
    n_dense: int = 1
    dense_width: int = 384  # shared width times key-value heads, as in the published 21B
    n_shared: int = 2
    tied: bool = True
    mtp: bool = False
    last: int | None = None  # the last layer with experts; -1 is the last of all

    def config(self) -> dict[str, Any]:
        found = super().config()
        found["moe_k"] = found.pop("num_experts_per_tok")
        return found

    def own_config(self) -> dict[str, Any]:
        return {
            "intermediate_size": self.dense_width,
            "moe_capacity": [64, 64, 64],
            "moe_gate": "topk",
            "moe_layer_end_index": self.last or self.n_layers - 1,
            "moe_layer_interval": 1,
            "moe_layer_start_index": self.n_dense,
            "moe_num_shared_experts": self.n_shared,
            "moe_use_aux_free": True,
            "num_nextn_predict_layers": 1,
            "use_bias": False,
        }

    def feed_forward(self, random: Random, layer: int) -> Tensors:
        if layer < self.n_dense:
            return swiglu(random, self, "mlp", self.dense_width)
        shared: Tensors = {}
        if self.n_shared:
            shared = swiglu(random, self, "mlp.shared_experts", self.n_shared * self.width)
        bias = random.normal(0.1, 1, self.n_experts).float()
        return {
            "mlp.gate.weight": random.normal(0.3, self.n_experts, self.hidden).float(),
            "mlp.moe_statics.e_score_correction_bias": bias,
            **experts_apart(random, self, "mlp.experts", ("gate_proj", "up_proj", "down_proj")),
            **shared,
        }

    def tensors(self) -> Tensors:
        found = super().tensors()
        if not self.mtp:
            return found
        random = Random(self.seed + 1, self.dtype)
        block = {
            "input_layernorm.weight": norm(random, self.hidden),
            "post_attention_layernorm.weight": norm(random, self.hidden),
            **self.attention(random),
            **swiglu(random, self, "mlp", self.dense_width),
        }
        return {
            **found,
            **{f"model.mtp_block.0.{name}": tensor for name, tensor in block.items()},
            "model.mtp_emb_norm.0.weight": norm(random, self.hidden),
            "model.mtp_hidden_norm.0.weight": norm(random, self.hidden),
            "model.mtp_linear_proj.0.weight": random.matrix(self.hidden, 2 * self.hidden),
        }


TINY = TinyErnie45Moe()
LAYOUTS: dict[str, dict[str, Any]] = {
    "Ernie4_5_MoeForCausalLM": {
        "21B-A3B": TINY,
        "with a module for multi-token prediction": replace(TINY, mtp=True),
        "300B-A47B": replace(TINY, n_shared=0, tied=False, n_layers=4, n_dense=3),
        "all sparse, with a size of heads": replace(TINY, n_dense=0, head_dim=24, n_layers=2),
    },
}

_ROWS: dict[str, Row] = {
    **{k: r for k, r in TEXT.items() if k not in ("num_experts", "num_experts_per_tok")},
    "moe_num_experts": Read(16),
    "moe_k": Read(3),
    "moe_num_shared_experts": Read(1),
    "moe_layer_start_index": Read(2),
    "moe_layer_end_index": Refused((1, None)),
    "moe_layer_interval": Refused((2, None)),
    "moe_norm_min": Refused((0.5, None)),
    "intermediate_size": Read(128),
    "use_bias": Refused((True,)),
    "tie_word_embeddings": Elsewhere("test_ernie4_5_moe.py"),
}
del _ROWS["attention_bias"], _ROWS["attention_dropout"]
_CLASS = replace(TINY, vocab=4096, last=-1)
FIELDS: dict[Any, tuple[dict[str, Row], Any, Any]] = {
    Ernie4_5_MoeConfig: (_ROWS, _CLASS, Ernie45Moe),
}

_POOL = {
    **COMMON,
    "moe_num_experts": NUMBERS, "moe_k": NUMBERS, "moe_num_shared_experts": NUMBERS,
    "moe_layer_start_index": NUMBERS, "moe_layer_end_index": NUMBERS,
    "moe_layer_interval": NUMBERS, "use_bias": FLAGS, "moe_use_aux_free": FLAGS,
    "num_nextn_predict_layers": NUMBERS,
    "moe_norm_min": st.sampled_from([ABSENT, None, 1e-12, 0.0, 1e-5, 0.1, -1, "1"]),
}  # fmt: skip


@st.composite
def ernie(draw: st.DrawFn) -> Drawn:
    sizes = draw(drawn_sizes())
    tiny = TinyErnie45Moe(
        **sizes,
        n_dense=draw(st.integers(0, sizes["n_layers"] - 1)),
        n_shared=draw(st.sampled_from([0, 1, 2, 2])),
        dense_width=draw(st.sampled_from([24, 64])),
        mtp=draw(st.booleans()),
    )
    text = dict(draw(changes_of(_POOL, 2)))
    if draw(st.booleans()):
        text |= draw(rope_changes())
    return Drawn(tiny, draw(HEADS), tuple(text.items()), ())


CONFIGS = (ernie(),)
