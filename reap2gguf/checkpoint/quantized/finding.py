"""Which stored tensors are one quantized weight, each checked against the others and the config."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from reap2gguf.checkpoint.quantized.coded import CodedWeight, Grid
from reap2gguf.checkpoint.quantized.float8 import STORED_AS, Float8Weight
from reap2gguf.checkpoint.quantized.mxfp4 import BLOCK, BLOCK_BYTES, Mxfp4Weight
from reap2gguf.checkpoint.quantized.packed import WORD_BYTES, PackedWeight
from reap2gguf.checkpoint.weights import FLOATS
from reap2gguf.errors import CheckpointError, UnsupportedModelError

if TYPE_CHECKING:
    from reap2gguf.checkpoint.quantized.settings import Blocks, Settings
    from reap2gguf.checkpoint.safetensors_header import StoredTensor

_SCALES = ("_scale_inv", "_scale")  # what the name of an FP8 weight's scale adds to the weight's
_OF_INPUTS = ("input_scale", "activation_scale", "input_zero_point")  # not of any weight's values
_PACKED = ("_packed", "_scale", "_shape")
_NOT_DECODED = {
    "_zero_point": "a zero point (asymmetric quantization)",
    "_g_idx": "an order of its columns (act-order)",
    "_global_scale": "a scale of scales (NVFP4)",
    "_scale_2": "a scale of scales (NVFP4)",
}
_AGAIN = "download the checkpoint again, or quantize the model again"


@dataclass(frozen=True)
class Finder:
    """Finds the quantized weights among the stored tensors of a checkpoint."""

    stored: Mapping[str, StoredTensor]
    settings: Settings
    where: str  # the folder

    def find(self) -> Iterator[CodedWeight]:
        """All of them.

        Raises CheckpointError for a part that is missing, or does not fit the others or the config,
        and UnsupportedModelError for a part that is not decoded.
        """
        for name in self.stored:
            if self.settings.method == "mxfp4":
                if name.endswith(("_blocks", "_scales")):
                    yield from self._mxfp4(name)
                continue
            if (blocks := self.settings.packed) and ".weight_" in name:
                yield from self._packed(name, blocks)
            if blocks := self.settings.float8:
                yield from self._float8(name, blocks)

    def _float8(self, name: str, blocks: Blocks) -> Iterator[Float8Weight]:
        tensor = self.stored[name]
        for suffix in _SCALES:
            weight = name.removesuffix(suffix)
            is_scale = suffix == "_scale_inv" or name.endswith(".weight_scale")
            if weight == name or not is_scale or f"{weight}_packed" in self.stored:
                continue
            if weight not in self.stored:
                raise self._missing(weight, name)
            if (found := self.stored[weight].dtype) != STORED_AS:
                raise self._wrong(
                    weight, f"stored as {found}", f"{STORED_AS}, since it has a scale"
                )
        if tensor.dtype != STORED_AS:
            return
        scale = next((name + one for one in _SCALES if name + one in self.stored), None)
        if scale is None:
            raise self._missing(name + _SCALES[self.settings.method != "fp8"], name)
        if len(tensor.shape) not in (2, 3) or not tensor.n_elements:
            raise self._wrong(name, f"of shape {list(tensor.shape)}", "a matrix, or one per expert")
        grid = self._grid(scale, tensor.shape, blocks)
        stem = name.removesuffix("weight") if name.endswith(".weight") else f"{name}_"
        beside = [stem + one for one in _OF_INPUTS if stem + one in self.stored]
        yield Float8Weight(name, tensor.shape, name, (scale, *beside), grid)

    def _grid(self, name: str, shape: tuple[int, ...], blocks: Blocks) -> Grid:
        """The scales of a weight of this shape, whose own shape may leave out axes of size 1."""
        scale, (rows, columns) = self.stored[name], shape[-2:]
        block = blocks.rows or rows, blocks.columns or columns
        size = -(-rows // block[0]), -(-columns // block[1])
        lead, n_matrices = shape[:-2], math.prod(shape[:-2])
        if scale.dtype not in FLOATS:
            raise self._wrong(name, f"stored as {scale.dtype}", " or ".join(FLOATS))
        own = [(*lead, *size)]
        if size[1] == 1:
            own.append((*lead, size[0]))
        if size == (1, 1):
            own.append(lead)
        if scale.shape in own:
            return Grid(name, block, size, per_matrix=n_matrices > 1)
        if size == (1, 1) and scale.n_elements == 1:
            return Grid(name, block, size, per_matrix=False)
        raise self._wrong(
            name,
            f"of shape {list(scale.shape)}",
            f"{list(own[0])}: a scale for each {block[0]} x {block[1]} of {list(shape)}",
        )

    def _packed(self, name: str, blocks: Blocks) -> Iterator[PackedWeight]:
        weight = name[: name.rindex(".weight_") + len(".weight")]
        suffix = name.removeprefix(weight)
        if f"{weight}_packed" not in self.stored and f"{weight}_shape" not in self.stored:
            return  # of an FP8 weight
        if suffix in _NOT_DECODED:
            raise UnsupportedModelError(
                f"{self.where}: tensor {name!r} is {_NOT_DECODED[suffix]}, which is not decoded; "
                "pass the BF16 checkpoint that it was made from"
            )
        parts = [weight + one for one in _PACKED]
        for part in parts:
            if part not in self.stored:
                raise self._missing(part, name)
        if name != parts[0]:
            return
        packed, scale, shape_name = parts
        tensor, bits = self.stored[packed], self.settings.bits
        per_word = 8 * WORD_BYTES // bits
        if tensor.dtype != "I32":
            raise self._wrong(packed, f"stored as {tensor.dtype}", "I32, words of packed numbers")
        if len(tensor.shape) != 2 or not tensor.n_elements:
            raise self._wrong(packed, f"of shape {list(tensor.shape)}", "a matrix of words")
        said = self.stored[shape_name]
        if said.dtype not in ("I64", "I32") or said.shape != (2,):
            found = f"{said.dtype} of shape {list(said.shape)}"
            raise self._wrong(shape_name, found, "two whole numbers, I64 or I32")
        rows, words = tensor.shape
        columns = words * per_word
        if (group := blocks.columns) and len(self.stored[scale].shape) == 2:
            columns = self.stored[scale].shape[1] * group
        grid = self._grid(scale, (rows, columns), blocks)
        if -(-columns // per_word) != words:
            expected = (
                f"{-(-columns // per_word)} words per row, for {columns} numbers of {bits} bits"
            )
            raise self._wrong(packed, f"of shape {list(tensor.shape)}", expected)
        others = (scale, shape_name)
        yield PackedWeight(weight, (rows, columns), packed, others, grid, bits, shape_name)

    def _mxfp4(self, name: str) -> Iterator[Mxfp4Weight]:
        weight = name.removesuffix("_blocks").removesuffix("_scales")
        blocks, scales = f"{weight}_blocks", f"{weight}_scales"
        for part in (blocks, scales):
            if part not in self.stored:
                raise self._missing(part, name)
            if self.stored[part].dtype != "U8":
                raise self._wrong(part, f"stored as {self.stored[part].dtype}", "U8")
        if name != blocks:
            return
        shape, of_scales = self.stored[blocks].shape, self.stored[scales].shape
        if len(shape) != 4 or shape[-1] != BLOCK_BYTES or not math.prod(shape):
            raise self._wrong(
                blocks, f"of shape {list(shape)}", f"(experts, rows, blocks, {BLOCK_BYTES})"
            )
        if of_scales != shape[:-1]:
            raise self._wrong(scales, f"of shape {list(of_scales)}", f"{list(shape[:-1])}")
        n_experts, rows, n_blocks, _ = shape
        decoded = (n_experts, n_blocks * BLOCK, rows)
        yield Mxfp4Weight(weight, decoded, blocks, (scales,), scales)

    def _missing(self, name: str, of: str) -> CheckpointError:
        return CheckpointError(
            f"{self.where}: tensor {name!r} is missing, without which {of!r} cannot be decoded; "
            f"{_AGAIN}"
        )

    def _wrong(self, name: str, found: str, expected: str) -> CheckpointError:
        return CheckpointError(
            f"{self.where}: tensor {name!r} is {found}, expected {expected}; {_AGAIN}"
        )
