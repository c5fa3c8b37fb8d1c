"""Kimi-Linear: Kimi Delta Attention between layers with latent attention."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from transformers import KimiLinearConfig

from reap2gguf.models.kimi_linear import KimiLinear
from tests.models.config_rows import TEXT, Carried, Elsewhere, Read, Refused, Row
from tests.models.drawn import ABSENT, COMMON, DTYPES, FLAGS, HEADS, NUMBERS, Drawn, changes_of
from tests.models.oracles import SMALL_VOCAB
from tests.tiny import save_sharded
from tests.tokens import SMALL_VOCAB as VOCAB
from tests.tokens import special_tokens, write_tokenizer

_KINDS = {"l": "linear_attention", "f": "full_attention"}
# the published spelling -> transformers' names
_NAMES = {
    "model_max_length": "max_position_embeddings",
    "moe_renormalize": "norm_topk_prob",
    "num_expert_group": "n_group",
    "num_experts": "num_local_experts",
    "num_experts_per_token": "num_experts_per_tok",
    "num_shared_experts": "n_shared_experts",
}


@dataclass(frozen=True)
class TinyKimiLinear:
    """A Kimi-Linear; its biases change which experts are chosen."""

    layers: str = "lfl"  # linear or full attention
    n_dense: int = 1
    hidden: int = 64
    width: int = 24
    dense_width: int = 96
    n_experts: int = 8
    top_k: int = 2
    n_shared: int = 1
    n_heads: int = 4
    nope: int = 24
    rotated: int = 8
    value: int = 20
    rank: int = 32
    kda_head: int = 16
    kernel: int = 4
    vocab: int = VOCAB
    as_saved: bool = False  # names of transformers 5: of the config, and of dense layers
    n_shards: int = 1
    dtype: torch.dtype = torch.bfloat16
    seed: int = 0

    def config(self) -> dict[str, Any]:
        found = {
            "architectures": ["KimiLinearForCausalLM"],
            "model_type": "kimi_linear",
            **special_tokens(self.vocab),
            "dtype": "bfloat16",
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "intermediate_size": self.dense_width,
            "kv_lora_rank": self.rank,
            "model_max_length": 512,
            "moe_intermediate_size": self.width,
            "moe_renormalize": True,
            "moe_router_activation_func": "sigmoid",
            "num_attention_heads": self.n_heads,
            "num_expert_group": 1,
            "num_experts": self.n_experts,
            "num_experts_per_token": self.top_k,
            "num_hidden_layers": len(self.layers),
            "num_key_value_heads": self.n_heads,
            "num_shared_experts": self.n_shared,
            "q_lora_rank": None,
            "qk_nope_head_dim": self.nope,
            "qk_rope_head_dim": self.rotated,
            "rms_norm_eps": 1e-5,
            "routed_scaling_factor": 2.446,
            "tie_word_embeddings": False,
            "topk_group": 1,
            "use_cache": True,
            "v_head_dim": self.value,
            "vocab_size": self.vocab,
        }
        if not self.as_saved:
            return found | self._published()
        types = ["dense"] * self.n_dense + ["sparse"] * (len(self.layers) - self.n_dense)
        return {_NAMES.get(key, key): value for key, value in found.items()} | {
            "attention_bias": False,
            "layer_types": [_KINDS[kind] for kind in self.layers],
            "linear_conv_kernel_dim": self.kernel,
            "linear_head_dim": self.kda_head,
            "linear_num_heads": self.n_heads,
            "mlp_layer_types": types,
        }

    def _published(self) -> dict[str, Any]:
        return {
            "first_k_dense_replace": self.n_dense,
            "head_dim": self.hidden // self.n_heads,  # of nothing that is computed
            "linear_attn_config": {
                "full_attn_layers": [n for n, kind in enumerate(self.layers, 1) if kind == "f"],
                "head_dim": self.kda_head,
                "kda_layers": [n for n, kind in enumerate(self.layers, 1) if kind == "l"],
                "num_heads": self.n_heads,
                "short_conv_kernel_size": self.kernel,
            },
            "mla_use_nope": True,
            "moe_layer_freq": 1,
            "num_nextn_predict_layers": 0,
            "rope_theta": 10000.0,
            "use_grouped_topk": True,
        }

    def tensors(self) -> dict[str, torch.Tensor]:
        return dict(self._tensors(torch.Generator().manual_seed(self.seed)))

    def _tensors(self, generator: torch.Generator) -> Iterator[tuple[str, torch.Tensor]]:
        hidden = self.hidden

        def weight(*shape: int, scale: float = 0.09) -> torch.Tensor:
            return (torch.randn(*shape, generator=generator) * scale).to(self.dtype)

        def norm(size: int) -> torch.Tensor:
            return (1 + 0.1 * torch.randn(size, generator=generator)).to(self.dtype)

        def ffn(prefix: str, width: int, names: str = "gate_proj up_proj down_proj") -> Any:
            gate, up, down = names.split()
            yield f"{prefix}{gate}.weight", weight(width, hidden)
            yield f"{prefix}{up}.weight", weight(width, hidden)
            yield f"{prefix}{down}.weight", weight(hidden, width)

        yield "model.embed_tokens.weight", weight(self.vocab, hidden, scale=0.5)
        yield "model.norm.weight", norm(hidden)
        yield "lm_head.weight", weight(self.vocab, hidden)
        for layer, kind in enumerate(self.layers):
            prefix = f"model.layers.{layer}."
            yield prefix + "input_layernorm.weight", norm(hidden)
            yield prefix + "post_attention_layernorm.weight", norm(hidden)
            for name, shape in self._latent() if kind == "f" else self._linear():
                made = norm(*shape) if len(shape) == 1 else weight(*shape, scale=0.15)
                yield f"{prefix}self_attn.{name}.weight", made
            if kind == "l":  # float32 in every checkpoint
                decays = torch.rand(1, 1, self.n_heads, 1, generator=generator) * 15 + 1
                yield prefix + "self_attn.A_log", decays.log()
                wide = torch.randn(self.n_heads * self.kda_head, generator=generator)
                yield prefix + "self_attn.dt_bias", wide - 4
            moe = prefix + "block_sparse_moe."
            if layer < self.n_dense:
                yield from ffn(moe if self.as_saved else prefix + "mlp.", self.dense_width)
                continue
            yield moe + "gate.weight", weight(self.n_experts, hidden, scale=0.2)
            # so large that other experts are chosen
            bias = torch.randn(self.n_experts, generator=generator) * 0.3
            yield moe + "gate.e_score_correction_bias", bias
            yield from ffn(moe + "shared_experts.", self.n_shared * self.width)
            for expert in range(self.n_experts):
                yield from ffn(f"{moe}experts.{expert}.", self.width, "w1 w3 w2")

    def _latent(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield "q_proj", (self.n_heads * (self.nope + self.rotated), self.hidden)
        yield "kv_a_proj_with_mqa", (self.rank + self.rotated, self.hidden)
        yield "kv_a_layernorm", (self.rank,)
        yield "kv_b_proj", (self.n_heads * (self.nope + self.value), self.rank)
        yield "o_proj", (self.hidden, self.n_heads * self.value)

    def _linear(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        one, hidden = self.kda_head, self.hidden
        wide = self.n_heads * one
        for name in "qkv":
            yield f"{name}_proj", (wide, hidden)
            yield f"{name}_conv1d", (wide, 1, self.kernel)
        for name in "fg":
            yield f"{name}_a_proj", (one, hidden)
            yield f"{name}_b_proj", (wide, one)
        yield "b_proj", (self.n_heads, hidden)
        yield "o_norm", (one,)
        yield "o_proj", (hidden, wide)

    def write(self, folder: Path) -> Path:
        """Write config, shards, index and tokenizer; the folder."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.config(), indent=2))
        write_tokenizer(folder, self.vocab)
        save_sharded(self.tensors(), folder, self.n_shards)
        return folder


TINY = TinyKimiLinear()
LAYOUTS: dict[str, dict[str, Any]] = {
    "KimiLinearForCausalLM": {
        "published": TINY,
        "as transformers saves it": replace(TINY, as_saved=True),
        "attention first": replace(TINY, layers="fl", n_dense=0, kernel=3),
        "two dense layers": replace(TINY, layers="llfl", n_dense=2, n_shared=2),
    },
}

_KIMI: dict[str, Row] = {
    **{
        key: row
        for key, row in TEXT.items()
        if key not in ("num_experts", "router_aux_loss_coef", "rope_parameters")
    },
    "num_attention_heads": Refused((8,)),  # num_key_value_heads is another
    "num_key_value_heads": Refused((2, None)),
    "num_local_experts": Read(16),
    "rms_norm_eps": Read(1e-6),
    "intermediate_size": Read(128),
    "n_shared_experts": Read(2),
    "routed_scaling_factor": Read(2.5),
    "kv_lora_rank": Read(48),
    "q_lora_rank": Refused((24,)),
    "qk_rope_head_dim": Read(32),
    "v_head_dim": Read(32),
    "qk_nope_head_dim": Read(32),
    "n_group": Refused((2, None)),
    "topk_group": Refused((2, None)),
    "norm_topk_prob": Refused((False, None)),
    "tie_word_embeddings": Elsewhere("test_kimi_linear.py"),
    "pretraining_tp": Carried(2),
    "layer_types": Read(["full_attention", "linear_attention"] * 2),
    "mlp_layer_types": Read(["dense", "dense", "dense", "sparse"], may_be_null=True),
    "linear_head_dim": Read(32),
    "linear_num_heads": Refused((2, None)),
    "linear_conv_kernel_dim": Read(3),
}
_FIELDS = replace(TINY, layers="llfl", n_dense=0, vocab=4096, as_saved=True)
# transformers' class -> its table, a config of it, and the family that reads it
FIELDS: dict[Any, tuple[dict[str, Row], Any, Any]] = {
    KimiLinearConfig: (_KIMI, _FIELDS, KimiLinear),
}

_TYPES = ["linear_attention", "full_attention"]
_LISTS = {"full_attn_layers": [2], "kda_layers": [1], "num_heads": 2, "head_dim": 16}
_CHANGES = {
    **COMMON,
    "num_experts_per_token": NUMBERS, "model_max_length": COMMON["max_position_embeddings"],
    "num_expert_group": NUMBERS, "n_group": NUMBERS, "topk_group": NUMBERS,
    "num_shared_experts": NUMBERS, "n_shared_experts": NUMBERS, "moe_renormalize": FLAGS,
    "kv_lora_rank": NUMBERS, "q_lora_rank": NUMBERS, "qk_nope_head_dim": NUMBERS,
    "qk_rope_head_dim": NUMBERS, "v_head_dim": NUMBERS, "first_k_dense_replace": NUMBERS,
    "linear_head_dim": NUMBERS, "linear_num_heads": NUMBERS, "linear_conv_kernel_dim": NUMBERS,
    "routed_scaling_factor": st.sampled_from([ABSENT, None, 0, 0.0, 1, 1.8, -1.0, "1"]),
    "moe_router_activation_func": st.sampled_from([ABSENT, None, "sigmoid", "softmax"]),
    "mla_use_nope": FLAGS, "moe_layer_freq": NUMBERS, "num_nextn_predict_layers": NUMBERS,
    "rope_theta": st.sampled_from([ABSENT, None, 5.0, 1e6]),
    "rope_scaling": st.sampled_from([ABSENT, None, {"type": "linear", "factor": 2.0}]),
    "layer_types": st.sampled_from([ABSENT, None, [], _TYPES, _TYPES[::-1], _TYPES[:1] * 2]),
    "mlp_layer_types": st.sampled_from([ABSENT, None, [], ["sparse"] * 2, ["dense", "sparse"],
                                        ["sparse", "dense"], ["dense"] * 2]),
    "linear_attn_config": st.sampled_from(
        [ABSENT, None, {}, 3, _LISTS, _LISTS | {"kda_layers": [1, 2]}, _LISTS | {"kda_layers": []},
         _LISTS | {"full_attn_layers": [0]}, _LISTS | {"head_dim": None}]
    ),
    "model_type": st.sampled_from([ABSENT, None, "kimi_k2", "deepseek_v3", 3]),
}  # fmt: skip


@st.composite
def kimi_linear(draw: st.DrawFn) -> Drawn:
    layers = draw(st.sampled_from(["lf", "lf", "fl", "llf", "lfl"]))
    n_experts = draw(st.integers(2, 6))
    tiny = TinyKimiLinear(
        layers=layers,
        n_dense=draw(st.integers(0, len(layers) - 1)),
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
        kda_head=draw(st.sampled_from([8, 16, 32])),
        kernel=draw(st.sampled_from([4, 4, 2, 3])),
        vocab=SMALL_VOCAB,
        as_saved=draw(st.booleans()),
        dtype=draw(DTYPES),
    )
    # without one, transformers has a token that a small vocabulary has not
    padding = draw(st.sampled_from([0, 0, None, ABSENT]))
    text = {"pad_token_id": padding} | dict(draw(changes_of(_CHANGES, 2)))
    return Drawn(tiny, draw(HEADS), tuple(text.items()), ())


# what configs are drawn of
CONFIGS = (kimi_linear(),)
