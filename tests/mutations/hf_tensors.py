"""Group S: damage to the safetensors, and to their headers."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from tests.mutations.damage import Absent, Copy, Damage, Sight
from tests.mutations.models import Sound
from tests.mutations.safetensors_edit import Bytes, HfTensor, Shard

Tensors = dict[str, HfTensor]
Edit = Callable[[Tensors], object]
Change = Callable[[HfTensor], object]


def damages(sound: Sound) -> Iterator[Damage]:
    for title, edit in (*_EXPERTS, *_MATRICES, *_VECTORS, *_LISTS, *_TOWER):
        yield Damage("S", title, in_tensors(edit))
    for title, sight, change in _HEADERS:
        yield Damage("S", title, _in_shard(change), sight)
    for title, reason, change in _HARMLESS:
        yield Damage("S", title, _in_shard(change), harmless=reason)
    yield Damage("S", "q_proj as F16", in_tensors(on("q_proj.weight", cast("F16"))), Sight.SOURCE)
    yield Damage("S", "the first shard cut off", _cut)
    yield Damage("S", "the first shard empty", _empty)


def in_tensors(edit: Edit) -> Callable[[Copy], None]:
    def apply(copy: Copy) -> None:
        with copy.edit_tensors() as tensors:
            edit(tensors)

    return apply


def _in_shard(change: Callable[[Shard], object]) -> Callable[[Copy], None]:
    def apply(copy: Copy) -> None:
        with copy.edit_shards() as shards:
            change(next(iter(shards.values())))

    return apply


def named(tensors: Tensors, ending: str, nth: int = 0) -> str:
    """The name of the nth tensor, by layers, with this end; the trunk's alone."""
    found = sorted(n for n in tensors if n.endswith(ending) and not n.startswith("mtp."))
    if len(found) <= nth:
        raise Absent(f"no tensor {ending}")
    return found[nth]


def expert(tensors: Tensors, part: str, number: int, layer: int = 0) -> Bytes:
    """One expert's matrix as bytes, a view: rows of one tensor, or of a fused one."""
    single = rf"layers\.{layer}\.mlp\.experts\.{number}\.{part}_proj\.weight$"
    for name, tensor in tensors.items():
        if re.search(single, name) and not name.startswith("mtp."):
            return tensor.matrix
    ending = "down_proj" if part == "down" else "gate_up_proj"
    rows = tensors[named(tensors, f"layers.{layer}.mlp.experts.{ending}")].matrix[number]
    half = len(rows) // 2
    return {"gate": rows[:half], "up": rows[half:], "down": rows}[part]


def swap(first: Callable[[Tensors], Bytes], second: Callable[[Tensors], Bytes]) -> Edit:
    def edit(tensors: Tensors) -> None:
        one, other = first(tensors), second(tensors)
        if one.shape != other.shape:
            raise Absent("other shapes")
        kept = one.copy()
        one[:] = other
        other[:] = kept

    return edit


def of(part: str, number: int, layer: int = 0) -> Callable[[Tensors], Bytes]:
    return lambda tensors: expert(tensors, part, number, layer)


def whole(ending: str, nth: int = 0) -> Callable[[Tensors], Bytes]:
    return lambda tensors: tensors[named(tensors, ending, nth)].data


def on(ending: str, change: Change, nth: int = 0) -> Edit:
    return lambda tensors: change(tensors[named(tensors, ending, nth)])


def values(change: Callable[[np.ndarray], np.ndarray]) -> Change:
    return lambda tensor: tensor.put(np.ascontiguousarray(change(tensor.values()), np.float32))


def _expert_values(part: str, number: int, change: Callable[[np.ndarray], object]) -> Edit:
    """Change BF16 values of an expert as their bits."""

    def edit(tensors: Tensors) -> None:
        matrix = expert(tensors, part, number)
        bits = np.ascontiguousarray(matrix).view(np.uint16)
        change(bits)
        matrix[:] = bits.view(np.uint8)

    return edit


def rotate_rows(tensor: HfTensor) -> None:
    tensor.rows[:] = np.roll(tensor.rows, 1, axis=0)


def swap_rows(tensor: HfTensor) -> None:
    tensor.rows[[1, 3]] = tensor.rows[[3, 1]]


def zero_row(tensor: HfTensor) -> None:
    tensor.rows[3] = 0


def zero_sector(tensor: HfTensor) -> None:
    tensor.data[512:1024] = 0


def duplicate(part: str) -> Edit:
    def edit(tensors: Tensors) -> None:
        expert(tensors, part, 2)[:] = expert(tensors, part, 4)

    return edit


def rotate_experts(part: str) -> Edit:
    def edit(tensors: Tensors) -> None:
        matrices = [expert(tensors, part, number) for number in range(6)]
        last = matrices[-1].copy()
        for i in range(5, 0, -1):
            matrices[i][:] = matrices[i - 1]
        matrices[0][:] = last

    return edit


def _set_row(part: str, number: int, value: int) -> Edit:
    return lambda tensors: expert(tensors, part, number).__setitem__(5, value)


def _rotate_expert_rows(tensors: Tensors) -> None:
    matrix = expert(tensors, "up", 2)
    matrix[:] = np.roll(matrix, 1, axis=0)


def _low_bit(bits: np.ndarray) -> None:
    bits.reshape(-1)[bits.size // 2] ^= 1


def _high_bit(bits: np.ndarray) -> None:
    bits.reshape(-1)[bits.size // 2] ^= 1 << 14


def _sign(bits: np.ndarray) -> None:
    bits ^= 1 << 15


def _coarse(bits: np.ndarray) -> None:
    bits &= 0xFFF0


def _nan(bits: np.ndarray) -> None:
    bits.reshape(-1)[9] = 0x7FC0


def cast(dtype: str) -> Change:
    return lambda tensor: tensor.put(tensor.values(), dtype)


def _one_ulp(tensor: HfTensor) -> None:
    tensor.data[0] ^= 1


def _remove(ending: str) -> Edit:
    return lambda tensors: tensors.pop(named(tensors, ending))


def _rename(ending: str, new: str) -> Edit:
    def edit(tensors: Tensors) -> None:
        name = named(tensors, ending)
        tensors[name.replace(ending, new)] = tensors.pop(name)

    return edit


def _add(like: str, change: Callable[[str], str]) -> Edit:
    def edit(tensors: Tensors) -> None:
        name = named(tensors, like)
        new = change(name)
        if new in tensors:
            raise Absent(f"has {new}")
        tensors[new] = tensors[name].copy()

    return edit


def _add_head(tensors: Tensors) -> None:
    """An output matrix for a model whose embeddings are tied."""
    if "lm_head.weight" in tensors:
        raise Absent("not tied")
    head = tensors[named(tensors, "embed_tokens.weight")].copy()
    rotate_rows(head)
    tensors["lm_head.weight"] = head


def _fewer_rows(tensor: HfTensor) -> None:
    tensor.put(tensor.values()[:-1])


def _turned(tensor: HfTensor) -> None:
    tensor.put(np.ascontiguousarray(tensor.values().T))


def _mtp_on(ending: str, change: Change) -> Edit:
    def edit(tensors: Tensors) -> None:
        name = next((n for n in tensors if n.startswith("mtp.") and n.endswith(ending)), None)
        if name is None:
            raise Absent("no MTP block")
        change(tensors[name])

    return edit


def mtp_swap(first: str, second: str) -> Edit:
    def edit(tensors: Tensors) -> None:
        if first not in tensors:
            raise Absent("no MTP block")
        a, b = tensors[first], tensors[second]
        a.data, b.data = b.data, a.data

    return edit


def halves(values: np.ndarray) -> np.ndarray:
    return np.roll(values, values.shape[-1] // 2, axis=-1)


_EXPERTS: list[tuple[str, Edit]] = [
    ("down: two experts swapped", swap(of("down", 1), of("down", 3))),
    ("gate: two experts of the last layer swapped", swap(of("gate", 0, 1), of("gate", 5, 1))),
    ("up: experts rotated", rotate_experts("up")),
    ("gate: an expert twice", duplicate("gate")),
    ("gate and up of an expert exchanged", swap(of("gate", 2), of("up", 2))),
    ("down of two layers exchanged", swap(of("down", 2, 0), of("down", 2, 1))),
    ("up: a row of an expert zero", _set_row("up", 2, 0)),
    ("down: an expert zero", lambda tensors: expert(tensors, "down", 2).fill(0)),
    ("up: rows of an expert rotated", _rotate_expert_rows),
    ("down: a low bit flipped", _expert_values("down", 2, _low_bit)),
    ("down: a high bit flipped", _expert_values("down", 2, _high_bit)),
    ("gate: an expert's sign", _expert_values("gate", 2, _sign)),
    ("up: an expert through 8-bit floats", _expert_values("up", 2, _coarse)),
    ("down: a NaN", _expert_values("down", 2, _nan)),
]
_MATRICES: list[tuple[str, Edit]] = [
    ("router rotated", on("mlp.gate.weight", rotate_rows)),
    ("router: two rows swapped", on("mlp.gate.weight", swap_rows)),
    ("router: a row zero", on("mlp.gate.weight", zero_row)),
    ("router times 1.01", on("mlp.gate.weight", values(lambda v: v * 1.01))),
    ("embedding: two rows swapped", on("embed_tokens.weight", swap_rows)),
    ("embedding: a row zero", on("embed_tokens.weight", zero_row)),
    ("embedding: a sector zero", on("embed_tokens.weight", zero_sector)),
    ("head: two rows swapped", on("lm_head.weight", swap_rows)),
    ("head and embedding exchanged", swap(whole("lm_head.weight"), whole("embed_tokens.weight"))),
    ("q_proj: two rows swapped", on("q_proj.weight", swap_rows)),
    ("k_proj and v_proj exchanged", swap(whole("k_proj.weight"), whole("v_proj.weight"))),
    ("o_proj: columns rotated", on("o_proj.weight", values(lambda v: np.roll(v, 1, axis=1)))),
    ("v_proj zero", on("v_proj.weight", values(np.zeros_like))),
    ("q_proj as F32", on("q_proj.weight", cast("F32"))),
    ("a norm as F32", on("input_layernorm.weight", cast("F32"))),
    ("in_proj_qkv: rows rotated", on("in_proj_qkv.weight", rotate_rows)),
    (
        "in_proj_a and in_proj_b exchanged",
        swap(whole("in_proj_a.weight"), whole("in_proj_b.weight")),
    ),
    ("out_proj: columns exchanged", on("linear_attn.out_proj.weight", values(halves))),
    ("conv1d backwards", on("conv1d.weight", values(lambda v: v[..., ::-1]))),
    (
        "shared expert: gate and up exchanged",
        swap(whole("shared_expert.gate_proj.weight"), whole("shared_expert.up_proj.weight")),
    ),
    ("MTP: halves of fc exchanged", _mtp_on("mtp.fc.weight", values(halves))),
    ("MTP: router rotated", _mtp_on("mlp.gate.weight", rotate_rows)),
    (
        "MTP: both norms exchanged",
        mtp_swap("mtp.pre_fc_norm_embedding.weight", "mtp.pre_fc_norm_hidden.weight"),
    ),
    (
        "MTP: two experts swapped",
        mtp_swap(
            "mtp.layers.0.mlp.experts.1.down_proj.weight",
            "mtp.layers.0.mlp.experts.3.down_proj.weight",
        ),
    ),
]
_VECTORS: list[tuple[str, Edit]] = [
    (
        "norms of a layer exchanged",
        swap(whole("input_layernorm.weight"), whole("post_attention_layernorm.weight")),
    ),
    (
        "norms of two layers exchanged",
        swap(whole("input_layernorm.weight", 0), whole("input_layernorm.weight", 1)),
    ),
    ("q_norm and k_norm exchanged", swap(whole("q_norm.weight"), whole("k_norm.weight"))),
    ("the last norm plus one", on("model.norm.weight", values(lambda v: v + 1))),
    ("the last norm zero", on("input_layernorm.weight", values(np.zeros_like))),
    ("a norm: the last digit of a value", on("input_layernorm.weight", _one_ulp)),
    ("A_log reversed", on("A_log", values(lambda v: v[::-1]))),
    ("A_log plus one", on("A_log", values(lambda v: v + 1))),
    ("dt_bias zero", on("dt_bias", values(np.zeros_like))),
]
_LISTS: list[tuple[str, Edit]] = [
    ("v_proj lost", _remove("v_proj.weight")),
    ("an expert lost", _remove("down_proj.weight")),
    ("the head lost", _remove("lm_head.weight")),
    ("a head added", _add_head),
    ("q_norm renamed", _rename("q_norm.weight", "qq_norm.weight")),
    ("a bias added", _add("q_norm.weight", lambda n: n.replace("q_norm.weight", "o_proj.bias"))),
    (
        "a layer too many",
        _add("input_layernorm.weight", lambda n: re.sub(r"layers\.\d", "layers.7", n)),
    ),
    (
        "an expert too many",
        _add("experts.0.down_proj.weight", lambda n: n.replace("experts.0", "experts.6")),
    ),
    ("an unknown tensor", _add("norm.weight", lambda n: n + ".unknown")),
    (
        "a LoRA's matrix",
        _add("v_proj.weight", lambda n: n.replace("v_proj.weight", "v_proj.lora_A.weight")),
    ),
    (
        "a scale of FP8",
        _add("q_norm.weight", lambda n: n.replace("q_norm.weight", "q_proj.weight_scale_inv")),
    ),
    ("router: a row fewer", on("mlp.gate.weight", _fewer_rows)),
    ("embedding: a row fewer", on("embed_tokens.weight", _fewer_rows)),
    ("k_proj turned", on("k_proj.weight", _turned)),
]
_TOWER: list[tuple[str, Edit]] = [
    (
        "tower: qkv rotated",
        on("attn.qkv.weight", values(lambda v: np.roll(v, len(v) // 3, axis=0))),
    ),
    ("tower: position embedding rotated", on("pos_embed.weight", rotate_rows)),
    (
        "tower: blocks exchanged",
        swap(whole("blocks.0.attn.proj.weight"), whole("blocks.1.attn.proj.weight")),
    ),
    ("tower: a low bit flipped", on("merger.linear_fc1.weight", _one_ulp)),
    ("tower: a bias lost", _remove("blocks.0.norm1.bias")),
    (
        "tower: patches of time exchanged",
        on("patch_embed.proj.weight", values(lambda v: v[:, :, ::-1])),
    ),
]


def _header(change: Callable[[dict[str, Any]], object]) -> Callable[[Shard], None]:
    def edit(shard: Shard) -> None:
        shard.change_header = change

    return edit


def _first_info(header: dict[str, Any]) -> dict[str, Any]:
    return next(info for name, info in header.items() if name != "__metadata__")


def _metadata(values: dict[str, str] | None) -> Callable[[Shard], None]:
    def edit(shard: Shard) -> None:
        shard.metadata = values

    return edit


def _exchange_offsets(header: dict[str, Any]) -> None:
    """Two tensors of one size point at each other's bytes."""
    seen: dict[str, dict[str, Any]] = {}
    for name, info in header.items():
        if name == "__metadata__":
            continue
        key = f"{info['dtype']}{info['shape']}"
        if key in seen:
            one = seen[key]
            one["data_offsets"], info["data_offsets"] = info["data_offsets"], one["data_offsets"]
            return
        seen[key] = info
    raise Absent("all of different shapes")


def _gap(shard: Shard) -> None:
    shard.gap = 8


def _tail(shard: Shard) -> None:
    shard.tail = bytes(64)


_BESIDE = Sight.BESIDE
_HEADERS: list[tuple[str, Sight, Callable[[Shard], object]]] = [
    ("header: two tensors point at each other", _BESIDE, _header(_exchange_offsets)),
    ("header: another dtype", _BESIDE, _header(lambda h: _first_info(h).update(dtype="F16"))),
    ("header: integers", _BESIDE, _header(lambda h: _first_info(h).update(dtype="I16"))),
    ("header: an unknown dtype", _BESIDE, _header(lambda h: _first_info(h).update(dtype="X16"))),
    (
        "header: the shape turned",
        _BESIDE,
        _header(lambda h: _first_info(h)["shape"].reverse() or _first_info(h)["shape"].append(1)),
    ),
    (
        "header: offsets beyond the end",
        _BESIDE,
        _header(lambda h: _first_info(h).update(data_offsets=[0, 2**40])),
    ),
    ("header: metadata of numpy", _BESIDE, _metadata({"format": "np"})),
    ("header: no metadata", _BESIDE, _metadata(None)),
    ("header: more metadata", _BESIDE, _metadata({"format": "pt", "comment": "x"})),
    ("a gap before the first tensor", _BESIDE, _gap),
    ("bytes after the last tensor", _BESIDE, _tail),
]


def _reorder(shard: Shard) -> None:
    shard.tensors = dict(reversed(shard.tensors.items()))


_HARMLESS: list[tuple[str, str, Callable[[Shard], object]]] = [
    ("tensors in another order", "programs find tensors by name", _reorder),
]


def _cut(copy: Copy) -> None:
    first = sorted(copy.hf.glob("*.safetensors"))[0]
    copy.put(first, first.read_bytes()[:-64])


def _empty(copy: Copy) -> None:
    copy.put(sorted(copy.hf.glob("*.safetensors"))[0], b"")
