"""Writes tiny real checkpoints with random weights, by safetensors' own writer."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

REPOSITORY = Path(__file__).resolve().parent.parent
EXAMPLE = REPOSITORY / "examples" / "tiny-qwen3-moe"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


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
    vocab: int = 4096  # of the example's tokenizer
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
            "bos_token_id": 4093,
            "eos_token_id": 4093,
            "pad_token_id": 4093,
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
        """Write config, shards, index and the example's tokenizer; the folder."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.config(), indent=2))
        for name in TOKENIZER_FILES:
            shutil.copyfile(EXAMPLE / name, folder / name)
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
