"""What llama-imatrix collects, taken from llama.cpp while it computes.

llama.cpp calls back for every operation of its graph. Of each product with a matrix of a layer, the
squares of its input are summed as tools/imatrix does: apart for each expert, and for each matrix of
a dense tensor of several, which have one count.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt
from llama_cpp._ggml import libggml

FEWEST_TOKENS = 16  # of a batch; llama-imatrix ignores smaller ones
_F32, _I32 = 0, 26  # ggml's numbers of types


class _Tensor(ctypes.Structure):
    """ggml's `struct ggml_tensor`, up to its name."""


_Tensor._fields_ = [
    ("type", ctypes.c_int),
    ("buffer", ctypes.c_void_p),
    ("ne", ctypes.c_int64 * 4),
    ("nb", ctypes.c_size_t * 4),
    ("op", ctypes.c_int),
    ("op_params", ctypes.c_int32 * 16),
    ("flags", ctypes.c_int32),
    ("src", ctypes.POINTER(_Tensor) * 10),
    ("view_src", ctypes.c_void_p),
    ("view_offs", ctypes.c_size_t),
    ("data", ctypes.c_void_p),
    ("name", ctypes.c_char * 64),
]
libggml.ggml_op_name.restype = ctypes.c_char_p


class Collector:
    """Sums of squares by name, (matrices, columns) float64, and counts of input rows."""

    def __init__(self) -> None:
        self.sums: dict[str, npt.NDArray[np.float64]] = {}
        self.counts: dict[str, npt.NDArray[np.int64]] = {}

    def called(self, address: int, ask: bool, _: Any) -> bool:
        """llama.cpp's callback: whether it is interested, then the operation that was computed."""
        tensor = ctypes.cast(address, ctypes.POINTER(_Tensor)).contents
        op = libggml.ggml_op_name(tensor.op).decode()
        if op not in ("MUL_MAT", "MUL_MAT_ID"):
            return not ask
        matrix, given = (tensor.src[i].contents for i in range(2))
        name = matrix.name.decode()
        is_small = op == "MUL_MAT" and given.ne[1] < FEWEST_TOKENS
        if not name.startswith("blk.") or given.type != _F32 or is_small:
            return not ask
        if not ask:
            self._take(op, name, matrix, given, tensor)
        return True

    def _take(self, op: str, name: str, matrix: Any, given: Any, tensor: Any) -> None:
        values = _values(given, np.float32).astype(np.float64)  # (.., rows, columns)
        n_matrices, n_columns = matrix.ne[2], matrix.ne[0]
        sums = self.sums.setdefault(name, np.zeros((n_matrices, n_columns)))
        if op == "MUL_MAT_ID":
            ids = _values(tensor.src[2].contents, np.int32)[0, 0]  # (tokens, K)
            counts = self.counts.setdefault(name, np.zeros(n_matrices, np.int64))
            for place in range(ids.shape[1]):
                inputs = values[0][:, place % values.shape[2]]
                np.add.at(sums, ids[:, place], inputs**2)
                np.add.at(counts, ids[:, place], 1)
            return
        counts = self.counts.setdefault(name, np.zeros(1, np.int64))
        squares = (values**2).sum(axis=-2).reshape(-1, n_columns)
        for number, row in enumerate(squares):
            sums[number % n_matrices] += row
        counts += values.size // n_columns // n_matrices


def _values(tensor: Any, dtype: Any) -> Any:
    """A tensor's values as numpy has them, slowest first, whatever its strides."""
    assert tensor.type == (_F32 if dtype is np.float32 else _I32)
    shape, strides = tuple(tensor.ne)[::-1], tuple(tensor.nb)[::-1]
    extent = sum((n - 1) * step for n, step in zip(shape, strides, strict=True)) + 4
    raw = np.ctypeslib.as_array(ctypes.cast(tensor.data, ctypes.POINTER(ctypes.c_uint8)), (extent,))
    return np.ndarray(shape, dtype, raw.tobytes(), 0, strides)


def collect(path: Path, rows: Iterable[npt.NDArray[np.int64]]) -> Collector:
    """Run a GGUF file on rows of tokens, each by itself, with a cache in float32."""
    collector = Collector()
    callback = llama_cpp.ggml_backend_sched_eval_callback(collector.called)
    model = llama_cpp.llama_model_load_from_file(
        str(path).encode(), llama_cpp.llama_model_default_params()
    )
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = 512
    params.n_threads = params.n_threads_batch = 1
    params.type_k = params.type_v = _F32
    params.flash_attn_type = 0
    params.cb_eval = callback
    context = llama_cpp.llama_init_from_model(model, params)
    batch = llama_cpp.llama_batch_init(params.n_batch, 0, 1)
    try:
        for row in rows:
            llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
            batch.n_tokens = len(row)
            for place, token in enumerate(row.tolist()):
                batch.token[place], batch.pos[place] = token, place
                batch.n_seq_id[place], batch.seq_id[place][0] = 1, 0
                batch.logits[place] = 1  # else the last layer computes one position
            assert llama_cpp.llama_decode(context, batch) == 0
    finally:
        llama_cpp.llama_batch_free(batch)
        llama_cpp.llama_free(context)
        llama_cpp.llama_model_free(model)
    return collector
