"""Group P: damage to the vision projector, its tensors and each of its keys."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import numpy as np

from tests.mutations.damage import Absent, Copy, Damage
from tests.mutations.gguf_changes import (
    exchange,
    last_bit,
    on,
    one_value,
    remove,
    rename,
    rotate_rows,
    scale,
    swap_rows,
    trailing,
    transpose,
    turn,
    vector,
    zero,
    zero_row,
    zero_sector,
)
from tests.mutations.gguf_edit import GgufEdit, Tensor, read_gguf
from tests.mutations.gguf_keys import Edit, add_keys, altered, flag, retyped, text, uint
from tests.mutations.models import Sound


def damages(sound: Sound) -> Iterator[Damage]:
    if sound.projector is None:
        return
    for name in read_gguf(sound.gguf / sound.projector).keys:
        yield Damage("P", f"{name}: removed", _apply(lambda g, n=name: g.keys.pop(n)))
        yield Damage("P", f"{name}: another type", _apply(_retype(name)))
        yield Damage("P", f"{name}: another value", _apply(_alter(name)))
    for title, edit in (*_TENSORS, *_KEYS):
        yield Damage("P", title, _apply(edit))
    yield Damage("P", "the file lost", lambda copy: os.unlink(copy.projector))
    yield Damage("P", "the end is cut off", _cut)
    yield Damage("P", "the model's file in its place", _model)


def _apply(edit: Callable[[GgufEdit], object]) -> Callable[[Copy], None]:
    def apply(copy: Copy) -> None:
        with copy.edit_gguf(copy.projector) as gguf:
            edit(gguf)

    return apply


def _retype(name: str) -> Edit:
    return lambda gguf: gguf.keys.update({name: retyped(gguf.keys[name])})


def _alter(name: str) -> Edit:
    return lambda gguf: gguf.keys.update({name: altered(gguf.keys[name])})


def _rotate_thirds(tensor: Tensor) -> None:
    """Queries, keys and values in another order."""
    thirds = tensor.rows.reshape(3, -1, tensor.row_bytes)
    thirds[:] = np.roll(thirds, 1, axis=0)


def _bgr(values: np.ndarray) -> np.ndarray:
    return values[:, ::-1]


def _summed(gguf: GgufEdit) -> None:
    """Both slices of the patch embedding in one, as for still images."""
    if "v.patch_embd.weight.1" not in gguf.tensors:
        raise Absent("one slice")
    first, second = gguf.tensors["v.patch_embd.weight"], gguf.tensors["v.patch_embd.weight.1"]
    first.put(first.values() + second.values())
    second.put(np.zeros_like(second.values()))


def _swap_slices(gguf: GgufEdit) -> None:
    first, second = gguf.tensors["v.patch_embd.weight"], gguf.tensors["v.patch_embd.weight.1"]
    first.data, second.data = second.data, first.data


_TENSORS: list[tuple[str, Edit]] = [
    ("blocks exchanged", exchange("attn_out", "attn_out", (0, 1))),
    ("queries, keys and values rotated", on("attn_qkv", _rotate_thirds)),
    (
        "bias of queries, keys and values rotated",
        on("blk.0.attn_qkv.bias", vector(lambda v: np.roll(v, 32))),
    ),
    ("ln1 and ln2 exchanged", exchange("ln1", "ln2")),
    ("biases of ln1 and ln2 exchanged", exchange("blk.0.ln1.bias", "blk.0.ln2.bias")),
    ("slices of the patch embedding exchanged", _swap_slices),
    ("slices of the patch embedding summed", _summed),
    ("patch embedding: BGR", on("v.patch_embd", vector(_bgr))),
    ("patch embedding: its bias zero", on("v.patch_embd.bias", zero)),
    ("position embedding: rows swapped", on("v.position_embd", swap_rows)),
    ("position embedding: rows rotated", on("v.position_embd", rotate_rows)),
    ("ffn_up: a row zero", on("ffn_up", zero_row)),
    ("ffn_down: a sector zero", on("ffn_down", zero_sector)),
    ("attn_out: transposed", on("attn_out", transpose)),
    ("attn_out: the sign", on("attn_out", scale(-1))),
    ("mm.0: a low bit flipped", on("mm.0", last_bit)),
    ("mm.2: rows swapped", on("mm.2", swap_rows)),
    ("mm.2: times 1.01", on("mm.2", scale(1.01))),
    ("post_ln minus one", on("v.post_ln", vector(lambda v: v - 1))),
    ("post_ln: the last digit of a value", on("v.post_ln", vector(one_value))),
    ("mm.0: its bias zero", on("mm.0.bias", zero)),
    ("a tensor lost", remove("ffn_up")),
    ("a bias lost", remove("blk.1.ln1.bias")),
    ("a tensor renamed", rename("v.post_ln", "v.pre_ln")),
    ("sizes of attn_out changed", on("attn_out", turn)),
    ("bytes after the last tensor", trailing),
]
_KEYS: list[tuple[str, Edit]] = [
    ("added: an audio encoder", add_keys(("clip.has_audio_encoder", flag(True)))),
    ("added: use_silu", add_keys(("clip.use_silu", flag(True)))),
    ("added: a feature layer", add_keys(("clip.vision.feature_layer", uint(1)))),
    ("added: window attention", add_keys(("clip.vision.n_wa_pattern", uint(8)))),
    ("added: image_min_pixels", add_keys(("clip.vision.image_min_pixels", uint(8)))),
    ("added: a projector type for images", add_keys(("clip.vision.projector_type", text("mlp")))),
]


def _cut(copy: Copy) -> None:
    copy.put(copy.projector, copy.projector.read_bytes()[:-512])


def _model(copy: Copy) -> None:
    copy.put(copy.projector, copy.quantized.read_bytes())
