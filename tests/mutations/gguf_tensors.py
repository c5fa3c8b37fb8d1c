"""Group G: damage to the tensors of a model's GGUF files."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from gguf import GGMLQuantizationType

from reap2gguf.checkpoint.checkpoint import Checkpoint
from reap2gguf.ggml import load_ggml
from reap2gguf.gguf_files.rows import read_rows, rows_per_matrix
from reap2gguf.models.table import describe
from tests.mutations.damage import Absent, Copy, Damage, find
from tests.mutations.gguf_changes import (
    Edit,
    add_output,
    add_vector,
    align,
    cast,
    change_quant,
    coarse,
    duplicate_expert,
    duplicate_row,
    every,
    exchange,
    experts_and_router_rotated,
    flip_bit,
    gate_up_of_one,
    heads_exchanged,
    infinite_scale,
    interleave_rows,
    last_bit,
    nan,
    on,
    one_value,
    only,
    remove,
    rename,
    reorder,
    reshape,
    reverse_rows,
    rotate_experts,
    rotate_rows,
    rotate_rows_of_expert,
    scale,
    scale_block,
    scale_expert,
    swap_blocks,
    swap_columns,
    swap_experts,
    swap_experts_rows,
    swap_rows,
    swap_rows_of_expert,
    thirds_exchanged,
    trailing,
    transpose,
    truncate_quants,
    turn,
    vector,
    whole_experts_swapped,
    zero,
    zero_expert,
    zero_first_bytes,
    zero_last_row,
    zero_row,
    zero_row_of_expert,
    zero_rows_of_all,
    zero_sector,
)
from tests.mutations.gguf_edit import Tensor
from tests.mutations.models import Sound


def damages(sound: Sound) -> Iterator[Damage]:
    """Everything about experts in both files; what is stored alike in both, in one of them."""
    for name, edit in (*_EXPERTS, *_MATRICES):
        yield Damage("G", f"exact, {name}", _in_exact(edit))
        yield Damage("G", f"quantized, {name}", _in_quantized(edit))
    for name, edit in _EXACT:
        yield Damage("G", f"exact, {name}", _in_exact(edit))
    for name, edit in (*_QUANTIZED, *_ROUTER, *_VECTORS, *_HYBRID, *_MTP, *_LISTS):
        yield Damage("G", f"quantized, {name}", _in_quantized(edit))
    yield Damage("G", "a dropped expert instead of a kept one", dropped_expert)
    yield Damage("G", "the end is cut off", _cut)
    yield Damage("G", "quantized without the importance matrix", _unweighted)
    yield Damage("G", "a tensor of another type, its type in the manifest too", _other_type)
    for name, edit in _FORM:
        yield Damage("G", name, _in_quantized(edit))


def _in_exact(edit: Edit) -> Callable[[Copy], None]:
    def apply(copy: Copy) -> None:
        with copy.edit_gguf(copy.exact) as gguf:
            edit(gguf)

    return apply


def _in_quantized(edit: Edit) -> Callable[[Copy], None]:
    def apply(copy: Copy) -> None:
        with copy.edit_gguf(copy.quantized) as gguf:
            edit(gguf)

    return apply


_EXPERTS: list[tuple[str, Edit]] = [
    ("down: two experts swapped", on("ffn_down_exps", swap_experts)),
    ("gate: experts rotated", on("ffn_gate_exps", rotate_experts, 1)),
    ("up: an expert twice", on("ffn_up_exps", duplicate_expert)),
    ("up: an expert zero", on("ffn_up_exps", zero_expert)),
    ("all matrices of two experts swapped", whole_experts_swapped),
    ("experts and router rotated together", experts_and_router_rotated),
    ("gate and up exchanged", exchange("ffn_gate_exps", "ffn_up_exps")),
    ("gate and up of one expert exchanged", gate_up_of_one),
    ("down of two layers exchanged", exchange("ffn_down_exps", "ffn_down_exps", (0, 1))),
    ("gate: a row of an expert zero", on("ffn_gate_exps", zero_row_of_expert)),
    ("down: a row of an expert zero", on("ffn_down_exps", zero_row_of_expert)),
    ("up: a row in sixteen zero", on("ffn_up_exps", zero_rows_of_all)),
    ("gate: two rows of an expert swapped", on("ffn_gate_exps", swap_rows_of_expert)),
    ("up: rows of an expert rotated", on("ffn_up_exps", rotate_rows_of_expert)),
    ("down: an expert times 4", on("ffn_down_exps", scale_expert(4))),
    ("down: an expert times 1.01", on("ffn_down_exps", scale_expert(1.01))),
    ("gate: an expert's sign", on("ffn_gate_exps", scale_expert(-1))),
]
_MATRICES: list[tuple[str, Edit]] = [
    ("embedding: two rows swapped", on("token_embd", swap_rows)),
    ("embedding: a row zero", on("token_embd", zero_row)),
    ("embedding: the last row zero", on("token_embd", zero_last_row)),
    ("embedding: a row twice", on("token_embd", duplicate_row)),
    ("embedding: rows rotated", on("token_embd", rotate_rows)),
    ("output: two rows swapped", on("output", swap_rows)),
    ("output and embedding exchanged", exchange("output", "token_embd")),
    ("attn_q: two rows swapped", on("attn_q", swap_rows)),
    ("attn_q: heads exchanged", on("attn_q", heads_exchanged)),
    ("attn_k: rows for the other kind of RoPE", on("attn_k", interleave_rows)),
    ("attn_v: a row zero", on("attn_v", zero_row)),
    ("attn_k and attn_v exchanged", exchange("attn_k", "attn_v")),
    ("attn_q and attn_output exchanged", exchange("attn_q", "attn_output")),
    ("attn_output: columns exchanged", on("attn_output", swap_columns)),
    ("attn_output: two blocks swapped", on("attn_output", swap_blocks)),
    ("attn_v: zero", on("attn_v", zero)),
    ("down: a sector zero", on("ffn_down_exps", zero_sector)),
    ("embedding: a sector zero", on("token_embd", zero_sector)),
    ("gate: 64 bytes zero", on("ffn_gate_exps", zero_first_bytes)),
    ("up: a high bit flipped", on("ffn_up_exps", flip_bit(7))),
    ("attn_q: a middle bit flipped", on("attn_q", flip_bit(4))),
    ("down: a low bit flipped", on("ffn_down_exps", last_bit)),
    ("attn_output: times 2", on("attn_output", scale(2))),
    ("attn_v: the sign", on("attn_v", scale(-1))),
    ("attn_k: times 1.02", on("attn_k", scale(1.02))),
    ("down: one block times 2", on("ffn_down_exps", scale_block(2))),
    ("gate: one block's sign", on("ffn_gate_exps", scale_block(-1))),
]
_EXACT: list[tuple[str, Edit]] = [
    ("down: experts transposed", on("ffn_down_exps", transpose)),
    ("attn_output: transposed", on("attn_output", transpose)),
    ("gate: values through 8-bit floats", on("ffn_gate_exps", coarse)),
    ("all of attn_q through 8-bit floats", every("attn_q", coarse)),
    ("attn_k: a NaN", on("attn_k", nan)),
    ("attn_q as F16", on("attn_q", cast("F16"))),
    ("up as F32", on("ffn_up_exps", cast("F32"))),
]
_QUANTIZED: list[tuple[str, Edit]] = [
    ("embedding: quants rounded down", on("token_embd", only("Q8_0", truncate_quants))),
    ("embedding: one quant changed", on("token_embd", only("Q8_0", change_quant))),
    ("down: a scale infinite", on("ffn_down_exps", infinite_scale)),
]
_ROUTER: list[tuple[str, Edit]] = [
    ("router rotated", on("ffn_gate_inp", rotate_rows)),
    ("router: two rows swapped", on("ffn_gate_inp", swap_experts_rows)),
    ("router: a row zero", on("ffn_gate_inp", zero_row)),
    ("router: rows reversed", on("ffn_gate_inp", reverse_rows)),
    ("router times 2", on("ffn_gate_inp", scale(2))),
    ("router of two layers exchanged", exchange("ffn_gate_inp", "ffn_gate_inp", (0, 1))),
    ("router as F16", on("ffn_gate_inp", cast("F16"))),
    ("router: a low bit flipped", on("ffn_gate_inp", last_bit)),
]
_VECTORS: list[tuple[str, Edit]] = [
    ("attn_norm and ffn_norm exchanged", exchange("attn_norm", "ffn_norm")),
    ("attn_norm and post_attention_norm exchanged", exchange("attn_norm", "post_attention_norm")),
    ("q_norm and k_norm exchanged", exchange("attn_q_norm", "attn_k_norm")),
    ("norms of two layers exchanged", exchange("attn_norm", "attn_norm", (0, 1))),
    ("output_norm plus one", on("output_norm", vector(lambda v: v + 1))),
    ("attn_norm minus one", on("attn_norm", vector(lambda v: v - 1))),
    ("output_norm zero", on("output_norm", zero)),
    ("output_norm rotated", on("output_norm", vector(lambda v: np.roll(v, 1)))),
    ("attn_norm: the last digit of a value", on("attn_norm", vector(one_value))),
    ("attn_q_norm times 1.001", on("attn_q_norm", scale(1.001))),
    ("attn_norm: a NaN", on("attn_norm", nan)),
]
_HYBRID: list[tuple[str, Edit]] = [
    ("ssm_a without its sign", on("ssm_a", scale(-1))),
    ("ssm_a as its logarithm", on("ssm_a", vector(lambda v: np.log(-v)))),
    ("ssm_a reversed", on("ssm_a", vector(lambda v: v[::-1]))),
    ("ssm_conv1d backwards", on("ssm_conv1d", vector(lambda v: v[..., ::-1]))),
    ("ssm_conv1d: channels rotated", on("ssm_conv1d", rotate_rows)),
    ("ssm_dt reversed", on("ssm_dt.bias", vector(lambda v: v[::-1]))),
    ("ssm_norm plus one", on("ssm_norm", vector(lambda v: v + 1))),
    ("ssm_alpha and ssm_beta exchanged", exchange("ssm_alpha", "ssm_beta")),
    ("ssm_alpha: heads reversed", on("ssm_alpha", reverse_rows)),
    ("ssm_out: columns exchanged", on("ssm_out", swap_columns)),
    ("attn_qkv: queries and keys exchanged", on("attn_qkv", thirds_exchanged)),
    ("attn_qkv: a row zero", on("attn_qkv", zero_row)),
    ("attn_gate: rows rotated", on("attn_gate", rotate_rows)),
    ("shared expert: gate and up exchanged", exchange("ffn_gate_shexp", "ffn_up_shexp")),
    ("shared expert: down of two layers", exchange("ffn_down_shexp", "ffn_down_shexp", (0, 1))),
    ("shared expert's gate: the sign", on("ffn_gate_inp_shexp", scale(-1))),
]
_MTP: list[tuple[str, Edit]] = [
    ("enorm and hnorm exchanged", exchange("nextn.enorm", "nextn.hnorm")),
    ("eh_proj: halves exchanged", on("nextn.eh_proj", swap_columns)),
    ("eh_proj: a row zero", on("nextn.eh_proj", zero_row)),
    ("shared_head_norm of the trunk", exchange("nextn.shared_head_norm", "output_norm")),
    ("shared_head_norm lost", remove("nextn.shared_head_norm")),
    ("the block's router rotated", on("ffn_gate_inp", rotate_rows, 2)),
    ("the block's experts swapped", on("ffn_up_exps", swap_experts, 2)),
]
_LISTS: list[tuple[str, Edit]] = [
    ("attn_v lost", remove("attn_v")),
    ("output_norm lost", remove("output_norm")),
    ("output lost, as if tied", remove("output")),
    ("an output matrix added", add_output),
    ("a bias added", add_vector("blk.0.attn_output.bias")),
    ("an unknown tensor added", add_vector("blk.0.unknown.weight")),
    ("a layer too many", add_vector("blk.9.attn_norm.weight")),
    ("attn_k renamed", rename("attn_k", "attn_kk")),
    ("experts as one matrix", on("ffn_up_exps", reshape)),
    ("sizes of attn_v changed", on("attn_v", turn)),
    ("bytes after the last tensor", trailing),
]
_FORM: list[tuple[str, Edit]] = [
    ("tensors in another order", reorder),
    ("another alignment", align),
]


def dropped_expert(copy: Copy) -> None:
    """Overwrite a kept expert of the first layer with one that was to go."""
    with Checkpoint.open(copy.sound.source) as source, copy.edit_gguf(copy.exact) as gguf:
        kept = gguf.keys["reap2gguf.kept_experts"].value
        n_experts = gguf.keys["reap2gguf.source_expert_count"].value
        n_kept = gguf.tensors[find(gguf, "ffn_gate_exps")].ne[2]
        wrong = next(e for e in range(n_experts) if e not in kept[:n_kept])
        described = {t.name: t for t in describe(source).gguf_tensors(source.tensors)}
        for part in ("gate", "up", "down"):
            name = find(gguf, f"ffn_{part}_exps")
            tensor, original = gguf.tensors[name], described[name]
            rows = read_rows(source, original, original.slabs[wrong], 0, rows_per_matrix(original))
            new = Tensor(tensor.type, tensor.ne[:2], tensor.matrices[0].copy())
            new.put(rows)
            tensor.matrices[1] = new.rows


def _cut(copy: Copy) -> None:
    raw = copy.quantized.read_bytes()
    copy.put(copy.quantized, raw[:-4096])


def _requantized(copy: Copy, stem: str, tensor_type: GGMLQuantizationType | None) -> str:
    """Quantize a tensor anew from the exact file, unweighted; its name."""
    ggml = load_ggml()
    with copy.edit_gguf(copy.exact) as exact, copy.edit_gguf(copy.quantized) as gguf:
        name = find(gguf, stem)
        tensor, values = gguf.tensors[name], exact.tensors[name].values()
        tensor.type = tensor_type or tensor.type
        rows = values.reshape(-1, values.shape[-1])
        even = np.ones(rows.shape[-1], dtype=np.float32)
        tensor.data = np.ascontiguousarray(ggml.quantize(rows, tensor.type, even)).reshape(-1)
    return name


def _unweighted(copy: Copy) -> None:
    with copy.edit_gguf(copy.quantized) as gguf:
        if gguf.tensors[find(gguf, "ffn_gate_exps")].type.name == "Q8_0":
            raise Absent("Q8_0 has no weights")
    _requantized(copy, "ffn_gate_exps", None)


def _other_type(copy: Copy) -> None:
    name = _requantized(copy, "ffn_down_exps", GGMLQuantizationType.Q4_0)
    with copy.edit_manifest() as manifest:
        manifest["gguf"][1]["tensors"][name] = "Q4_0"
