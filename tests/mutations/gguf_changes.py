"""Changes of one tensor of a GGUF file, and of the list of them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType

from tests.mutations.damage import Absent, find
from tests.mutations.gguf_edit import GgufEdit, Key, Tensor

Edit = Callable[[GgufEdit], None]
Change = Callable[[Tensor], None]


def on(stem: str, change: Change, nth: int = 0) -> Edit:
    """A change of one tensor."""
    return lambda gguf: change(gguf.tensors[find(gguf, stem, nth)])


def exchange(first: str, second: str, nth: tuple[int, int] = (0, 0)) -> Edit:
    """Two tensors exchange their bytes, where their shapes are the same."""

    def edit(gguf: GgufEdit) -> None:
        one, other = find(gguf, first, nth[0]), find(gguf, second, nth[1])
        a, b = gguf.tensors[one], gguf.tensors[other]
        if a.ne != b.ne:
            raise Absent(f"{one} and {other} have other shapes")
        if a.type is not b.type:  # types stay where they are
            raise Absent(f"{one} and {other} have other types")
        a.data, b.data = b.data, a.data

    return edit


def every(stem: str, change: Change) -> Edit:
    """A change of a tensor in all layers."""

    def edit(gguf: GgufEdit) -> None:
        find(gguf, stem)
        for name, tensor in gguf.tensors.items():
            if name.endswith((f".{stem}.weight", f".{stem}")):
                change(tensor)

    return edit


# changes of experts, (experts, rows, bytes)
def swap_experts(tensor: Tensor) -> None:
    tensor.matrices[[1, 3]] = tensor.matrices[[3, 1]]


def rotate_experts(tensor: Tensor) -> None:
    tensor.matrices[:] = np.roll(tensor.matrices, 1, axis=0)


def duplicate_expert(tensor: Tensor) -> None:
    tensor.matrices[2] = tensor.matrices[4]


def zero_expert(tensor: Tensor) -> None:
    tensor.matrices[2] = 0


def zero_row_of_expert(tensor: Tensor) -> None:
    tensor.matrices[2, 5] = 0


def zero_rows_of_all(tensor: Tensor) -> None:
    tensor.matrices[:, ::16] = 0


def swap_rows_of_expert(tensor: Tensor) -> None:
    tensor.matrices[2, [5, 9]] = tensor.matrices[2, [9, 5]]


def rotate_rows_of_expert(tensor: Tensor) -> None:
    tensor.matrices[2] = np.roll(tensor.matrices[2], 1, axis=0)


def scale_expert(factor: float) -> Change:
    def change(tensor: Tensor) -> None:
        n_experts = tensor.matrices.shape[0]
        n_units = (int(np.prod(tensor.ne)) if tensor.is_float else len(tensor.blocks)) // n_experts
        tensor.scale(factor, slice(2 * n_units, 3 * n_units))

    return change


# changes of any matrix, (rows, bytes)
def swap_rows(tensor: Tensor) -> None:
    tensor.rows[[3, 8]] = tensor.rows[[8, 3]]


def rotate_rows(tensor: Tensor) -> None:
    tensor.rows[:] = np.roll(tensor.rows, 1, axis=0)


def zero_row(tensor: Tensor) -> None:
    tensor.rows[3] = 0


def zero_last_row(tensor: Tensor) -> None:
    tensor.rows[-1] = 0


def duplicate_row(tensor: Tensor) -> None:
    tensor.rows[3] = tensor.rows[8]


def zero_sector(tensor: Tensor) -> None:
    tensor.data[512:1024] = 0


def zero_first_bytes(tensor: Tensor) -> None:
    tensor.data[:64] = 0


def zero(tensor: Tensor) -> None:
    tensor.data[:] = 0


def flip_bit(bit: int) -> Change:
    """One bit of a byte in the middle."""

    def change(tensor: Tensor) -> None:
        tensor.data[tensor.data.size // 2 // 2 * 2 + 1] ^= 1 << bit

    return change


def last_bit(tensor: Tensor) -> None:
    tensor.data[tensor.data.size // 4 * 2] ^= 1


def scale(factor: float) -> Change:
    return lambda tensor: tensor.scale(factor)


def scale_block(factor: float) -> Change:
    return lambda tensor: tensor.scale(factor, slice(7, 8))


def swap_columns(tensor: Tensor) -> None:
    """Exchange the two halves of each row."""
    if tensor.ne[0] % 512 and not tensor.is_float and tensor.ne[0] % 64:
        raise Absent("one block per row")
    halves = tensor.rows.reshape(len(tensor.rows), 2, -1)
    if tensor.row_bytes % 2 or (not tensor.is_float and len(tensor.blocks) == len(tensor.rows)):
        raise Absent("one block per row")
    halves[:] = halves[:, ::-1].copy()


def swap_blocks(tensor: Tensor) -> None:
    """Exchange two blocks of one row, or of two neighbouring rows."""
    tensor.blocks[[3, 4]] = tensor.blocks[[4, 3]]


def transpose(tensor: Tensor) -> None:
    values = tensor.values()
    swapped = np.swapaxes(values, -1, -2)
    tensor.put(np.ascontiguousarray(swapped).reshape(values.shape))


def coarse(tensor: Tensor) -> None:
    """Keep three bits of each mantissa, as a value that went through 8-bit floats."""
    tensor.data.view(np.uint16)[:] &= 0xFFF0


def nan(tensor: Tensor) -> None:
    values = tensor.values()
    values.reshape(-1)[17] = np.nan
    tensor.put(values)


def infinite_scale(tensor: Tensor) -> None:
    tensor.scale(np.inf, slice(7, 8))


def only(name: str, change: Change) -> Change:
    def checked(tensor: Tensor) -> None:
        if tensor.type.name != name:
            raise Absent(f"not {name}")
        change(tensor)

    return checked


def truncate_quants(tensor: Tensor) -> None:
    """Round toward zero instead of to the nearest."""
    quants = tensor.blocks[:, 2:].view(np.int8)
    quants[:] = quants - np.sign(quants) * (np.abs(quants) > 60)


def change_quant(tensor: Tensor) -> None:
    quants = tensor.blocks[5, 2:].view(np.int8)
    quants[3] = -quants[3] - 1


def reverse_rows(tensor: Tensor) -> None:
    tensor.rows[:] = tensor.rows[::-1].copy()


def heads_exchanged(tensor: Tensor) -> None:
    """The two halves of all rows exchange their places."""
    halves = tensor.rows.reshape(2, -1, tensor.row_bytes)
    halves[:] = halves[::-1].copy()


def interleave_rows(tensor: Tensor) -> None:
    """Rows as RoPE of the other kind wants them: the halves of each head, pair by pair."""
    halves = tensor.rows.reshape(2, -1, tensor.row_bytes)
    tensor.rows[:] = halves.transpose(1, 0, 2).reshape(tensor.rows.shape).copy()


def vector(change: Callable[[np.ndarray], np.ndarray]) -> Change:
    return lambda tensor: tensor.put(change(tensor.values()).astype(np.float32))


def one_value(values: np.ndarray) -> np.ndarray:
    values.reshape(-1)[7] = np.nextafter(values.reshape(-1)[7], np.float32(np.inf))
    return values


# lists of tensors
def remove(stem: str, nth: int = 0) -> Edit:
    return lambda gguf: gguf.tensors.pop(find(gguf, stem, nth)) and None


def rename(stem: str, new: str) -> Edit:
    def edit(gguf: GgufEdit) -> None:
        old = find(gguf, stem)
        gguf.tensors = {n.replace(stem, new) if n == old else n: t for n, t in gguf.tensors.items()}

    return edit


def add_vector(name: str) -> Edit:
    def edit(gguf: GgufEdit) -> None:
        width = gguf.tensors["output_norm.weight"].ne[0]
        gguf.tensors[name] = Tensor(
            GGMLQuantizationType.F32, [width], np.zeros(4 * width, np.uint8)
        )

    return edit


def add_output(gguf: GgufEdit) -> None:
    """An output matrix for a model whose embeddings are tied."""
    if "output.weight" in gguf.tensors:
        raise Absent("not tied")
    embedding = gguf.tensors["token_embd.weight"]
    gguf.tensors["output.weight"] = Tensor(
        embedding.type, list(embedding.ne), np.roll(embedding.rows, 1, axis=0).reshape(-1)
    )


def reshape(tensor: Tensor) -> None:
    """The sizes of an expert exchanged: for square ones the first two axes become one."""
    tensor.ne[:] = [tensor.ne[0], tensor.ne[1] * tensor.ne[2]]


def turn(tensor: Tensor) -> None:
    tensor.ne[:] = [tensor.ne[0] * 2, tensor.ne[1] // 2, *tensor.ne[2:]]


def cast(name: str) -> Change:
    """Store the same values as another float type."""

    def change(tensor: Tensor) -> None:
        values = tensor.values()
        tensor.type = GGMLQuantizationType[name]
        tensor.put(values)

    return change


def reorder(gguf: GgufEdit) -> None:
    gguf.tensors = dict(reversed(gguf.tensors.items()))


def trailing(gguf: GgufEdit) -> None:
    gguf.tail = b"\0" * 4096


def align(gguf: GgufEdit) -> None:
    gguf.keys["general.alignment"] = Key(GGUFValueType.UINT32, 64)
    gguf.alignment = 64


def gate_up_of_one(gguf: GgufEdit) -> None:
    gate = gguf.tensors[find(gguf, "ffn_gate_exps")]
    up = gguf.tensors[find(gguf, "ffn_up_exps")]
    kept = gate.matrices[1].copy()
    gate.matrices[1] = up.matrices[1]
    up.matrices[1] = kept


def whole_experts_swapped(gguf: GgufEdit) -> None:
    for part in ("gate", "up", "down"):
        swap_experts(gguf.tensors[find(gguf, f"ffn_{part}_exps")])


def experts_and_router_rotated(gguf: GgufEdit) -> None:
    """The same function, but `kept_experts` no longer names the experts."""
    for stem in ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"):
        rotate_experts(gguf.tensors[find(gguf, stem)])
    rotate_rows(gguf.tensors[find(gguf, "ffn_gate_inp")])


def thirds_exchanged(tensor: Tensor) -> None:
    """Queries and keys of a DeltaNet layer exchanged: the first two quarters of the rows."""
    quarter = len(tensor.rows) // 4
    rows = tensor.rows.copy()
    tensor.rows[:quarter], tensor.rows[quarter : 2 * quarter] = (
        rows[quarter : 2 * quarter],
        rows[:quarter],
    )


def swap_experts_rows(tensor: Tensor) -> None:
    """Two rows of a router."""
    tensor.rows[[1, 3]] = tensor.rows[[3, 1]]
