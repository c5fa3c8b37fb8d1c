"""The vision tower of Gemma-4 as llama.cpp's projector file (`mmproj`)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from gguf import GGUFValueType, Keys

from reap2gguf.errors import CheckpointError, UnknownTensorError
from reap2gguf.models.description import (
    MAX_HEADS,
    MAX_LAYERS,
    MAX_WIDTH,
    Floats,
    GgufTensor,
    HeaderValue,
    SideFile,
    Slab,
    Transform,
)
from reap2gguf.models.image_settings import read_image_settings

if TYPE_CHECKING:
    from reap2gguf.checkpoint.config import ConfigReader
    from reap2gguf.checkpoint.safetensors_header import StoredTensor

TOWER, EMBEDDER = "model.vision_tower.", "model.embed_vision."
_PROJECTOR = "gemma4v"
_IMAGE_SIZE = 224  # the converter's, which llama.cpp does not use: images keep their proportions
_MAX_PATCH = 2**12  # pixels along an edge
_POOLED = 3  # llama.cpp's, of a header without the key
# stored name -> GGUF name below the block, and the shape in letters
_BLOCK = {
    "input_layernorm.weight": ("ln1.weight", "H"),
    "self_attn.q_proj.linear.weight": ("attn_q.weight", "H H"),
    "self_attn.k_proj.linear.weight": ("attn_k.weight", "H H"),
    "self_attn.v_proj.linear.weight": ("attn_v.weight", "H H"),
    "self_attn.o_proj.linear.weight": ("attn_out.weight", "H H"),
    "self_attn.q_norm.weight": ("attn_q_norm.weight", "D"),
    "self_attn.k_norm.weight": ("attn_k_norm.weight", "D"),
    "post_attention_layernorm.weight": ("attn_post_norm.weight", "H"),
    "pre_feedforward_layernorm.weight": ("ln2.weight", "H"),
    "mlp.gate_proj.linear.weight": ("ffn_gate.weight", "I H"),
    "mlp.up_proj.linear.weight": ("ffn_up.weight", "I H"),
    "mlp.down_proj.linear.weight": ("ffn_down.weight", "H I"),
    "post_feedforward_layernorm.weight": ("ffn_post_norm.weight", "H"),
}
# what llama.cpp's graph computes, whatever a header says
_FIXED: Mapping[str, tuple[Any, ...]] = {
    "hidden_activation": ("gelu_pytorch_tanh",),
    "attention_bias": (False,),
    "use_clipped_linears": (False,),
}


def why_not_written(config: ConfigReader, names: frozenset[str]) -> str | None:
    """Why no projector file is made of a checkpoint's towers; None if one is.

    `names` are the stored tensors. Raises UnsupportedModelError for numbers that are not possible.
    """
    if any(name.startswith("model.audio_tower.") for name in names):
        return "a tower for sound is not implemented"
    read = _tower(config)
    for key, allowed in _FIXED.items():
        value = read.values.get(key)
        if value is not None and value not in allowed:
            return f"vision_config.{key} is not {allowed[0]!r}"
    rotary = read.with_values(read.section("rope_parameters"))
    if rotary.values.get("rope_theta", 100.0) != 100:
        return "the tower's rope_theta is not 100"
    n_heads = read.integer("num_attention_heads", low=1, high=MAX_HEADS, default=12)
    if read.integer("num_key_value_heads", low=1, high=MAX_HEADS, default=12) != n_heads:
        return "the tower's heads share keys"
    if n_heads * _head_dim(read) != _hidden(read):
        return "the tower's heads are not, together, as wide as its hidden states"
    return None


def gemma_projector(
    config: ConfigReader, folder: Path, stored: Mapping[str, StoredTensor], text_hidden: int
) -> SideFile:
    """The mmproj file of a vision tower; every one of its stored tensors is in it.

    Raises UnknownTensorError for a tensor of it that no rule explains, CheckpointError if a tensor
    or its preprocessor's config is missing or of another shape.
    """
    read = _tower(config)
    tensors = _tensors(read, text_hidden)
    own = {name: one for name, one in stored.items() if name.startswith((TOWER, EMBEDDER))}
    _check_all_used(tensors, own)
    images = read_image_settings(folder)
    values = _header(read, text_hidden, images.mean, images.deviation)
    made = tuple(tensor for tensor, _ in tensors.values())
    return SideFile("mmproj", "mmproj", "clip", "vision projector", made, values, images.notes)


def _tower(config: ConfigReader) -> ConfigReader:
    return config.with_values(config.section("vision_config"))


# transformers' values of absent keys, in Gemma4VisionConfig


def _hidden(read: ConfigReader) -> int:
    return read.integer("hidden_size", low=1, high=MAX_WIDTH, default=768)


def _head_dim(read: ConfigReader) -> int:
    return read.integer("head_dim", low=1, high=MAX_WIDTH, default=64)


def _patch(read: ConfigReader) -> int:
    return read.integer("patch_size", low=1, high=_MAX_PATCH, default=16)


def _width(read: ConfigReader) -> int:
    return read.integer("intermediate_size", low=1, high=MAX_WIDTH, default=3072)


def _depth(read: ConfigReader) -> int:
    return read.integer("num_hidden_layers", low=1, high=MAX_LAYERS, default=16)


Shape = tuple[int, ...]


def _tensors(read: ConfigReader, text_hidden: int) -> dict[str, tuple[GgufTensor, Shape]]:
    """The GGUF tensors by stored name, each with the shape that is stored."""
    hidden, patch = _hidden(read), _patch(read)
    sizes = {"H": hidden, "I": _width(read), "D": _head_dim(read)}
    positions = read.integer("position_embedding_size", low=1, high=MAX_WIDTH, default=10240)
    found: dict[str, tuple[GgufTensor, Shape]] = {}

    def add(name: str, gguf: str, shape: Shape) -> None:
        found[name] = GgufTensor(gguf, shape, (Slab(name),), always_f32=len(shape) < 2), shape

    first = f"{TOWER}patch_embedder.input_proj.weight"
    patches, flat = (hidden, 3, patch, patch), (hidden, 3 * patch**2)
    turned = _channels_first(patch)
    made = GgufTensor(
        "v.patch_embd.weight", patches, (Slab(first),), transform=turned, needs_f16=True
    )
    found[first] = made, flat
    table, axes = f"{TOWER}patch_embedder.position_embedding_table", (2, positions, hidden)
    made = GgufTensor(
        "v.position_embd.weight", axes, (Slab(table),), always_f32=True, transform=_WHOLE
    )
    found[table] = made, axes
    if read.boolean("standardize", default=False):
        for name in ("std_bias", "std_scale"):
            add(f"{TOWER}{name}", f"v.{name}", (hidden,))
    for block in range(_depth(read)):
        for name, (gguf, letters) in _BLOCK.items():
            shape = tuple(sizes[letter] for letter in letters.split())
            add(f"{TOWER}encoder.layers.{block}.{name}", f"v.blk.{block}.{gguf}", shape)
    add(
        f"{EMBEDDER}embedding_projection.weight",
        "mm.input_projection.weight",
        (text_hidden, hidden),
    )
    return found


def _put_back(values: Floats, stored: Floats) -> None:
    stored[...] = values.reshape(stored.shape)


# a table for each axis of an image, which is read as a whole
_WHOLE = Transform(lambda values: values, _put_back)


def _channels_first(patch: int) -> Transform:
    """Pixels of a patch are stored colour by colour within each; llama.cpp has colours first."""

    def apply(values: Floats) -> Floats:
        return np.ascontiguousarray(values.reshape(-1, patch, patch, 3).transpose(0, 3, 1, 2))

    def put_back(values: Floats, stored: Floats) -> None:
        turned = values.reshape(-1, 3, patch, patch).transpose(0, 2, 3, 1)
        stored[...] = turned.reshape(stored.shape)

    return Transform(apply, put_back)


def _check_all_used(
    tensors: Mapping[str, tuple[GgufTensor, Shape]], stored: Mapping[str, StoredTensor]
) -> None:
    if left := sorted(stored.keys() - tensors.keys()):
        raise UnknownTensorError(
            f"tensor {left[0]!r} has no place in the projector file of this vision tower; remove "
            "it, or add it to models/gemma_vision.py"
        )
    for name, (_, shape) in tensors.items():
        if name not in stored:
            raise CheckpointError(f"tensor {name!r} of the vision tower is missing")
        if stored[name].shape != shape:
            raise CheckpointError(
                f"tensor {name!r}: shape {list(stored[name].shape)}, expected {list(shape)}, as "
                "vision_config says"
            )


def _header(
    read: ConfigReader, text_hidden: int, mean: list[float], deviation: list[float]
) -> tuple[HeaderValue, ...]:
    clip = Keys.ClipVision
    integer, number, array = GGUFValueType.UINT32, GGUFValueType.FLOAT32, GGUFValueType.ARRAY
    n_heads = read.integer("num_attention_heads", low=1, high=MAX_HEADS, default=12)
    pooled = read.integer("pooling_kernel_size", low=1, high=_MAX_PATCH, default=_POOLED)
    entries: list[tuple[str, Any, GGUFValueType]] = [
        (Keys.Clip.HAS_VISION_ENCODER, True, GGUFValueType.BOOL),
        (clip.PROJECTOR_TYPE, _PROJECTOR, GGUFValueType.STRING),
        (clip.PROJECTION_DIM, text_hidden, integer),
        (clip.IMAGE_SIZE, _IMAGE_SIZE, integer),
        (clip.PATCH_SIZE, _patch(read), integer),
        (clip.EMBEDDING_LENGTH, _hidden(read), integer),
        (clip.FEED_FORWARD_LENGTH, _width(read), integer),
        (clip.BLOCK_COUNT, _depth(read), integer),
        (clip.Attention.HEAD_COUNT, n_heads, integer),
        (clip.IMAGE_MEAN, mean, array),
        (clip.IMAGE_STD, deviation, array),
        # llama.cpp's converter leaves it out, and llama.cpp then takes another approximation
        (clip.USE_GELU, True, GGUFValueType.BOOL),
        (
            clip.Attention.LAYERNORM_EPS,
            read.number("rms_norm_eps", low=0, high=1, default=1e-6),
            number,
        ),
    ]
    if pooled != _POOLED:  # llama.cpp's converter leaves it out
        entries.append((clip.Projector.SCALE_FACTOR, pooled, integer))
    return tuple(HeaderValue(key, value, kind) for key, value, kind in entries)
