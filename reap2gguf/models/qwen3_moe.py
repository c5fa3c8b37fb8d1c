"""Qwen3-MoE (Qwen3-30B-A3B, Qwen3-235B-A22B, Qwen3-Coder).

Stored names follow transformers' `qwen3_moe`; experts are one tensor each (2D, as published) or
one tensor a layer (3D, `gate_up_proj` (E, 2F, H) and `down_proj` (E, H, F)). GGUF names, types and
keys are those of llama.cpp's `qwen3moe`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from gguf import GGUFValueType, Keys

from reap2gguf.checkpoint.safetensors_header import StoredTensor
from reap2gguf.errors import UnknownTensorError, UnsupportedModelError
from reap2gguf.models.contract import MoeModel
from reap2gguf.models.description import (
    Carried,
    Expert,
    GgufTensor,
    HeaderValue,
    ModelFacts,
    Plain,
    Role,
    Router,
)
from reap2gguf.models.limits import MAX_EXPERTS, MAX_HEADS, MAX_LAYERS, MAX_VOCABULARY, MAX_WIDTH
from reap2gguf.models.rope import rope_metadata
from reap2gguf.models.tensors import single

# HF name -> GGUF name, outside the layers
_OUTER = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
# HF name -> GGUF name, within a layer
_INNER = {
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "self_attn.q_norm.weight": "attn_q_norm.weight",
    "self_attn.k_norm.weight": "attn_k_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
}
_ROUTER = "mlp.gate.weight"
_LAYER = re.compile(r"model\.layers\.(0|[1-9][0-9]{0,5})\.(.+)")
_EXPERT_2D = re.compile(r"mlp\.experts\.(0|[1-9][0-9]{0,5})\.(gate|up|down)_proj\.weight")
_EXPERT_3D = re.compile(r"mlp\.experts\.(gate_up|down)_proj(?:\.weight)?")
_COUNT_KEYS = ("num_experts", "num_local_experts")
_UINT32, _FLOAT32 = GGUFValueType.UINT32, GGUFValueType.FLOAT32


class Qwen3Moe(MoeModel):
    """One Qwen3-MoE model."""

    model_type: ClassVar[str] = "qwen3_moe"

    def read_facts(self) -> ModelFacts:
        read = self.reader
        read.expect("model_type", "qwen3_moe", why="the config is of another architecture")
        read.expect("hidden_act", "silu", why="llama.cpp's qwen3moe computes SwiGLU")
        read.expect("attention_bias", False, why="attention biases are not implemented")
        read.expect("use_sliding_window", False, why="llama.cpp's qwen3moe has full attention")
        if not read.boolean("norm_topk_prob", default=False):
            raise UnsupportedModelError(
                f"{read.where}: norm_topk_prob is not true, and llama.cpp's qwen3moe always "
                "normalises the chosen experts' weights"
            )
        rope_metadata(self.config, "qwen3moe", read.where)  # refuses what is not implemented
        read.expect("quantization_config", why="dequantize the checkpoint to BF16 first")
        n_layers = read.integer("num_hidden_layers", low=1, high=MAX_LAYERS)
        n_experts = read.integer(*_COUNT_KEYS, low=2, high=MAX_EXPERTS)
        hidden = read.integer("hidden_size", low=1, high=MAX_WIDTH)
        n_heads = read.integer("num_attention_heads", low=1, high=MAX_HEADS)
        dense = set(read.integers("mlp_only_layers", 0, n_layers - 1))
        step = read.integer("decoder_sparse_step", low=1, default=1)
        moe_layers = tuple(i for i in range(n_layers) if i not in dense and (i + 1) % step == 0)
        self._has_experts = frozenset(moe_layers)  # every name is asked for its role by these
        if not moe_layers:
            raise UnsupportedModelError(f"{read.where}: every layer is dense; nothing to prune")
        return ModelFacts(
            architecture="Qwen3MoeForCausalLM",
            gguf_arch="qwen3moe",
            n_layers=n_layers,
            moe_layers=moe_layers,
            hidden_size=hidden,
            expert_width=read.integer("moe_intermediate_size", low=1, high=MAX_WIDTH),
            n_experts=n_experts,
            experts_per_token=read.integer("num_experts_per_tok", low=1, high=n_experts),
            n_heads=n_heads,
            n_kv_heads=read.integer("num_key_value_heads", low=1, high=MAX_HEADS, default=n_heads),
            head_dim=read.integer("head_dim", low=1, high=MAX_WIDTH, default=hidden // n_heads),
            vocab_size=read.integer("vocab_size", low=1, high=MAX_VOCABULARY),
            context_length=read.integer("max_position_embeddings", low=1),
            tied_embeddings=read.boolean("tie_word_embeddings", default=False),
        )

    def layer_prefix(self, layer: int) -> str:
        return f"model.layers.{layer}."

    def role(self, name: str) -> Role:
        if name == "lm_head.weight" and self.facts.tied_embeddings:
            return Carried()  # a copy of the embeddings, which nothing reads
        if name in _OUTER:
            return Plain(layer=None)
        if match := _LAYER.fullmatch(name):
            layer, rest = int(match[1]), match[2]
            if layer < self.facts.n_layers:
                moe = layer in self._has_experts
                if rest in _INNER and not (moe and rest.startswith("mlp.")):
                    return Plain(layer)
                if moe:
                    if rest == _ROUTER:
                        return Router(layer)
                    if expert := _EXPERT_2D.fullmatch(rest):
                        return Expert(layer, expert[2], int(expert[1]))  # type: ignore[arg-type]
                    if fused := _EXPERT_3D.fullmatch(rest):
                        return Expert(layer, fused[1], None)  # type: ignore[arg-type]
        raise UnknownTensorError(
            f"tensor {name!r} has no meaning in {self.facts.architecture} with "
            f"{self.facts.n_layers} layers; nothing is skipped silently, so it must be removed or "
            "taught to models/qwen3_moe.py"
        )

    def gguf_tensors(self, stored: Mapping[str, StoredTensor]) -> tuple[GgufTensor, ...]:
        return tuple(self._gguf_tensors(stored))

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        facts = self.facts
        hidden, head = facts.hidden_size, facts.head_dim
        query, key = facts.n_heads * head, facts.n_kv_heads * head
        dense = self._dense_width() or 0
        inner = {
            "input_layernorm.weight": (hidden,),
            "post_attention_layernorm.weight": (hidden,),
            "self_attn.q_proj.weight": (query, hidden),
            "self_attn.k_proj.weight": (key, hidden),
            "self_attn.v_proj.weight": (key, hidden),
            "self_attn.o_proj.weight": (hidden, query),
            "self_attn.q_norm.weight": (head,),
            "self_attn.k_norm.weight": (head,),
            _ROUTER: (facts.n_experts, hidden),
            "mlp.gate_proj.weight": (dense, hidden),
            "mlp.up_proj.weight": (dense, hidden),
            "mlp.down_proj.weight": (hidden, dense),
        }
        outer = {
            "model.embed_tokens.weight": (facts.vocab_size, hidden),
            "lm_head.weight": (facts.vocab_size, hidden),
            "model.norm.weight": (hidden,),
        }
        return outer | {
            self.layer_prefix(layer) + name: shape
            for layer in range(facts.n_layers)
            for name, shape in inner.items()
        }

    def caveats(self) -> tuple[str, ...]:
        if len(self.facts.moe_layers) == self.facts.n_layers:
            return ()
        caveat = (
            "llama.cpp's qwen3moe wants experts in every layer, and this model has dense ones: its "
            "GGUF files are converted by the rules but do not load there"
        )
        return (caveat,)

    def _gguf_tensors(self, stored: Mapping[str, StoredTensor]) -> Iterator[GgufTensor]:
        for name, gguf_name in _OUTER.items():
            if not isinstance(self.role(name), Carried):
                yield single(stored, name, gguf_name)
        for layer in range(self.facts.n_layers):
            prefix = self.layer_prefix(layer)
            for rest, gguf_rest in _INNER.items():
                if rest.startswith("mlp.") and layer in self._has_experts:
                    continue
                yield single(stored, prefix + rest, f"blk.{layer}.{gguf_rest}")
            if layer in self._has_experts:
                router = f"blk.{layer}.ffn_gate_inp.weight"
                yield single(stored, prefix + _ROUTER, router, always_f32=True)
                yield from self.expert_tensors(layer, stored).values()

    def gguf_metadata(self) -> tuple[HeaderValue, ...]:
        facts, llm = self.facts, Keys.LLM
        entries: list[tuple[str, int | float | None, GGUFValueType]] = [
            (llm.BLOCK_COUNT, facts.n_layers, _UINT32),
            (llm.CONTEXT_LENGTH, facts.context_length, _UINT32),
            (llm.EMBEDDING_LENGTH, facts.hidden_size, _UINT32),
            (llm.FEED_FORWARD_LENGTH, self._dense_width(), _UINT32),
            (Keys.Attention.HEAD_COUNT, facts.n_heads, _UINT32),
            (Keys.Attention.HEAD_COUNT_KV, facts.n_kv_heads, _UINT32),
            (
                Keys.Attention.LAYERNORM_RMS_EPS,
                self.reader.number("rms_norm_eps", low=0, high=1),
                _FLOAT32,
            ),
            (Keys.Attention.KEY_LENGTH, facts.head_dim, _UINT32),
            (Keys.Attention.VALUE_LENGTH, facts.head_dim, _UINT32),
            (llm.EXPERT_COUNT, facts.n_experts, _UINT32),
            (llm.EXPERT_USED_COUNT, facts.experts_per_token, _UINT32),
            (llm.EXPERT_FEED_FORWARD_LENGTH, facts.expert_width, _UINT32),
        ]
        own = tuple(
            HeaderValue(key.format(arch=facts.gguf_arch), value, kind)
            for key, value, kind in entries
            if value is not None
        )
        return own + rope_metadata(self.config, facts.gguf_arch, self.reader.where)

    def _dense_width(self) -> int | None:
        if self.config.get("intermediate_size") is None:
            return None
        return self.reader.integer("intermediate_size", low=1, high=MAX_WIDTH)

    def pruned_config(self, n_experts: int) -> dict[str, Any]:
        return {
            key: n_experts if key in _COUNT_KEYS else value for key, value in self.config.items()
        }

    def matrices(self, layer: int) -> Mapping[str, tuple[str, ...]]:
        blk = f"blk.{layer}"
        found = {
            "self_attn.q_proj": (f"{blk}.attn_q", f"{blk}.attn_k", f"{blk}.attn_v"),
            "self_attn.o_proj": (f"{blk}.attn_output",),
        }
        if layer in self._has_experts:
            found["mlp.gate"] = (f"{blk}.ffn_gate_inp",)
        else:
            found["mlp.gate_proj"] = (f"{blk}.ffn_gate", f"{blk}.ffn_up")
            found["mlp.down_proj"] = (f"{blk}.ffn_down",)
        return {path: tuple(f"{n}.weight" for n in names) for path, names in found.items()}
