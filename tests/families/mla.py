"""GLM-4.7-Flash: latent attention in llama.cpp's `deepseek2`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from transformers import Glm4MoeLiteConfig

from reap2gguf.models.deepseek2 import Glm4MoeLite
from tests.models.config_rows import TEXT, Carried, Read, Refused, Row
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

_CLASSES = {
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "kimi_k2": "DeepseekV3ForCausalLM",
    "glm4_moe_lite": "Glm4MoeLiteForCausalLM",
}
# what published configs say of the router
_ROUTERS = {
    "deepseek_v2": {"topk_method": "greedy", "scoring_func": "softmax"},
    "deepseek_v3": {"topk_method": "noaux_tc", "scoring_func": "sigmoid"},
    "kimi_k2": {"topk_method": "noaux_tc", "scoring_func": "sigmoid"},
    "glm4_moe_lite": {"topk_method": "noaux_tc"},
}


@dataclass(frozen=True)
class TinyMla:
    """A checkpoint with latent attention: dense layers, sparse ones, and an MTP block.

    The heads' sizes differ from one another, and so do the ranks.
    """

    model_type: str = "glm4_moe_lite"
    n_layers: int = 3
    n_dense: int = 1
    hidden: int = 64
    width: int = 24
    dense_width: int = 96
    n_experts: int = 8
    top_k: int = 2
    n_shared: int = 1
    n_groups: int = 1
    groups_per_token: int = 1
    n_heads: int = 4
    nope: int = 24
    rotated: int = 16
    value: int = 20
    rank: int = 32
    query_rank: int | None = 40
    vocab: int = VOCAB
    mtp: bool = True
    own_ends: bool = False  # the MTP block has an embedding and a head of its own
    dense_as: str = "count"  # of the config: count, types or both
    fused: bool = False
    tied: bool = False
    normalises: bool = True
    scale: float = 1.8
    yarn: tuple[tuple[str, Any], ...] = ()  # the `rope_scaling` of a published config
    n_shards: int = 1
    dtype: torch.dtype = torch.bfloat16
    seed: int = 0

    def config(self) -> dict[str, Any]:
        return {
            "architectures": [_CLASSES[self.model_type]],
            "model_type": self.model_type,
            "attention_bias": False,
            **special_tokens(self.vocab),
            **self._dense(),
            "dtype": "bfloat16",
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "intermediate_size": self.dense_width,
            "kv_lora_rank": self.rank,
            "max_position_embeddings": 512,
            "moe_intermediate_size": self.width,
            "n_group": self.n_groups,
            "n_routed_experts": self.n_experts,
            "n_shared_experts": self.n_shared,
            "norm_topk_prob": self.normalises,
            "num_attention_heads": self.n_heads,
            "num_experts_per_tok": self.top_k,
            "num_hidden_layers": self.n_layers,
            "num_key_value_heads": self.n_heads,
            "num_nextn_predict_layers": int(self.mtp),
            "q_lora_rank": self.query_rank,
            "qk_nope_head_dim": self.nope,
            "qk_rope_head_dim": self.rotated,
            "rms_norm_eps": 1e-5,
            **self._rotary(),
            "routed_scaling_factor": self.scale,
            "tie_word_embeddings": self.tied,
            "topk_group": self.groups_per_token,
            **_ROUTERS[self.model_type],
            "v_head_dim": self.value,
            "vocab_size": self.vocab,
        }

    def _dense(self) -> dict[str, Any]:
        types = ["dense"] * self.n_dense + ["sparse"] * (self.n_layers - self.n_dense)
        count = {"first_k_dense_replace": self.n_dense} if self.dense_as != "types" else {}
        return count | ({"mlp_layer_types": types} if self.dense_as != "count" else {})

    def _rotary(self) -> dict[str, Any]:
        if self.yarn:
            return {"rope_scaling": dict(self.yarn), "rope_theta": 1000.0}
        return {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}}

    def tensors(self) -> dict[str, torch.Tensor]:
        return dict(self._tensors(torch.Generator().manual_seed(self.seed)))

    def _tensors(self, generator: torch.Generator) -> Iterator[tuple[str, torch.Tensor]]:
        hidden, vocab = self.hidden, self.vocab

        def weight(*shape: int, scale: float = 0.09) -> torch.Tensor:
            return (torch.randn(*shape, generator=generator) * scale).to(self.dtype)

        def norm(size: int) -> torch.Tensor:
            return (1 + 0.1 * torch.randn(size, generator=generator)).to(self.dtype)

        yield "model.embed_tokens.weight", weight(vocab, hidden, scale=0.5)
        yield "model.norm.weight", norm(hidden)
        if not self.tied:
            yield "lm_head.weight", weight(vocab, hidden)
        for layer in range(self.n_layers + self.mtp):
            prefix = f"model.layers.{layer}."
            yield prefix + "input_layernorm.weight", norm(hidden)
            yield prefix + "post_attention_layernorm.weight", norm(hidden)
            for name, shape in self._attention():
                made = norm(*shape) if len(shape) == 1 else weight(*shape)
                yield f"{prefix}self_attn.{name}.weight", made
            if layer < self.n_dense:
                yield prefix + "mlp.gate_proj.weight", weight(self.dense_width, hidden)
                yield prefix + "mlp.up_proj.weight", weight(self.dense_width, hidden)
                yield prefix + "mlp.down_proj.weight", weight(hidden, self.dense_width)
                continue
            yield prefix + "mlp.gate.weight", weight(self.n_experts, hidden, scale=0.2)
            if self.model_type != "deepseek_v2":
                # so large that other experts are chosen
                bias = torch.randn(self.n_experts, generator=generator) * 0.3
                yield prefix + "mlp.gate.e_score_correction_bias", bias
            yield from self._experts(prefix + "mlp.", weight)
        if self.mtp:
            prefix = f"model.layers.{self.n_layers}."
            yield prefix + "eh_proj.weight", weight(hidden, 2 * hidden)
            for name in ("enorm", "hnorm", "shared_head.norm"):
                yield f"{prefix}{name}.weight", norm(hidden)
            if self.own_ends:
                yield prefix + "embed_tokens.weight", weight(vocab, hidden, scale=0.5)
                yield prefix + "shared_head.head.weight", weight(vocab, hidden)

    def _attention(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        queries = self.n_heads * (self.nope + self.rotated)
        if self.query_rank is None:
            yield "q_proj", (queries, self.hidden)
        else:
            yield "q_a_proj", (self.query_rank, self.hidden)
            yield "q_a_layernorm", (self.query_rank,)
            yield "q_b_proj", (queries, self.query_rank)
        yield "kv_a_proj_with_mqa", (self.rank + self.rotated, self.hidden)
        yield "kv_a_layernorm", (self.rank,)
        yield "kv_b_proj", (self.n_heads * (self.nope + self.value), self.rank)
        yield "o_proj", (self.hidden, self.n_heads * self.value)

    def _experts(self, mlp: str, weight: Any) -> Iterator[tuple[str, torch.Tensor]]:
        count, width, hidden = self.n_experts, self.width, self.hidden
        shared = self.n_shared * width
        yield mlp + "shared_experts.gate_proj.weight", weight(shared, hidden)
        yield mlp + "shared_experts.up_proj.weight", weight(shared, hidden)
        yield mlp + "shared_experts.down_proj.weight", weight(hidden, shared)
        gate, up = weight(count, width, hidden), weight(count, width, hidden)
        down = weight(count, hidden, width)
        if self.fused:
            yield mlp + "experts.gate_up_proj", torch.cat((gate, up), dim=1)
            yield mlp + "experts.down_proj", down
            return
        for expert in range(count):
            base = f"{mlp}experts.{expert}."
            yield base + "gate_proj.weight", gate[expert].clone()
            yield base + "up_proj.weight", up[expert].clone()
            yield base + "down_proj.weight", down[expert].clone()

    def write(self, folder: Path) -> Path:
        """Write config, shards, index and tokenizer; the folder."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.config(), indent=2))
        write_tokenizer(folder, self.vocab)
        save_sharded(self.tensors(), folder, self.n_shards)
        return folder


FLASH = TinyMla()
LAYOUTS: dict[str, dict[str, Any]] = {
    "Glm4MoeLiteForCausalLM": {
        "published": FLASH,
        "types of layers": replace(FLASH, dense_as="types", n_dense=2, n_layers=4),
        "both spellings": replace(FLASH, dense_as="both"),
        "3D": replace(FLASH, fused=True),
        "MTP with its own ends": replace(FLASH, own_ends=True),
        "without MTP": replace(FLASH, mtp=False),
        "tied": replace(FLASH, tied=True),
        "whole queries": replace(FLASH, query_rank=None, n_shared=2),
        "no dense layers": replace(FLASH, n_dense=0, dense_as="types"),
    },
}

MLA: dict[str, Row] = {
    **{key: row for key, row in TEXT.items() if key not in ("num_experts", "router_aux_loss_coef")},
    "num_attention_heads": Refused((8,)),  # num_key_value_heads is another
    "num_key_value_heads": Refused((2,)),
    "rms_norm_eps": Read(1e-6),
    "intermediate_size": Read(128),
    "n_shared_experts": Read(2),
    "n_routed_experts": Read(16),
    "routed_scaling_factor": Read(2.5),
    "kv_lora_rank": Read(48),
    "q_lora_rank": Read(24, may_be_null=True),
    "qk_rope_head_dim": Read(32),
    "v_head_dim": Read(32),
    "qk_nope_head_dim": Read(32),
    "n_group": Read(2),
    "topk_group": Refused((2,)),  # of one group
    "pretraining_tp": Carried(2),
}
_GLM4_LITE: dict[str, Row] = {
    **MLA,
    "norm_topk_prob": Read(False),
    "rope_interleave": Refused((False,)),
    "mlp_layer_types": Read(["dense", "dense", "dense", "sparse"], may_be_null=True),
}
GLM4_LITE = replace(FLASH, n_layers=4, n_dense=0, mtp=False, vocab=4096, dense_as="types")
# transformers' class -> its table, a config of it, and the family that reads it
FIELDS: dict[Any, tuple[dict[str, Row], Any, Any]] = {
    Glm4MoeLiteConfig: (_GLM4_LITE, GLM4_LITE, Glm4MoeLite),
}

CHANGES = {
    **COMMON,
    "kv_lora_rank": NUMBERS, "q_lora_rank": NUMBERS, "qk_nope_head_dim": NUMBERS,
    "qk_rope_head_dim": NUMBERS, "v_head_dim": NUMBERS, "n_shared_experts": NUMBERS,
    "n_group": NUMBERS, "topk_group": NUMBERS, "first_k_dense_replace": NUMBERS,
    "routed_scaling_factor": st.sampled_from([ABSENT, None, 0, 0.0, 1, 1.8, -1.0, "1"]),
    "mlp_layer_types": st.sampled_from([ABSENT, None, [], ["sparse"] * 2, ["dense", "sparse"],
                                        ["sparse", "dense"], ["dense"] * 2]),
    "topk_method": st.sampled_from([ABSENT, None, "noaux_tc", "greedy", "group_limited_greedy"]),
    "scoring_func": st.sampled_from([ABSENT, None, "sigmoid", "softmax"]),
    "rope_interleave": FLAGS, "num_nextn_predict_layers": NUMBERS, "moe_layer_freq": NUMBERS,
}  # fmt: skip


@st.composite
def drawn_mla(draw: st.DrawFn, model_type: str) -> Drawn:
    n_layers = draw(st.integers(1, 3))
    n_experts = draw(st.sampled_from([2, 3, 4, 6, 8]))
    is_lite, is_v2 = model_type == "glm4_moe_lite", model_type == "deepseek_v2"
    n_groups = draw(st.sampled_from([1, 1, 2, 4]))
    tiny = TinyMla(
        model_type=model_type,
        n_groups=n_groups,
        groups_per_token=draw(st.integers(1, n_groups)),
        n_layers=n_layers,
        n_dense=draw(st.integers(0, n_layers - 1)),
        hidden=draw(st.sampled_from([32, 64, 40])),
        width=draw(st.sampled_from([8, 24, 32])),
        n_experts=n_experts,
        top_k=draw(st.integers(1, n_experts)),
        n_shared=draw(st.integers(1, 2)),
        n_heads=draw(st.sampled_from([1, 2, 4])),
        nope=draw(st.sampled_from([8, 16, 24])),
        rotated=draw(st.sampled_from([8, 16, 10])),
        value=draw(st.sampled_from([8, 16, 20])),
        rank=draw(st.sampled_from([16, 32])),
        query_rank=draw(st.sampled_from([None, 16, 24])),
        vocab=SMALL_VOCAB,
        mtp=not is_v2 and draw(st.booleans()),
        own_ends=draw(st.booleans()),
        dense_as=draw(st.sampled_from(["count", "types", "both"])) if is_lite else "count",
        fused=draw(st.booleans()),
        tied=draw(st.booleans()),
        normalises=not is_v2 and draw(st.booleans()),
        dtype=draw(DTYPES),
    )
    text = dict(draw(changes_of(CHANGES, 2)))
    if draw(st.booleans()):
        text |= draw(rope_changes())
    return Drawn(tiny, draw(HEADS), tuple(text.items()), ())


# what configs are drawn of
CONFIGS = (drawn_mla("glm4_moe_lite"),)

# Header keys that differ from those of llama.cpp's converter on purpose, each with the reason.
DIFFERENCES = {
    "Glm4MoeLiteForCausalLM": {
        "deepseek2.expert_gating_func": "the converter writes none, and the loader then guesses a "
        "softmax but for 47 and 48 layers",
    },
}
