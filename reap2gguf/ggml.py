"""libggml through ctypes: quantizing and dequantizing rows. The only file that knows C.

Any libggml works: the prebuilt one of `libggml-python`, the one inside `llama-cpp-python`, or that
of a llama.cpp that LLAMA_CPP_DIR or `--llama-cpp` names.
ctypes releases the interpreter's lock during a call, so threads quantize side by side.

A program that also uses llama_cpp must import that first: both contain a library of the same name,
and llama_cpp needs its own.
"""

from __future__ import annotations

import ctypes
import importlib.util
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from reap2gguf.errors import DependencyError
from reap2gguf.gguf_files.tensor_types import IkType, block_of
from reap2gguf.quantizing.ik.workers import ik_workers
from reap2gguf.vendor import LIBRARIES, VARIABLE, requested_folder, requested_libggml

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

# Python packages that contain a libggml, best first, and its folder in them.
_CARRIERS = (("libggml", "lib64"), ("libggml", "lib"), ("llama_cpp", "lib"))
# Types that a weight can be stored in; asking libggml for another one ends the process.
STORABLE = frozenset(
    GGMLQuantizationType[name]
    for name in (
        "F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_K", "Q5_1", "Q5_0", "Q4_K", "Q4_1", "Q4_0",
        "Q3_K", "Q2_K", "IQ4_NL", "IQ4_XS", "IQ3_S", "IQ3_XXS", "IQ2_S", "IQ2_XS", "IQ2_XXS",
        "IQ1_M", "IQ1_S", "MXFP4", "NVFP4", "TQ1_0", "TQ2_0",
    )
)  # fmt: skip
_TINY = 2.0**-10  # rows without a larger value are looked at for what they lose
_TINY_OF_NVFP4 = 2.0**-5  # whose scales have steps of 2**-9
_MORE_ERROR = 0.05  # than twice the usual one
# Types that libggml quantizes to garbage, or not at all, without an importance matrix.
NEEDS_IMPORTANCE = frozenset(
    GGMLQuantizationType[name]
    for name in ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS")
)
# no importance matrix changes their bytes
UNWEIGHTED_TYPES = ("F32", "F16", "BF16", "Q8_0", "MXFP4", "NVFP4", "TQ1_0", "TQ2_0")


class _TypeTraits(ctypes.Structure):
    """`struct ggml_type_traits` of ggml.h."""

    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("block", ctypes.c_int64),
        ("block_interleave", ctypes.c_int64),
        ("size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.c_void_p),
        ("from_float_ref", ctypes.c_void_p),
    )


_ToFloat = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)


@dataclass(frozen=True)
class Ggml:
    """A loaded libggml."""

    path: Path
    version: str
    _library: ctypes.CDLL
    is_own: bool = False  # of a llama.cpp that the user asked for, not of a wheel

    @property
    def label(self) -> str:
        """The version as a manifest records it."""
        return f"{self.version} of a llama.cpp build" if self.is_own else self.version

    def quantize(
        self, rows: Floats, tensor_type: GGMLQuantizationType, importance: Floats | None = None
    ) -> Bytes:
        """Rows (R, C) of float32 as `tensor_type`: (R, bytes of a row).

        `importance` is (C,): the mean square of what multiplies each column. Raises ValueError if
        the shapes do not fit, the type is not STORABLE or needs importance and has none, or a value
        is beyond the type's range.
        """
        self.check_request(rows.shape, tensor_type, importance)
        target = self._quantize(rows, tensor_type, importance)
        if isinstance(tensor_type, IkType):
            return target  # its own library has validated it
        if not self._library.ggml_validate_row_data(
            tensor_type.value, target.ctypes.data, target.nbytes
        ):
            raise ValueError(
                f"values up to {np.abs(rows).max():g} are beyond {tensor_type.name}'s range"
            )
        return target

    def is_finite(self, raw: Bytes, tensor_type: GGMLQuantizationType) -> bool:
        """Whether whole blocks hold no NaN and no infinite value, by libggml's own check."""
        whole = np.ascontiguousarray(raw)
        return bool(
            self._library.ggml_validate_row_data(tensor_type.value, whole.ctypes.data, whole.nbytes)
        )

    def check_request(
        self,
        shape: tuple[int, ...],
        tensor_type: GGMLQuantizationType,
        importance: Floats | None,
    ) -> None:
        """Raises ValueError if rows of this shape (R, C) cannot be quantized to a type."""
        n_columns = shape[1]
        if not holds_weights(tensor_type):
            raise ValueError(f"{tensor_type.name} cannot hold weights")
        block = block_of(tensor_type)[0]
        if n_columns % block:
            raise ValueError(
                f"rows of {n_columns} are not a multiple of {tensor_type.name}'s block {block}"
            )
        if importance is not None and importance.shape != (n_columns,):
            raise ValueError(f"importance {importance.shape} for {n_columns} columns")
        if importance is None and tensor_type in NEEDS_IMPORTANCE:
            raise ValueError(f"{tensor_type.name} needs an importance matrix")

    def check_precision(
        self,
        rows: Floats,
        target: Bytes,
        tensor_type: GGMLQuantizationType,
        importance: Floats | None = None,
    ) -> None:
        """Raise ValueError if rows are so small that the type loses them; `target` is their bytes.

        Most types scale their blocks by numbers in F16, the smallest of which is 6e-8. So the error
        is compared with that of the same values times a power of two, which is exact.
        """
        largest = float(np.abs(rows).max()) if rows.size else 0.0
        if not is_tiny(largest, tensor_type):
            return
        scaled = np.ldexp(rows.astype(np.float64), -math.frexp(largest)[1]).astype(np.float32)
        usual = self._error(scaled, self._quantize(scaled, tensor_type, importance), tensor_type)
        found = self._error(rows, target, tensor_type)
        if found > 2 * usual + _MORE_ERROR:
            raise ValueError(
                f"values up to {largest:g} are too small for {tensor_type.name}, which would lose "
                f"{found:.0%} of them; give this tensor the type BF16 or F32 in the recipe"
            )

    def _error(self, rows: Floats, raw: Bytes, tensor_type: GGMLQuantizationType) -> float:
        """The relative distance of quantized rows from what they stand for."""
        wanted = rows.astype(np.float64)
        distance = np.linalg.norm(self.dequantize(raw, tensor_type) - wanted)
        return float(distance / np.linalg.norm(wanted))

    def _quantize(
        self, rows: Floats, tensor_type: GGMLQuantizationType, importance: Floats | None
    ) -> Bytes:
        if isinstance(tensor_type, IkType):
            return ik_workers().quantize(rows, tensor_type, importance)
        n_rows, n_columns = rows.shape
        block, size = GGML_QUANT_SIZES[tensor_type]
        source = np.ascontiguousarray(rows, dtype=np.float32)
        weights = None if importance is None else np.ascontiguousarray(importance, np.float32)
        target = np.empty((n_rows, n_columns // block * size), dtype=np.uint8)
        written = self._library.ggml_quantize_chunk(
            tensor_type.value, source.ctypes.data, target.ctypes.data, 0, n_rows, n_columns,
            None if weights is None else weights.ctypes.data,
        )  # fmt: skip
        if written != target.nbytes:
            raise DependencyError(
                f"{self.path}: wrote {written} bytes of {tensor_type.name}, expected "
                f"{target.nbytes}; "
                "this libggml has another format"
            )
        return target

    def dequantize(self, raw: Bytes, tensor_type: GGMLQuantizationType) -> Floats:
        """The float32 values (R, C) of rows (R, bytes of a row) stored as `tensor_type`."""
        raw = np.ascontiguousarray(raw)
        if isinstance(tensor_type, IkType):
            return ik_workers().dequantize(raw, tensor_type)
        if tensor_type is GGMLQuantizationType.F32:
            return raw.view(np.float32)
        if tensor_type is GGMLQuantizationType.F16:
            return raw.view(np.float16).astype(np.float32)
        if tensor_type is GGMLQuantizationType.BF16:
            return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
        block, size = GGML_QUANT_SIZES[tensor_type]
        values = np.empty((raw.shape[0], raw.shape[1] // size * block), dtype=np.float32)
        to_float = _ToFloat(self._traits(tensor_type).to_float)
        to_float(raw.ctypes.data, values.ctypes.data, values.size)
        return values

    def _traits(self, tensor_type: GGMLQuantizationType) -> _TypeTraits:
        traits: _TypeTraits = self._library.ggml_get_type_traits(tensor_type.value).contents
        if (traits.block, traits.size) != GGML_QUANT_SIZES[tensor_type] or not traits.to_float:
            raise DependencyError(
                f"{self.path}: describes {tensor_type.name} as blocks of {traits.block} in "
                f"{traits.size} bytes, expected {GGML_QUANT_SIZES[tensor_type]}; "
                "install libggml-python>=0.20.2"
            )
        return traits


def holds_weights(tensor_type: GGMLQuantizationType) -> bool:
    """Whether a weight can be stored in a type, by llama.cpp or by ik_llama.cpp alone."""
    return tensor_type in STORABLE or isinstance(tensor_type, IkType)


def is_tiny(largest: float, tensor_type: GGMLQuantizationType) -> bool:
    """Whether a type may lose rows that have no larger value: `check_precision` tells."""
    is_coarse = tensor_type is GGMLQuantizationType.NVFP4
    return 0 < largest < (_TINY_OF_NVFP4 if is_coarse else _TINY)


def load_ggml() -> Ggml:
    """Find and load a libggml: the one asked for, else a prebuilt one.

    Raises DependencyError that says what to install if there is none, or what is wrong with the
    one asked for; another does not take its place.
    """
    return _load(requested_folder())


@cache
def _load(asked: Path | None) -> Ggml:
    if asked is not None:
        return _load_asked(requested_libggml(asked))
    tried: list[str] = []
    for path in _candidates():
        try:
            library = ctypes.CDLL(str(path))
            return Ggml(path, _declare(library), library)
        except (OSError, AttributeError) as error:
            tried.append(f"{path} ({error})")
    detail = f"; tried {'; '.join(tried)}" if tried else ""
    raise DependencyError(
        "libggml, which quantizes and dequantizes, was not found; run `pip install "
        f"libggml-python`{detail}"
    )


def _load_asked(path: Path) -> Ggml:
    try:
        library = ctypes.CDLL(str(path))
        return Ggml(path, _declare(library), library, is_own=True)
    except (OSError, AttributeError) as error:
        raise DependencyError(
            f"{path}: is not a usable libggml ({error}); build a newer llama.cpp, or use the "
            f"wheel's libggml: leave out --llama-cpp and {VARIABLE}"
        ) from error


def _candidates() -> Iterator[Path]:
    for package, folder in _CARRIERS:
        spec = importlib.util.find_spec(package)
        for root in (spec.submodule_search_locations or []) if spec else []:
            for name in LIBRARIES:
                if (path := Path(root) / folder / name).is_file():
                    yield path


def _declare(library: ctypes.CDLL) -> str:
    """Give the functions their C signatures; the library's version."""
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = (
        ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p,
        ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p,
    )  # fmt: skip
    library.ggml_validate_row_data.restype = ctypes.c_bool
    library.ggml_validate_row_data.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t)
    library.ggml_get_type_traits.restype = ctypes.POINTER(_TypeTraits)
    library.ggml_get_type_traits.argtypes = (ctypes.c_int,)
    library.ggml_version.restype = ctypes.c_char_p
    version: bytes = library.ggml_version()
    return version.decode()
