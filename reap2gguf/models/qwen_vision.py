"""The vision tower of Qwen3-VL and Qwen3.5 as llama.cpp's projector file (`mmproj`)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from gguf import GGUFValueType, Keys, VisionProjectorType

from reap2gguf.checkpoint.config import ConfigReader
from reap2gguf.errors import CheckpointError, UnknownTensorError, UnsupportedModelError
from reap2gguf.messages import shown
from reap2gguf.models.description import (
    MAX_HEADS,
    MAX_LAYERS,
    MAX_WIDTH,
    GgufTensor,
    HeaderValue,
    SideFile,
    Slab,
    Transform,
    picked,
)
from reap2gguf.models.image_settings import ImageSettings, read_image_settings

if TYPE_CHECKING:
    from reap2gguf.checkpoint.safetensors_header import StoredTensor

Floats = npt.NDArray[np.float32]
_UINT32, _FLOAT32, _ARRAY, _BOOL = (
    GGUFValueType.UINT32,
    GGUFValueType.FLOAT32,
    GGUFValueType.ARRAY,
    GGUFValueType.BOOL,
)
_MAX_PATCH = 2**12  # pixels along an edge


# HF name -> GGUF name, .weight and .bias alike
_BLOCK = {
    "attn.qkv": "attn_qkv",
    "attn.proj": "attn_out",
    "mlp.linear_fc1": "ffn_up",
    "mlp.linear_fc2": "ffn_down",
    "norm1": "ln1",
    "norm2": "ln2",
}
_MERGER = {"merger.norm": "v.post_ln", "merger.linear_fc1": "mm.0", "merger.linear_fc2": "mm.2"}
_DEEPSTACK = {"norm": "norm", "linear_fc1": "fc1", "linear_fc2": "fc2"}
_PATCH = "patch_embed.proj"
DEEPSTACK = "deepstack_visual_indexes"
_TEXT_ALONE = (
    "experts are observed on text alone; the vision tower is unchanged, but experts that only "
    "images need may be removed"
)
_NO_TOWER = (
    "the config names a vision tower that the checkpoint does not contain: in transformers it has "
    "random weights, so use the model for text alone"
)
_OUT_HIDDEN = 3584  # transformers' value of an absent key


def vision_projector(
    config: ConfigReader,
    folder: Path,
    stored: Mapping[str, StoredTensor],
    text_hidden: int,
) -> SideFile:
    """The mmproj file of a vision tower; every one of its stored tensors is in it.

    Raises UnsupportedModelError for a tower that is not implemented, UnknownTensorError for a
    tensor of it that no rule explains, CheckpointError if a tensor or its preprocessor's config is
    missing or of another shape.
    """
    where = f"{folder / 'config.json'}: vision_config"
    read = ConfigReader(config.section("vision_config"), where)
    read.expect("hidden_act", "gelu_pytorch_tanh", why="llama.cpp's qwen3vl_merger uses GELU")
    read.expect("temporal_patch_size", 2, why="llama.cpp splits patches into two frames")
    depth = read.integer("depth", low=1, high=MAX_LAYERS)
    prefix = "model.visual." if any(n.startswith("model.visual.") for n in stored) else "visual."
    tensors = _tensors(read, prefix, depth, text_hidden)
    _check_all_used(tensors, {n: t for n, t in stored.items() if n.startswith(prefix)}, depth)
    images = read_image_settings(folder)
    values = _header(read, config, images, text_hidden)
    title = "vision projector"
    return SideFile("mmproj", "mmproj", "clip", title, tuple(tensors), values, images.notes)


def deepstack_layers(read: ConfigReader) -> tuple[int, ...]:
    """The tower's layers whose outputs enter the text model beside its last one's.

    `read` has vision_config. Raises UnsupportedModelError for one that the tower does not have, and
    for one that is named twice.
    """
    depth = read.integer("depth", low=1, high=MAX_LAYERS)
    found = read.integers(DEEPSTACK, 0, depth - 1)
    if len(set(found)) < len(found):
        raise UnsupportedModelError(
            f"{read.where}: {DEEPSTACK} is {shown(list(found))}, expected each layer once"
        )
    return found


def refuse_tower(config: ConfigReader, text_hidden: int) -> None:
    """Refuse a tower that does not fit the text model, or that llama.cpp computes otherwise."""
    read = config.with_values(config.section("vision_config"))
    if (found := read.integer("out_hidden_size", default=_OUT_HIDDEN)) != text_hidden:
        raise UnsupportedModelError(
            f"{read.where}: vision_config.out_hidden_size is {found}, expected {text_hidden}, the "
            "text model's hidden_size"
        )
    rotary = read.with_values(read.section("rope_parameters"))
    why = "llama.cpp rotates the tower's heads in one way"
    rotary.expect("rope_theta", 10_000, why=why)
    rotary.expect("rope_type", "default", "axial", why=why)


def tower_caveats(has_tower: bool, has_config: bool) -> list[str]:
    """What a user must know of a vision tower, or of a config of one that is not there."""
    if has_tower:
        return [_TEXT_ALONE]
    return [_NO_TOWER] if has_config else []


def _tensors(read: ConfigReader, prefix: str, depth: int, text_hidden: int) -> list[GgufTensor]:
    hidden = read.integer("hidden_size", low=1, high=MAX_WIDTH)
    patch = read.integer("patch_size", low=1, high=_MAX_PATCH)
    channels = read.integer("in_channels", low=1, high=_MAX_PATCH, default=3)
    ffn = read.integer("intermediate_size", low=1, high=MAX_WIDTH)
    merged = hidden * read.integer("spatial_merge_size", low=1, high=_MAX_PATCH) ** 2
    positions = read.integer("num_position_embeddings", low=1, high=MAX_WIDTH, default=2304)
    patches = (hidden, channels, patch, patch)
    shapes = {
        "attn_qkv": (3 * hidden, hidden),
        "attn_out": (hidden, hidden),
        "ffn_up": (ffn, hidden),
        "ffn_down": (hidden, ffn),
        "ln1": (hidden,),
        "ln2": (hidden,),
        "v.post_ln": (hidden,),
        "mm.0": (merged, merged),
        "mm.2": (text_hidden, merged),
        "norm": (merged,),
        "fc1": (merged, merged),
        "fc2": (text_hidden, merged),
    }
    tensors = [
        _tensor(prefix + _PATCH + ".weight", "v.patch_embd.weight", patches, picked(0, axis=2)),
        _tensor(prefix + _PATCH + ".weight", "v.patch_embd.weight.1", patches, picked(1, axis=2)),
        _tensor(prefix + _PATCH + ".bias", "v.patch_embd.bias", (hidden,)),
        _tensor(prefix + "pos_embed.weight", "v.position_embd.weight", (positions, hidden)),
    ]
    for name, gguf_name in _MERGER.items():
        tensors += _pair(prefix + name, gguf_name, shapes[gguf_name])
    places = [(f"blocks.{i}.", f"v.blk.{i}.", _BLOCK) for i in range(depth)]
    # mergers are counted, and llama.cpp has each under the number of its layer
    places += [
        (f"deepstack_merger_list.{i}.", f"v.deepstack.{layer}.", _DEEPSTACK)
        for i, layer in enumerate(deepstack_layers(read))
    ]
    for stored, gguf, names in places:
        for name, gguf_name in names.items():
            tensors += _pair(prefix + stored + name, gguf + gguf_name, shapes[gguf_name])
    return tensors


def _pair(stored: str, gguf_name: str, shape: tuple[int, ...]) -> list[GgufTensor]:
    """A weight and its bias."""
    return [
        _tensor(f"{stored}.weight", f"{gguf_name}.weight", shape),
        _tensor(f"{stored}.bias", f"{gguf_name}.bias", shape[:1]),
    ]


def _tensor(
    stored: str, gguf_name: str, shape: tuple[int, ...], transform: Transform | None = None
) -> GgufTensor:
    whole = len(shape) < 2 or gguf_name.startswith("v.position_embd")
    return GgufTensor(
        gguf_name,
        shape,
        (Slab(stored),),
        always_f32=whole,
        transform=transform,
        needs_f16=transform is not None,  # the kernel of a convolution
    )


def _check_all_used(
    tensors: list[GgufTensor], stored: Mapping[str, StoredTensor], depth: int
) -> None:
    """Every tensor of the tower is used, and has the shape that the config says."""
    shapes = {tensor.slabs[0].stored: _stored_shape(tensor) for tensor in tensors}
    if left := sorted(stored.keys() - shapes.keys()):
        raise UnknownTensorError(
            f"tensor {left[0]!r} has no place in the projector file of a vision tower with {depth} "
            "blocks; remove it, or add it to models/qwen_vision.py"
        )
    for name, shape in shapes.items():
        if name not in stored:
            raise CheckpointError(f"tensor {name!r} of the vision tower is missing")
        if stored[name].shape != shape:
            raise CheckpointError(
                f"tensor {name!r}: shape {list(stored[name].shape)}, expected {list(shape)}, as "
                "vision_config says"
            )


def _stored_shape(tensor: GgufTensor) -> tuple[int, ...]:
    if tensor.transform is None:
        return tensor.shape
    # a frame of the patch embedding: two are stored as one
    return (*tensor.shape[:2], 2, *tensor.shape[2:])


def _header(
    read: ConfigReader, config: ConfigReader, images: ImageSettings, text_hidden: int
) -> tuple[HeaderValue, ...]:
    patch = read.integer("patch_size", low=1, high=_MAX_PATCH)
    positions = read.integer("num_position_embeddings", low=1, high=MAX_WIDTH, default=2304)
    depth, deepstack = read.integer("depth", low=1, high=MAX_LAYERS), deepstack_layers(read)
    text = ConfigReader(config.section("text_config") or config.values, config.where)
    clip = Keys.ClipVision
    entries: list[tuple[str, Any, GGUFValueType]] = [
        (Keys.Clip.HAS_VISION_ENCODER, True, _BOOL),
        (Keys.Clip.PROJECTOR_TYPE, VisionProjectorType.QWEN3VL, GGUFValueType.STRING),
        (clip.PROJECTION_DIM, text_hidden, _UINT32),
        (clip.IMAGE_SIZE, int(math.sqrt(positions) * patch), _UINT32),
        (clip.PATCH_SIZE, patch, _UINT32),
        (clip.EMBEDDING_LENGTH, read.integer("hidden_size", low=1, high=MAX_WIDTH), _UINT32),
        (
            clip.FEED_FORWARD_LENGTH,
            read.integer("intermediate_size", low=1, high=MAX_WIDTH),
            _UINT32,
        ),
        (clip.BLOCK_COUNT, depth, _UINT32),
        (clip.Attention.HEAD_COUNT, read.integer("num_heads", low=1, high=MAX_HEADS), _UINT32),
        (clip.IMAGE_MEAN, images.mean, _ARRAY),
        (clip.IMAGE_STD, images.deviation, _ARRAY),
        (clip.USE_GELU, True, _BOOL),
        (
            clip.SPATIAL_MERGE_SIZE,
            read.integer("spatial_merge_size", low=1, high=_MAX_PATCH),
            _UINT32,
        ),
        # the converter takes the text model's epsilon for the tower's norms
        (
            clip.Attention.LAYERNORM_EPS,
            text.number("rms_norm_eps", low=0, high=1, default=1e-6),
            _FLOAT32,
        ),
        (clip.IS_DEEPSTACK_LAYERS, [layer in deepstack for layer in range(depth)], _ARRAY),
    ]
    return tuple(HeaderValue(key, value, value_type) for key, value, value_type in entries)
