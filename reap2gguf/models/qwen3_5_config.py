"""What a Qwen3.5-MoE config says, read and refused by name."""

from __future__ import annotations

from reap2gguf.checkpoint.config import ConfigReader
from reap2gguf.errors import UnsupportedModelError
from reap2gguf.messages import shown
from reap2gguf.models.deltanet import DeltaNet
from reap2gguf.models.limits import MAX_HEADS, MAX_WIDTH

MTP_KEY = "mtp_num_hidden_layers"


def refuse_what_is_not_implemented(outer: ConfigReader, read: ConfigReader) -> None:
    """Refuse, by name, what llama.cpp's qwen35moe or this program does not do."""
    read.expect("hidden_act", "silu", why="llama.cpp's qwen35moe computes SwiGLU")
    read.expect("attention_bias", False, why="attention biases are not implemented")
    read.expect("attn_output_gate", True, why="llama.cpp's qwen35moe gates its attention")
    read.expect("mlp_only_layers", [], why="llama.cpp's qwen35moe has experts in every layer")
    read.expect(MTP_KEY, 0, 1, why="llama.cpp's qwen35moe has one MTP block")
    read.expect("mtp_use_dedicated_embeddings", False, why="the MTP block shares embeddings")
    outer.expect("quantization_config", why="dequantize the checkpoint to BF16 first")


def read_layer_kinds(read: ConfigReader, n_layers: int) -> tuple[str, ...]:
    """`full_attention` or `linear_attention` for every layer of the trunk."""
    kinds = read.values.get("layer_types")
    if kinds is None:
        step = read.integer("full_attention_interval", low=1, default=4)
        kinds = [
            "linear_attention" if (i + 1) % step else "full_attention" for i in range(n_layers)
        ]
    known = ("full_attention", "linear_attention")
    good = isinstance(kinds, list) and len(kinds) == n_layers and all(k in known for k in kinds)
    if not good:
        raise UnsupportedModelError(
            f"{read.where}: layer_types is {shown(kinds)}, expected {n_layers} of "
            f"{' and '.join(known)}"
        )
    return tuple(kinds)


def read_deltanet(read: ConfigReader) -> DeltaNet:
    """The heads of the linear attention."""
    keys = read.integer("linear_num_key_heads", low=1, high=MAX_HEADS)
    values = read.integer("linear_num_value_heads", low=1, high=MAX_HEADS)
    if values % keys:
        raise UnsupportedModelError(
            f"{read.where}: linear_num_value_heads is {values}, expected a multiple of "
            f"linear_num_key_heads, {keys}"
        )
    key_dim = read.integer("linear_key_head_dim", low=1, high=MAX_WIDTH)
    read.expect(
        "linear_value_head_dim", key_dim,
        why="linear_key_head_dim is that, and llama.cpp has one size for both",
    )  # fmt: skip
    return DeltaNet(
        keys, values, key_dim, read.integer("linear_value_head_dim", low=1, high=MAX_WIDTH)
    )
