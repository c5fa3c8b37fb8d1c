"""GLM-4.5, 4.6 and 4.7."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from transformers import Glm4MoeConfig

from reap2gguf.models.glm4_moe import Glm4Moe
from tests.models.config_rows import TEXT, Elsewhere, Read, Refused, Row
from tests.models.drawn import (
    ABSENT,
    COMMON,
    DTYPES,
    FLAGS,
    HEADS,
    NUMBERS,
    Drawn,
    changes_of,
    rope_changes,
)
from tests.models.oracles import SMALL_VOCAB
from tests.tiny import save_sharded
from tests.tokens import SMALL_VOCAB as VOCAB
from tests.tokens import special_tokens, write_tokenizer


@dataclass(frozen=True)
class TinyGlm4Moe:
    """A GLM-4.5 of a few hundred thousand parameters, named as published."""

    hidden: int = 64
    width: int = 40
    dense_width: int = 104
    n_experts: int = 8
    top_k: int = 2
    n_shared: int = 1
    n_layers: int = 3
    n_dense: int = 1
    n_heads: int = 4
    n_kv_heads: int = 2
    head_dim: int = 24
    vocab: int = VOCAB
    qk_norm: bool = False
    biases: bool = True
    mtp: bool = True
    own_ends: bool = True  # an embedding and a head of the MTP block's own
    fused: bool = False  # 3D experts
    tied: bool = False
    normalised: bool = True
    count_key: str = "n_routed_experts"
    n_shards: int = 1
    dtype: torch.dtype = torch.bfloat16
    seed: int = 0

    def config(self) -> dict[str, Any]:
        return {
            "architectures": ["Glm4MoeForCausalLM"],
            "model_type": "glm4_moe",
            "attention_bias": self.biases,
            "attention_dropout": 0.0,
            **special_tokens(self.vocab),
            "first_k_dense_replace": self.n_dense,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "intermediate_size": self.dense_width,
            "max_position_embeddings": 512,
            "moe_intermediate_size": self.width,
            "n_group": 1,
            self.count_key: self.n_experts,
            "n_shared_experts": self.n_shared,
            "norm_topk_prob": self.normalised,
            "num_attention_heads": self.n_heads,
            "num_experts_per_tok": self.top_k,
            "num_hidden_layers": self.n_layers,
            "num_key_value_heads": self.n_kv_heads,
            "num_nextn_predict_layers": int(self.mtp),
            "partial_rotary_factor": 0.5,
            "rms_norm_eps": 1e-5,
            "rope_scaling": None,
            "rope_theta": 10000.0,
            "routed_scaling_factor": 1.5,
            "tie_word_embeddings": self.tied,
            "topk_group": 1,
            "torch_dtype": "bfloat16",
            "use_qk_norm": self.qk_norm,
            "vocab_size": self.vocab,
        }

    def tensors(self) -> dict[str, torch.Tensor]:
        random = _Random(self.seed, self.dtype)
        found = {
            "model.embed_tokens.weight": random.normal(0.5, self.vocab, self.hidden),
            "model.norm.weight": random.norm(self.hidden),
        }
        head = random.normal(0.3, self.vocab, self.hidden)
        if not self.tied:
            found["lm_head.weight"] = head
        for layer in range(self.n_layers):
            found |= self._layer(f"model.layers.{layer}.", random, layer < self.n_dense)
        # a generator of its own: without the block, the others keep their values
        return found | (self._mtp(_Random(self.seed + 1, self.dtype)) if self.mtp else {})

    def _layer(self, prefix: str, random: _Random, dense: bool) -> dict[str, torch.Tensor]:
        hidden, size = self.hidden, self.head_dim
        query, key = self.n_heads * size, self.n_kv_heads * size
        attention = prefix + "self_attn."
        found = {
            prefix + "input_layernorm.weight": random.norm(hidden),
            prefix + "post_attention_layernorm.weight": random.norm(hidden),
            attention + "o_proj.weight": random.output(hidden, query),
        }
        for name, rows in (("q", query), ("k", key), ("v", key)):
            found[f"{attention}{name}_proj.weight"] = random.matrix(rows, hidden)
            bias = random.normal(0.5, rows)
            if self.biases:
                found[f"{attention}{name}_proj.bias"] = bias
        norms = {f"{attention}{name}_norm.weight": random.norm(size) for name in "qk"}
        found |= norms if self.qk_norm else {}
        width = self.dense_width
        if not dense:
            found |= self._experts(prefix + "mlp.", random)
            prefix, width = prefix + "mlp.shared_experts.", self.n_shared * self.width
        else:
            prefix += "mlp."
        return found | {
            prefix + "gate_proj.weight": random.matrix(width, hidden),
            prefix + "up_proj.weight": random.matrix(width, hidden),
            prefix + "down_proj.weight": random.output(hidden, width),
        }

    def _experts(self, mlp: str, random: _Random) -> dict[str, torch.Tensor]:
        """Router and experts; the bias changes which experts are chosen."""
        gate = random.matrix(self.n_experts, self.width, self.hidden)
        up = random.matrix(self.n_experts, self.width, self.hidden)
        down = random.output(self.n_experts, self.hidden, self.width)
        found = {
            mlp + "gate.weight": random.matrix(self.n_experts, self.hidden) * 2,
            mlp + "gate.e_score_correction_bias": random.normal(0.3, self.n_experts).float(),
        }
        if self.fused:
            found[mlp + "experts.gate_up_proj"] = torch.cat((gate, up), dim=1)
            found[mlp + "experts.down_proj"] = down
            return found
        for expert in range(self.n_experts):
            base = f"{mlp}experts.{expert}."
            found[base + "gate_proj.weight"] = gate[expert].clone()
            found[base + "up_proj.weight"] = up[expert].clone()
            found[base + "down_proj.weight"] = down[expert].clone()
        return found

    def _mtp(self, random: _Random) -> dict[str, torch.Tensor]:
        prefix = f"model.layers.{self.n_layers}."
        found = self._layer(prefix, random, dense=False) | {
            prefix + "eh_proj.weight": random.matrix(self.hidden, 2 * self.hidden),
            prefix + "enorm.weight": random.norm(self.hidden),
            prefix + "hnorm.weight": random.norm(self.hidden),
            prefix + "shared_head.norm.weight": random.norm(self.hidden),
        }
        if self.own_ends:
            embedding = random.normal(0.5, self.vocab, self.hidden)
            found[prefix + "embed_tokens.weight"] = embedding
            found[prefix + "shared_head.head.weight"] = random.normal(0.3, *embedding.shape)
        return found

    def write(self, folder: Path) -> Path:
        """Write config, shards, index and tokenizer; the folder."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.config(), indent=2))
        write_tokenizer(folder, self.vocab)
        save_sharded(self.tensors(), folder, self.n_shards)
        return folder


class _Random:
    """Random weights in the checkpoint's type."""

    def __init__(self, seed: int, dtype: torch.dtype) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._dtype = dtype

    def normal(self, deviation: float, *shape: int) -> torch.Tensor:
        values = torch.randn(*shape, generator=self._generator) * deviation
        return values.to(self._dtype)

    def norm(self, size: int) -> torch.Tensor:
        return self.normal(0.1, size) + 1

    def matrix(self, *shape: int) -> torch.Tensor:
        """Weights that keep the size of what they multiply."""
        return self.normal(shape[-1] ** -0.5, *shape)

    def output(self, *shape: int) -> torch.Tensor:
        """A matrix that adds to the residual stream: a router rarely hangs on the last bit."""
        return self.normal(0.2 * shape[-1] ** -0.5, *shape)


GLM45 = TinyGlm4Moe()
GLM46 = replace(GLM45, own_ends=False, qk_norm=True, n_layers=4, n_dense=2)
LAYOUTS: dict[str, dict[str, Any]] = {
    "Glm4MoeForCausalLM": {
        "GLM-4.5-Air": GLM45,
        "GLM-4.6": GLM46,
        "3D": replace(GLM45, fused=True),
        "without MTP, tied": replace(GLM45, mtp=False, tied=True),
        "tied": replace(GLM45, tied=True),
        "another count, all sparse": replace(GLM46, n_dense=0, count_key="num_local_experts"),
        "no biases, not normalised": replace(GLM45, biases=False, normalised=False, n_shared=2),
    },
}

# attention of whole blocks; the published widths of experts and dense layers are none of 256
WIDE = {"Glm4MoeForCausalLM": {"head_dim": 64, "width": 160, "dense_width": 288}}

_GLM4: dict[str, Row] = {
    **{name: row for name, row in TEXT.items() if name not in ("num_experts",)},
    "num_key_value_heads": Read(1),
    "rms_norm_eps": Read(1e-6),
    "intermediate_size": Read(128),
    "attention_bias": Elsewhere("test_glm4_moe.py"),
    "n_shared_experts": Read(2),
    "n_routed_experts": Read(16),
    "routed_scaling_factor": Read(2.5),
    "n_group": Refused((2, None)),
    "topk_group": Refused((2, None)),
    "first_k_dense_replace": Read(3),
    "norm_topk_prob": Read(False),
    "use_qk_norm": Elsewhere("test_glm4_moe.py"),
    "num_mtp_layers": Refused((2, None)),
}
del _GLM4["router_aux_loss_coef"]
FIELDS: dict[Any, tuple[dict[str, Row], Any, Any]] = {
    Glm4MoeConfig: (_GLM4, replace(GLM46, vocab=4096, mtp=False), Glm4Moe),
}

_DRAWN = {
    **COMMON,
    "first_k_dense_replace": NUMBERS, "n_shared_experts": NUMBERS, "n_group": NUMBERS,
    "topk_group": NUMBERS, "use_qk_norm": FLAGS, "num_nextn_predict_layers": NUMBERS,
    "num_mtp_layers": NUMBERS,
    "routed_scaling_factor": st.sampled_from([ABSENT, None, 1.0, 2.5, 1, 0, -1.0, "1"]),
    "mlp_layer_types": st.sampled_from([ABSENT, None, [], ["dense", "sparse"]]),
}  # fmt: skip


@st.composite
def glm4(draw: st.DrawFn) -> Drawn:
    n_experts = draw(st.integers(2, 6))
    n_kv_heads = draw(st.sampled_from([1, 2]))
    n_layers = draw(st.integers(1, 3))
    tiny = TinyGlm4Moe(
        hidden=draw(st.sampled_from([32, 64, 40])),
        width=draw(st.sampled_from([8, 24, 32])),
        dense_width=draw(st.sampled_from([24, 56])),
        n_experts=n_experts,
        top_k=draw(st.integers(1, n_experts)),
        n_shared=draw(st.sampled_from([1, 1, 2])),
        n_layers=n_layers,
        n_dense=draw(st.integers(0, n_layers - 1)),
        n_heads=n_kv_heads * draw(st.sampled_from([1, 2])),
        n_kv_heads=n_kv_heads,
        head_dim=draw(st.sampled_from([8, 16, 16, 32, 12, 24])),
        vocab=draw(st.sampled_from([SMALL_VOCAB, 320])),
        qk_norm=draw(st.booleans()),
        biases=draw(st.booleans()),
        mtp=draw(st.booleans()),
        own_ends=draw(st.booleans()),
        fused=draw(st.booleans()),
        tied=draw(st.booleans()),
        normalised=draw(st.booleans()),
        dtype=draw(DTYPES),
    )
    text = dict(draw(changes_of(_DRAWN, 2)))
    if draw(st.booleans()):
        text |= draw(rope_changes())
    return Drawn(tiny, draw(HEADS), tuple(text.items()), ())


# what configs are drawn of
CONFIGS = (glm4(),)
