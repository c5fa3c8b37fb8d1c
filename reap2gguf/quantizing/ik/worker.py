"""The program of a worker: quantizes and dequantizes rows with the libggml of ik_llama.cpp.

Started with the path of that library as its argument, by `workers.py`, and by path, so that
nothing else of this package is loaded. It reads requests from its input and answers on its output
until the input ends. A request is HEAD and the bytes of the rows, then the importance if there is
one; an answer is ANSWER and as many bytes as that says: rows, or an error message in UTF-8.

Memory: one request and its answer.
"""

from __future__ import annotations

import ctypes
import os
import struct
import sys
from typing import BinaryIO

# job, type, rows, columns, bytes of a row as it is stored, whether importance (columns,) follows
HEAD = struct.Struct("<BiqqqB")
ANSWER = struct.Struct("<BQ")  # kind, bytes
QUANTIZE, DEQUANTIZE, DESCRIBE = range(3)
DONE, REFUSED = range(2)


class _Traits(ctypes.Structure):
    """The beginning of `ggml_type_traits_t` and what follows `to_float`, by size alone."""

    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("block", ctypes.c_int64),
        ("block_interleave", ctypes.c_int64),
        ("size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.c_void_p),
        ("others", ctypes.c_void_p * 4),
        ("dot_type", ctypes.c_int),
        ("rows", ctypes.c_int64 * 2),
        ("more", ctypes.c_void_p * 2),
        ("row_meta_size", ctypes.c_int64),
    )


class _InitParams(ctypes.Structure):
    """`struct ggml_init_params`."""

    _fields_ = (
        ("mem_size", ctypes.c_size_t),
        ("mem_buffer", ctypes.c_void_p),
        ("no_alloc", ctypes.c_bool),
    )


_ToFloat = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)


def main() -> None:
    """Answer requests until the input ends."""
    target = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # the library prints, which is no answer
    library, source = _load(sys.argv[1]), sys.stdin.buffer
    while head := source.read(HEAD.size):
        kind, answer = _answer(library, head, source)
        target.write(ANSWER.pack(kind, len(answer)))
        target.write(answer)
        target.flush()


def _load(path: str) -> ctypes.CDLL:
    library = ctypes.CDLL(path)
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = (
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_void_p,
    )
    library.ggml_internal_get_type_traits.restype = _Traits
    library.ggml_internal_get_type_traits.argtypes = (ctypes.c_int,)
    library.ggml_row_size.restype = ctypes.c_size_t
    library.ggml_row_size.argtypes = (ctypes.c_int, ctypes.c_int64)
    library.ggml_init.restype = ctypes.c_void_p
    library.ggml_init.argtypes = (_InitParams,)
    library.ggml_init(_InitParams(2**16, None, True))  # fills the table of F16 values
    return library


def _answer(library: ctypes.CDLL, head: bytes, source: BinaryIO) -> tuple[int, bytes | bytearray]:
    job, kind, n_rows, n_columns, row_bytes, has_importance = HEAD.unpack(head)
    if job == DESCRIBE:
        traits = library.ggml_internal_get_type_traits(kind)
        said = (traits.block, traits.size, library.ggml_row_size(kind, n_columns))
        return DONE, struct.pack("<qqq", *said)
    if (found := library.ggml_row_size(kind, n_columns)) != row_bytes:
        return REFUSED, f"has rows of {found} bytes for {n_columns} values".encode()
    if job == DEQUANTIZE:
        return DONE, _dequantized(library, kind, n_rows, n_columns, row_bytes, source)
    rows = source.read(4 * n_rows * n_columns)
    importance = source.read(4 * n_columns) if has_importance else None
    target = bytearray(n_rows * row_bytes)
    into = (ctypes.c_char * len(target)).from_buffer(target)
    written = library.ggml_quantize_chunk(kind, rows, into, 0, n_rows, n_columns, importance)
    if written != len(target):
        return REFUSED, f"wrote {written} bytes instead of {len(target)}".encode()
    return DONE, target


def _dequantized(
    library: ctypes.CDLL, kind: int, n_rows: int, n_columns: int, row_bytes: int, source: BinaryIO
) -> bytearray:
    raw = source.read(n_rows * row_bytes)
    values = bytearray(4 * n_rows * n_columns)
    to_float = _ToFloat(library.ggml_internal_get_type_traits(kind).to_float)
    into = (ctypes.c_char * len(values)).from_buffer(values)
    start = ctypes.cast(ctypes.c_char_p(raw), ctypes.c_void_p).value or 0
    for row in range(n_rows):  # each begins with a scale of its own, in some types
        place = ctypes.addressof(into) + 4 * row * n_columns
        to_float(start + row * row_bytes, place, n_columns)
    return values


if __name__ == "__main__":
    main()
