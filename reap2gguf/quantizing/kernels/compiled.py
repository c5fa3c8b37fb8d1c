"""The compiled quantizers, through ctypes: chosen by the processor, used without a lock.

One call works in one thread, without the interpreter's lock, so that threads quantize side by side.
Memory: what a call returns.
"""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from reap2gguf.machine import processor_flags
from reap2gguf.quantizing.kernels.codebooks import Tables, entries_shape
from reap2gguf.quantizing.kernels.compiling import TARGETS, machine, object_file, source_hash

if TYPE_CHECKING:
    from reap2gguf.ggml import Bytes, Floats
    from reap2gguf.quantizing.stored_rows import StoredRows

_AS_F32, _AS_BF16 = 0, 1  # as in cpu.cpp
VARIABLE = "REAP2GGUF_KERNELS"  # "off": libggml does everything
_REINSTALL = "install reap2gguf again from its checkout, or from a wheel"
# What Linux calls the instructions of x86-64's levels, see the psABI.
_NEEDED = {
    "x86-64-v3": {"avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe"},
    "x86-64-v4": {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl", "avx2", "bmi2", "fma"},
    "armv8-a": set[str](),
}


@dataclass(frozen=True)
class Kernels:
    """A loaded object."""

    target: str  # the instructions it is compiled for
    path: Path
    _library: ctypes.CDLL

    def covers(self, tensor_type: GGMLQuantizationType) -> bool:
        """Whether it quantizes to this type."""
        return bool(self._library.reap_quantize(tensor_type.value, 0, None, 0, 0, *[None] * 4))

    def quantize(
        self,
        rows: Floats | StoredRows,
        tensor_type: GGMLQuantizationType,
        importance: Floats | None,
        tables: Tables | None = None,
    ) -> tuple[Bytes, npt.NDArray[np.bool_]]:
        """Rows (R, C) as `tensor_type`: (R, bytes of a row), and which (R,) are odd.

        Rows that are stored as BF16 are read as they are. The bytes are ggml's, but for odd rows,
        which left the range in which that is certain: their bytes mean nothing. `importance` is
        (C,), `tables` what the type's codebook needs. Raises ValueError for a type of a codebook
        without tables.
        """
        if tables is None and entries_shape(tensor_type) is not None:
            raise ValueError(f"{tensor_type.name} needs the tables of its codebook, found none")
        n_rows, n_columns = rows.shape
        block, size = GGML_QUANT_SIZES[tensor_type]
        stored_as, source = _as_read(rows)
        weights = None if importance is None else np.ascontiguousarray(importance, np.float32)
        target = np.empty((n_rows, n_columns // block * size), dtype=np.uint8)
        is_odd = np.zeros(n_rows, dtype=np.bool_)
        done = self._library.reap_quantize(
            *(tensor_type.value, stored_as),
            *(source.ctypes.data, n_rows, n_columns),
            *(None if weights is None else weights.ctypes.data, tables),
            *(target.ctypes.data, is_odd.ctypes.data),
        )
        assert done, f"{self.path}: does not cover {tensor_type.name}"
        return target, is_odd

    def reads(self, tensor_type: GGMLQuantizationType) -> bool:
        """Whether it makes float32 of this type's blocks."""
        return bool(self._library.reap_dequantize(tensor_type.value, None, 0, None, None))

    def dequantize(
        self, raw: Bytes, tensor_type: GGMLQuantizationType, codebook: Bytes | None = None
    ) -> Floats:
        """The float32 values (R, C) of rows (R, bytes of a row) stored as `tensor_type`.

        They are ggml's, bit for bit. `codebook` is (entries, 8) for an IQ2 type and (entries, 4)
        for an IQ3 type: the sizes of the values that an entry stands for. Raises ValueError for
        such a type without one, and for a type that is not covered.
        """
        name = tensor_type.name
        block, size = GGML_QUANT_SIZES[tensor_type]
        shape = entries_shape(tensor_type)
        if shape is not None and (codebook is None or codebook.shape != shape):
            found = "none" if codebook is None else str(codebook.shape)
            raise ValueError(f"{name} needs a codebook of {shape}, found {found}")
        source = np.ascontiguousarray(raw)
        entries = None if codebook is None else np.ascontiguousarray(codebook, np.uint8)
        values = np.empty((raw.shape[0], raw.shape[1] // size * block), dtype=np.float32)
        done = self._library.reap_dequantize(
            tensor_type.value,
            *(source.ctypes.data, values.size // block),
            *(None if entries is None else entries.ctypes.data, values.ctypes.data),
        )
        if not done:
            raise ValueError(f"{name} is not read by the compiled kernels")
        return values


def _as_read(rows: Floats | StoredRows) -> tuple[int, npt.NDArray[np.generic]]:
    """What the object calls the type of rows, and rows that it can read: BF16 or float32."""
    if not isinstance(rows, np.ndarray) and rows.dtype == "BF16":
        return _AS_BF16, np.ascontiguousarray(rows.raw)
    return _AS_F32, np.ascontiguousarray(rows[:], dtype=np.float32)


def load_kernels() -> Kernels | None:
    """The best object for this processor; None if none can be used."""
    found = find_kernels()
    return None if isinstance(found, str) else found


def find_kernels() -> Kernels | str:
    """The best object for this processor, or why there is none, in words for a user."""
    if os.environ.get(VARIABLE, "").lower() == "off":
        return f"{VARIABLE} is off"
    return _find()


@cache
def _find() -> Kernels | str:
    targets = TARGETS.get(machine(), ())
    flags = processor_flags()
    runnable = [target for target in targets if _NEEDED[target] <= flags]
    if not runnable:
        what = "this processor has no AVX2" if targets else f"there are none for {machine()}"
        return f"{what}, so none are used"
    problem = f"not compiled; with a C++ compiler here, {_REINSTALL}"
    for target in runnable:
        path = object_file(target)
        if not path.is_file():
            continue
        try:
            library = ctypes.CDLL(str(path))
            _declare(library)
        except (OSError, AttributeError) as error:
            problem = f"{path} does not load ({error}); {_REINSTALL}"
            continue
        if library.reap_source().decode() == source_hash():
            return Kernels(target, path, library)
        problem = f"{path} was compiled from another source; {_REINSTALL}"
    return problem


def _declare(library: ctypes.CDLL) -> None:
    """Give the functions their C signatures. Raises AttributeError for a library without them."""
    library.reap_source.restype = ctypes.c_char_p
    library.reap_source.argtypes = ()
    library.reap_quantize.restype = ctypes.c_int
    rows, others = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64), (ctypes.c_void_p,) * 4
    library.reap_quantize.argtypes = (ctypes.c_int, ctypes.c_int, *rows, *others)
    library.reap_dequantize.restype = ctypes.c_int
    pointers = (ctypes.c_void_p,) * 2
    library.reap_dequantize.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_int64, *pointers)
