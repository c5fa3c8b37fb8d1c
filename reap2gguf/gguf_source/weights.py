"""The weights in a GGUF file, under the names and in the shapes of a checkpoint.

Blocks are read and dequantized when they are asked for, and what llama.cpp's converter did to a
tensor is undone: heads go back to their places, one is subtracted from norms. So a GGUF file can be
computed like the checkpoint that it was made from, with the weights that llama.cpp computes with.
llama.cpp also rounds what it multiplies them with, to 8 bits or so; that is not done here.

The names come from a template: a checkpoint of the same model, or a view of one.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from reap2gguf.checkpoint.safetensors_header import StoredTensor
from reap2gguf.checkpoint.weights import Weights
from reap2gguf.errors import ArtifactError
from reap2gguf.ggml import holds_weights
from reap2gguf.messages import shown
from reap2gguf.models.gguf_keys import block_of
from reap2gguf.quantizing.quantizer import load_quantizer

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType

    from reap2gguf.gguf_files.blocks import Blocks
    from reap2gguf.models.contract import MoeModel
    from reap2gguf.models.description import Floats, GgufTensor, Slab

_ITEM = 4  # bytes of a float32
Types = dict[str, "GGMLQuantizationType"]  # by GGUF tensor
_MOST_WHOLE = 2  # tensors that are held because no part can be read alone


@dataclass(frozen=True, slots=True)
class _Piece:
    """One matrix of a GGUF tensor, which fills a stored matrix or some of its rows."""

    tensor: GgufTensor
    matrix: int
    slab: Slab

    @property
    def n_rows(self) -> int:
        """Rows of the matrix in the GGUF file."""
        return prod(self.tensor.shape[:-1]) // len(self.tensor.slabs)

    @property
    def needs_all(self) -> bool:
        """Whether any part of the stored matrix needs all of the GGUF's."""
        is_vector = len(self.tensor.shape) == 1
        return self.tensor.transform is not None or self.slab.transposed or is_vector


class _Whole:
    """Matrices of which no part can be read alone, each held until all its bytes were taken.

    Threads that take parts of one matrix wait for one another, so that it is read once. If parts
    of many are taken and others are not, the last two are held.
    """

    def __init__(self, read: Callable[[str, int], Floats]) -> None:
        self._read = read
        self._lock = threading.Lock()
        self._held: dict[tuple[str, int], tuple[Floats, int]] = {}  # and bytes that were taken

    def part(self, name: str, entry: int, first: int, count: int) -> npt.NDArray[np.uint8]:
        """Bytes [first, first + count) of a matrix."""
        with self._lock:
            values, n_taken = self._held.pop((name, entry), (None, 0))
            if values is None:
                values = self._read(name, entry)
            if n_taken + count < values.nbytes:
                self._held[name, entry] = values, n_taken + count
            if len(self._held) > _MOST_WHOLE:
                del self._held[next(iter(self._held))]
        return values.reshape(-1).view(np.uint8)[first : first + count]


class GgufWeights(Weights):
    """The weights of a GGUF file, of all its parts, as a checkpoint of float32 would have them.

    Threads may share it. Memory: blocks and values of the rows of one matrix that a read asks for;
    and while a tensor is read that is stored in another order than GGUF's, all of it.
    """

    def __init__(
        self, header: Blocks, model: MoeModel, template: Mapping[str, StoredTensor]
    ) -> None:
        """`model` describes a checkpoint with the names and shapes of `template`.

        Raises ArtifactError if the file does not hold exactly the tensors that the model needs, and
        what `MoeModel.of` raises. A block for multi-token prediction may be missing.
        """
        self.folder: Path = header.path
        self.config = dict(model.config)
        self._header = header
        self._quantizer = load_quantizer()
        names = self._found(model, template)
        self.tensors = {
            name: StoredTensor(name, "F32", tensor.shape, blocks=names[name])
            for name, tensor in template.items()
            if name in names
        }
        self.model = type(model).of(self)
        self._pieces = self._find_pieces()
        self._whole = _Whole(self._read_whole)

    def of(self, blocks: Blocks) -> GgufWeights:
        """The weights in other blocks of the same tensors; what is known of them is shared."""
        other = copy.copy(self)
        other._header = blocks
        other._whole = _Whole(other._read_whole)
        return other

    @property
    def blocks(self) -> Blocks:
        return self._header

    def _found(self, model: MoeModel, template: Mapping[str, StoredTensor]) -> dict[str, Types]:
        """The template's tensors that the file has, with the types of the GGUF tensors they are in.

        Raises ArtifactError if it has others.
        """
        found: dict[str, Types] = {}
        infos = self._header.tensors
        expected = model.gguf_tensors(template)
        for tensor in expected:
            where = f"{self._header.path}: tensor {shown(tensor.name)}"
            info = infos.get(tensor.name)
            if info is None:
                if _in_mtp(tensor, model):
                    continue
                raise ArtifactError(f"{where} is missing, which the model needs")
            if prod(info.shape) != prod(tensor.shape) or info.shape[-1] != tensor.n_columns:
                raise ArtifactError(
                    f"{where} has the shape {list(info.shape)}, expected {list(tensor.shape)}; it "
                    "is of another model, or of one with another number of experts"
                )
            if not holds_weights(info.tensor_type):
                raise ArtifactError(
                    f"{where} is {info.tensor_type.name}, which is not a type for weights"
                )
            if tensor.made is None:
                for stored in {slab.stored for slab in tensor.slabs}:
                    found.setdefault(stored, {})[tensor.name] = info.tensor_type
            else:
                self._check_made(tensor)
        if unknown := sorted(infos.keys() - {tensor.name for tensor in expected}):
            raise ArtifactError(
                f"{self._header.path}: holds {shown(unknown[0])}, which the model of this config "
                "does not have; it is of another model"
            )
        return found

    def _check_made(self, tensor: GgufTensor) -> None:
        """Refuse other values than those that follow from the config: transformers has these."""
        info = self._header.tensors[tensor.name]
        raw = self._header.read(info.name, 0, prod(tensor.shape[:-1]))
        found = self._quantizer.dequantize(raw, info.tensor_type).reshape(-1)
        different = np.flatnonzero(found != np.array(tensor.made, np.float32))
        if len(different):
            first = int(different[0])
            raise ArtifactError(
                f"{self._header.path}: tensor {shown(tensor.name)} has {found[first]:g} as value "
                f"{first}, expected {(tensor.made or ())[first]:g} by {tensor.slabs[0].stored}; it "
                "is of another model, or of another converter"
            )

    def _find_pieces(self) -> dict[tuple[str, int], list[_Piece]]:
        """By stored tensor and entry on axis 0 (0 for a matrix), what its values are in."""
        found: dict[tuple[str, int], list[_Piece]] = {}
        for tensor in self.model.gguf_tensors(self.tensors):
            if tensor.made is not None:
                continue
            for matrix, slab in enumerate(tensor.slabs):
                pieces = found.setdefault((slab.stored, slab.index or 0), [])
                pieces.append(_Piece(tensor, matrix, slab))
        return found

    def read_bytes(self, name: str, first: int, buffer: npt.NDArray[np.uint8]) -> None:
        self._check_range(name, first, buffer.nbytes)
        matrix_bytes = _ITEM * prod(self._matrix_shape(name))
        done = 0
        while done < buffer.nbytes:
            entry, inside = divmod(first + done, matrix_bytes)
            count = min(buffer.nbytes - done, matrix_bytes - inside)
            self._fill(name, entry, inside, buffer[done : done + count])
            done += count

    def _matrix_shape(self, name: str) -> tuple[int, ...]:
        """Of one entry, where a stored tensor has one per expert; else of all of it."""
        shape = self.tensors[name].shape
        has_entries = self._pieces[name, 0][0].slab.index is not None
        return shape[1:] if has_entries else shape

    def _fill(self, name: str, entry: int, first: int, target: npt.NDArray[np.uint8]) -> None:
        """Fill `target` with the bytes of one stored matrix from `first` on."""
        pieces, n_columns = self._pieces[name, entry], self._matrix_shape(name)[-1]
        if any(piece.needs_all for piece in pieces):
            target[...] = self._whole.part(name, entry, first, len(target))
            return
        row = _ITEM * n_columns
        begin, end = first // row, -(-(first + len(target)) // row)
        is_whole = (end - begin) * row == len(target)
        raw = target if is_whole else np.empty((end - begin) * row, dtype=np.uint8)
        for piece in pieces:
            self._fill_rows(piece, begin, raw.view(np.float32).reshape(-1, n_columns))
        if not is_whole:
            skipped = first - begin * row
            target[...] = raw[skipped : skipped + len(target)]

    def _fill_rows(self, piece: _Piece, begin: int, rows: Floats) -> None:
        """Fill those of a matrix's rows from `begin` on that are in a piece."""
        step = piece.slab.step
        start, _ = piece.slab.rows or (0, piece.n_rows)
        first = max(0, -(-(begin - start) // step))
        last = min(piece.n_rows, -(-(begin + len(rows) - start) // step))
        if first < last:
            at = start + first * step - begin
            rows[at : at + (last - first - 1) * step + 1 : step] = self._read(piece, first, last)

    def _read_whole(self, name: str, entry: int) -> Floats:
        """A stored matrix of which no part can be read alone."""
        stored = np.empty(self._matrix_shape(name), dtype=np.float32)
        for piece in self._pieces[name, entry]:
            values = self._read(piece, 0, piece.n_rows)
            if piece.tensor.transform is not None:
                piece.tensor.transform.put_back(values.reshape(piece.tensor.shape), stored)
            elif piece.slab.transposed:
                low, high = piece.slab.rows or (0, piece.n_rows)
                columns = slice(*(piece.slab.columns or (None,)))
                stored[columns, low : high : piece.slab.step] = values.T
            elif piece.slab.rows is not None:
                first, last = piece.slab.rows
                stored[first : last : piece.slab.step] = values
            else:
                stored[...] = values.reshape(stored.shape)
        return stored

    def _read(self, piece: _Piece, first: int, last: int) -> Floats:
        """Rows [first, last) of a piece, dequantized: (last - first, columns)."""
        info = self._header.tensors[piece.tensor.name]
        before = piece.matrix * piece.n_rows
        raw = self._header.read(info.name, before + first, before + last)
        return self._quantizer.dequantize(raw, info.tensor_type)

    @property
    def shown(self) -> Path:
        return self._header.path

    def shown_name(self, name: str, entry: int = 0) -> str:
        piece = self._pieces[name, entry][0]
        at = "" if len(piece.tensor.slabs) == 1 else f", matrix {piece.matrix}"
        return f"{piece.tensor.name!r} ({name}{at})"

    def kind(self, name: str) -> str:
        first = self._pieces[name, 0][0]
        kind: str = self._header.tensors[first.tensor.name].tensor_type.name
        return kind

    def have_same_values(self, one: str, other: str) -> bool:
        return one == other  # a file that has an output matrix has it because it is another one

    def expect_bytes(self, name: str, first: int, n_bytes: int) -> None:
        self._check_range(name, first, n_bytes)  # a block is small: reading it takes no time

    def fetch_ahead(self, names: Iterable[str]) -> None:
        """Nothing has to be downloaded."""

    def without_fetching(self) -> AbstractContextManager[None]:
        return nullcontext()


def _in_mtp(tensor: GgufTensor, model: MoeModel) -> bool:
    """Whether a tensor is of the multi-token-prediction block."""
    return model.facts.has_mtp and block_of(tensor.name) == model.facts.mtp_layer
