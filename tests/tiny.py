"""Writes tiny real checkpoints with random weights, by safetensors' own writer."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.tokens import EXAMPLE, REPOSITORY, SMALL_VOCAB, n_tokens, special_tokens, write_tokenizer

__all__ = [
    "EXAMPLE", "ONE_THREAD", "REPOSITORY", "TinyQwen3Moe", "TinyQwen35Moe", "child_environment",
    "save_sharded",
]  # fmt: skip

# for `llama_cpp.Llama`: its threads wait actively, which takes processors from the other workers
ONE_THREAD = {"n_threads": 1, "n_threads_batch": 1}


def child_environment(more: Mapping[str, str]) -> dict[str, str]:
    """Variables of a child process that imports this checkout's package and tests."""
    path = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, **more, "PYTHONPATH": path}


@dataclass(frozen=True)
class TinyQwen3Moe:
    """A Qwen3-MoE of a few hundred thousand parameters, in any layout the architecture has."""

    n_layers: int = 2
    hidden: int = 64
    width: int = 32
    dense_width: int = 96
    n_experts: int = 8
    top_k: int = 2
    n_heads: int = 4
    n_kv_heads: int = 2
    head_dim: int = 16
    vocab: int = SMALL_VOCAB
    fused: bool = False  # 3D experts
    tied: bool = False
    dense_layers: tuple[int, ...] = ()
    count_key: str = "num_experts"
    n_shards: int = 1
    dtype: torch.dtype = torch.bfloat16
    seed: int = 0

    def config(self) -> dict[str, Any]:
        return {
            "architectures": ["Qwen3MoeForCausalLM"],
            "model_type": "qwen3_moe",
            "attention_bias": False,
            **special_tokens(self.vocab),
            "decoder_sparse_step": 1,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "intermediate_size": self.dense_width,
            "max_position_embeddings": 512,
            "mlp_only_layers": list(self.dense_layers),
            "moe_intermediate_size": self.width,
            "norm_topk_prob": True,
            "num_attention_heads": self.n_heads,
            self.count_key: self.n_experts,
            "num_experts_per_tok": self.top_k,
            "num_hidden_layers": self.n_layers,
            "num_key_value_heads": self.n_kv_heads,
            "rms_norm_eps": 1e-6,
            "rope_theta": 10000.0,
            "tie_word_embeddings": self.tied,
            "vocab_size": self.vocab,
            "torch_dtype": "bfloat16",
        }

    def tensors(self) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(self.seed)

        def weight(*shape: int) -> torch.Tensor:
            return (torch.randn(*shape, generator=generator) * 0.05).to(self.dtype)

        def norm(size: int) -> torch.Tensor:
            return (1 + 0.1 * torch.randn(size, generator=generator)).to(self.dtype)

        found = {
            "model.embed_tokens.weight": weight(self.vocab, self.hidden),
            "model.norm.weight": norm(self.hidden),
        }
        if not self.tied:
            found["lm_head.weight"] = weight(self.vocab, self.hidden)
        query, key = self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim
        for layer in range(self.n_layers):
            prefix = f"model.layers.{layer}."
            found |= {
                prefix + "input_layernorm.weight": norm(self.hidden),
                prefix + "post_attention_layernorm.weight": norm(self.hidden),
                prefix + "self_attn.q_proj.weight": weight(query, self.hidden),
                prefix + "self_attn.k_proj.weight": weight(key, self.hidden),
                prefix + "self_attn.v_proj.weight": weight(key, self.hidden),
                prefix + "self_attn.o_proj.weight": weight(self.hidden, query),
                prefix + "self_attn.q_norm.weight": norm(self.head_dim),
                prefix + "self_attn.k_norm.weight": norm(self.head_dim),
            }
            mlp = prefix + "mlp."
            if layer in self.dense_layers:
                found |= {
                    mlp + "gate_proj.weight": weight(self.dense_width, self.hidden),
                    mlp + "up_proj.weight": weight(self.dense_width, self.hidden),
                    mlp + "down_proj.weight": weight(self.hidden, self.dense_width),
                }
                continue
            found[mlp + "gate.weight"] = weight(self.n_experts, self.hidden) * 4
            gate = weight(self.n_experts, self.width, self.hidden)
            up = weight(self.n_experts, self.width, self.hidden)
            down = weight(self.n_experts, self.hidden, self.width)
            if self.fused:
                found[mlp + "experts.gate_up_proj"] = torch.cat((gate, up), dim=1)
                found[mlp + "experts.down_proj"] = down
                continue
            for expert in range(self.n_experts):
                base = f"{mlp}experts.{expert}."
                found[base + "gate_proj.weight"] = gate[expert].clone()
                found[base + "up_proj.weight"] = up[expert].clone()
                found[base + "down_proj.weight"] = down[expert].clone()
        return found

    def write(self, folder: Path) -> Path:
        """Write config, shards, index and tokenizer; the folder."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.config(), indent=2))
        write_tokenizer(folder, self.vocab)
        save_sharded(self.tensors(), folder, self.n_shards)
        return folder


def save_sharded(tensors: dict[str, torch.Tensor], folder: Path, n_shards: int) -> None:
    """Deal tensors out to shards and write the index, as a checkpoint on the Hub has them."""
    if n_shards == 1:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return
    weight_map = {}
    for number in range(n_shards):
        file_name = f"model-{number + 1:05d}-of-{n_shards:05d}.safetensors"
        part = {name: tensors[name] for name in sorted(tensors)[number::n_shards]}
        save_file(part, folder / file_name, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file_name)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


VISION_FILES = {
    "preprocessor_config.json": {
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "image_processor_type": "Qwen2VLImageProcessorFast",
        "merge_size": 2,
        "patch_size": 16,
        "processor_class": "Qwen3VLProcessor",
        "size": {"longest_edge": 16777216, "shortest_edge": 65536},
        "temporal_patch_size": 2,
    }
}


@dataclass(frozen=True)
class TinyQwen35Moe:
    """A Qwen3.5-MoE in any layout the architecture has; the layout changes no value."""

    hidden: int = 64
    width: int = 32  # of an expert, and of the shared one
    n_experts: int = 8
    top_k: int = 2
    layers: str = "lllf"  # linear or full attention
    n_heads: int = 2
    n_kv_heads: int = 1
    head_dim: int = 32
    key_heads: int = 4
    value_heads: int = 8
    linear_dim: int = 16  # of a key or value head of the linear attention
    vocab: int = SMALL_VOCAB
    nested: bool = True
    fused: bool = True  # 3D experts in the trunk
    fused_mtp: bool = False  # 3D experts in the MTP block
    mtp: bool = True
    vision: bool = True  # nested only
    vision_hidden: int = 32
    tied: bool = False
    n_shards: int = 1
    dtype: torch.dtype = torch.bfloat16
    seed: int = 0

    @property
    def has_tower(self) -> bool:
        return self.vision and self.nested

    def config(self) -> dict[str, Any]:
        rotary = self.head_dim // 8  # a quarter of the head, in pairs
        kinds = {"l": "linear_attention", "f": "full_attention"}
        text = {
            "attention_bias": False,
            **special_tokens(self.vocab),
            **self._interval(),
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "layer_types": [kinds[kind] for kind in self.layers],
            "linear_conv_kernel_dim": 4,
            "linear_key_head_dim": self.linear_dim,
            "linear_num_key_heads": self.key_heads,
            "linear_num_value_heads": self.value_heads,
            "linear_value_head_dim": self.linear_dim,
            "max_position_embeddings": 512,
            "model_type": "qwen3_5_moe_text",
            "moe_intermediate_size": self.width,
            "mtp_num_hidden_layers": int(self.mtp),
            "mtp_use_dedicated_embeddings": False,
            "num_attention_heads": self.n_heads,
            "num_experts": self.n_experts,
            "num_experts_per_tok": self.top_k,
            "num_hidden_layers": len(self.layers),
            "num_key_value_heads": self.n_kv_heads,
            "partial_rotary_factor": 0.25,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {
                "mrope_interleaved": True,
                "mrope_section": [rotary - 2 * (rotary // 3), rotary // 3, rotary // 3],
                "partial_rotary_factor": 0.25,
                "rope_theta": 10000.0,
                "rope_type": "default",
            },
            "shared_expert_intermediate_size": self.width,
            "tie_word_embeddings": self.tied,
            "vocab_size": self.vocab,
            "dtype": "bfloat16",
        }
        if not self.nested:
            return {"architectures": ["Qwen3_5MoeForCausalLM"], **text}
        last = n_tokens(self.vocab) - 1
        outer = {
            "architectures": ["Qwen3_5MoeForConditionalGeneration"],
            "model_type": "qwen3_5_moe",
            "image_token_id": last - 1,
            "video_token_id": last,
            "vision_start_token_id": last - 1,
            "vision_end_token_id": last,
            "tie_word_embeddings": self.tied,
            "text_config": text,
        }
        return outer | ({"vision_config": self._vision_config()} if self.has_tower else {})

    def _interval(self) -> dict[str, int]:
        """As in published configs; absent where no interval describes the layers."""
        types = "".join("f" if i % 4 == 3 else "l" for i in range(len(self.layers)))
        return {"full_attention_interval": 4} if self.layers == types else {}

    def _vision_config(self) -> dict[str, Any]:
        return {
            "deepstack_visual_indexes": [],
            "depth": 2,
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_size": self.vision_hidden,
            "in_channels": 3,
            "intermediate_size": 2 * self.vision_hidden,
            "model_type": "qwen3_5_moe",
            "num_heads": 2,
            "num_position_embeddings": 16,
            "out_hidden_size": self.hidden,
            "patch_size": 16,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        }

    def tensors(self) -> dict[str, torch.Tensor]:
        found = self._text(_Random(self.seed, self.dtype))
        # generators of their own: without a block, the others keep their values
        if self.mtp:
            found |= self._mtp(_Random(self.seed + 1, self.dtype))
        if self.has_tower:
            found |= self._tower(_Random(self.seed + 2, self.dtype))
        return found

    def _text(self, random: _Random) -> dict[str, torch.Tensor]:
        base = "model.language_model." if self.nested else "model."
        found = {
            base + "embed_tokens.weight": random.normal(0.5, self.vocab, self.hidden),
            base + "norm.weight": random.normal(0.1, self.hidden),
        }
        head = random.normal(0.3, self.vocab, self.hidden)
        if not self.tied:
            found["lm_head.weight"] = head
        for layer, kind in enumerate(self.layers):
            prefix = f"{base}layers.{layer}."
            mixer = self._deltanet(random, layer) if kind == "l" else self._attention(random)
            found |= {prefix + name: tensor for name, tensor in mixer.items()}
            found |= self._moe(prefix, random, self.fused)
        return found

    def _mtp(self, random: _Random) -> dict[str, torch.Tensor]:
        found = {
            "mtp.fc.weight": random.matrix(self.hidden, 2 * self.hidden),
            "mtp.norm.weight": random.normal(0.1, self.hidden),
            "mtp.pre_fc_norm_embedding.weight": random.normal(0.1, self.hidden),
            "mtp.pre_fc_norm_hidden.weight": random.normal(0.1, self.hidden),
        }
        prefix = "mtp.layers.0."
        found |= {prefix + name: tensor for name, tensor in self._attention(random).items()}
        return found | self._moe(prefix, random, self.fused_mtp)

    def _attention(self, random: _Random) -> dict[str, torch.Tensor]:
        query, key = self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim
        return {
            "self_attn.q_proj.weight": random.matrix(2 * query, self.hidden),  # with its gate
            "self_attn.k_proj.weight": random.matrix(key, self.hidden),
            "self_attn.v_proj.weight": random.matrix(key, self.hidden),
            "self_attn.o_proj.weight": random.output(self.hidden, query),
            "self_attn.q_norm.weight": random.normal(0.1, self.head_dim),
            "self_attn.k_norm.weight": random.normal(0.1, self.head_dim),
        }

    def _deltanet(self, random: _Random, layer: int) -> dict[str, torch.Tensor]:
        values = self.value_heads * self.linear_dim
        mixed = 2 * self.key_heads * self.linear_dim + values
        # of its own in each layer, so that a layer in the place of another shows
        decay = torch.linspace(1 + layer / 32, 16, self.value_heads).log().to(self.dtype)
        return {
            "linear_attn.in_proj_qkv.weight": random.matrix(mixed, self.hidden),
            "linear_attn.in_proj_z.weight": random.matrix(values, self.hidden),
            "linear_attn.in_proj_a.weight": random.matrix(self.value_heads, self.hidden),
            "linear_attn.in_proj_b.weight": random.matrix(self.value_heads, self.hidden),
            "linear_attn.conv1d.weight": random.normal(0.4, mixed, 1, 4),
            "linear_attn.A_log": decay,
            "linear_attn.dt_bias": random.normal(1, self.value_heads),
            "linear_attn.norm.weight": random.normal(0.1, self.linear_dim) + 1,
            "linear_attn.out_proj.weight": random.output(self.hidden, values),
        }

    def _moe(self, prefix: str, random: _Random, fused: bool) -> dict[str, torch.Tensor]:
        """Experts, router, shared expert and norms of a layer."""
        hidden, width, mlp = self.hidden, self.width, prefix + "mlp."
        found = {
            prefix + "input_layernorm.weight": random.normal(0.1, hidden),
            prefix + "post_attention_layernorm.weight": random.normal(0.1, hidden),
            mlp + "gate.weight": random.matrix(self.n_experts, hidden) * 2,
            mlp + "shared_expert_gate.weight": random.matrix(1, hidden),
            mlp + "shared_expert.gate_proj.weight": random.matrix(width, hidden),
            mlp + "shared_expert.up_proj.weight": random.matrix(width, hidden),
            mlp + "shared_expert.down_proj.weight": random.output(hidden, width),
        }
        gate = random.matrix(self.n_experts, width, hidden)
        up = random.matrix(self.n_experts, width, hidden)
        down = random.output(self.n_experts, hidden, width)
        if fused:
            found[mlp + "experts.gate_up_proj"] = torch.cat((gate, up), dim=1)
            found[mlp + "experts.down_proj"] = down
            return found
        for expert in range(self.n_experts):
            base = f"{mlp}experts.{expert}."
            found[base + "gate_proj.weight"] = gate[expert].clone()
            found[base + "up_proj.weight"] = up[expert].clone()
            found[base + "down_proj.weight"] = down[expert].clone()
        return found

    def _tower(self, random: _Random) -> dict[str, torch.Tensor]:
        size, merged = self.vision_hidden, 4 * self.vision_hidden
        shapes = {"patch_embed.proj": (size, 3, 2, 16, 16)}
        for block in range(2):
            shapes |= {
                f"blocks.{block}.attn.qkv": (3 * size, size),
                f"blocks.{block}.attn.proj": (size, size),
                f"blocks.{block}.mlp.linear_fc1": (2 * size, size),
                f"blocks.{block}.mlp.linear_fc2": (size, 2 * size),
                f"blocks.{block}.norm1": (size,),
                f"blocks.{block}.norm2": (size,),
            }
        shapes |= {
            "merger.norm": (size,),
            "merger.linear_fc1": (merged, merged),
            "merger.linear_fc2": (self.hidden, merged),
        }
        found = {"model.visual.pos_embed.weight": random.normal(0.1, 16, size)}
        for name, shape in shapes.items():
            around = 1 if len(shape) == 1 else 0
            found[f"model.visual.{name}.weight"] = random.normal(0.05, *shape) + around
            found[f"model.visual.{name}.bias"] = random.normal(0.05, shape[0])
        return found

    def write(self, folder: Path) -> Path:
        """Write config, shards, index and tokenizer; the folder."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.config(), indent=2))
        write_tokenizer(folder, self.vocab)
        for name, values in VISION_FILES.items() if self.has_tower else ():
            (folder / name).write_text(json.dumps(values))
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

    def matrix(self, *shape: int) -> torch.Tensor:
        """Weights that keep the size of what they multiply."""
        return self.normal(shape[-1] ** -0.5, *shape)

    def output(self, *shape: int) -> torch.Tensor:
        """A matrix that adds to the residual stream: a router rarely hangs on the last bit."""
        return self.normal(0.2 * shape[-1] ** -0.5, *shape)
