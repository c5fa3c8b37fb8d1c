"""llama.cpp's own quantizer as the peer of `export.py`; its process must not load our libggml."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

import llama_cpp
import numpy as np

from reap2gguf.gguf_files.imatrix import Imatrix
from reap2gguf.quantizing.recipe import Recipe


@llama_cpp.llama_log_callback
def _silent(level: int, text: bytes, data: object) -> None:
    """Thousands of lines are no part of what is timed."""


def quantize(source: Path, target: Path, recipe: Recipe, imatrix: Imatrix, n_threads: int) -> None:
    """Write `target` from a BF16 GGUF as `recipe` says; RuntimeError if llama.cpp refuses."""
    llama_cpp.llama_log_set(_silent, ctypes.c_void_p(0))
    params = llama_cpp.llama_model_quantize_default_params()
    params.nthread = n_threads
    params.ftype = recipe.mixture.file_type
    # the parameters hold bare pointers: values, data and overrides must outlive the call
    values = {
        name: np.ascontiguousarray(entry.importance()) for name, entry in imatrix.entries.items()
    }
    data = _ended(
        llama_cpp.llama_model_imatrix_data,
        [
            (name.encode(), found.ctypes.data_as(ctypes.POINTER(ctypes.c_float)), found.size)
            for name, found in values.items()
        ],
    )
    overrides = _ended(
        llama_cpp.llama_model_tensor_override,
        [(_regex(rule.match).encode(), rule.tensor_type) for rule in recipe.rules],
    )
    params.imatrix = data
    params.tt_overrides = overrides
    if llama_cpp.llama_model_quantize(bytes(source), bytes(target), params):
        raise RuntimeError(f"llama.cpp did not quantize {source} as {recipe.name}")


def _ended(kind: type[ctypes.Structure], rows: list[tuple]) -> ctypes.Array:
    """A C array of `kind` that ends with an empty element."""
    return (kind * (len(rows) + 1))(*(kind(*row) for row in rows))


def _regex(glob: str) -> str:
    return "^" + ".*".join(re.escape(piece) for piece in glob.split("*")) + "$"
