"""On arm64, the kernels make the bytes that libggml makes on x86-64: compiled here, and emulated.

libggml itself rounds otherwise there, so a test on such a machine has nothing to compare with.
"""

from __future__ import annotations

import shutil
import struct
import subprocess
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as T

from reap2gguf.ggml import NEEDS_IMPORTANCE, load_ggml
from reap2gguf.quantizing.kernels import compiled, compiling
from reap2gguf.quantizing.kernels.codebooks import codebook
from reap2gguf.quantizing.stored_rows import StoredRows
from tests.quantizing.kernels import test_block_types, test_codebooks, test_k_quants
from tests.quantizing.kernels.cases import kernels, needs_kernels
from tests.quantizing.kernels.test_block_types import importance, values

COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
TYPES = (*test_block_types.TYPES, *test_k_quants.TYPES, *test_codebooks.TYPES)
KINDS = ("student", "bf16", "few levels", "sparse", "row scales", "block scales", "value scales")
WEIGHTS = ("none", "12 decades", "half zero")
ROWS, COLUMNS = 24, 512


def case(tensor_type: T, kind: str, weights: str) -> tuple[bytes, npt.NDArray[np.bool_]]:
    """A case as `host_arm64.cpp` reads it, and which of its rows are odd."""
    random = np.random.default_rng([tensor_type.value, *map(ord, kind + weights)])
    rows, weighing = values(kind, random, (ROWS, COLUMNS)), importance(weights, random, COLUMNS)
    book = codebook(load_ggml(), tensor_type)
    arrays = [] if book is None else [book.places, book.codes, book.entries]
    tables = None if book is None else book.pointers()
    wanted, is_odd = kernels().quantize(rows, tensor_type, weighing, tables)
    wanted[is_odd] = 0
    if not is_odd.all():
        wanted[~is_odd] = load_ggml()._quantize(rows[~is_odd], tensor_type, weighing)
    before = [b"" if weighing is None else weighing.tobytes()]
    before += [array.tobytes() for array in arrays] or [b""] * 3
    block = GGML_QUANT_SIZES[tensor_type][1]
    stored_as, stored = compiled._as_read(
        StoredRows((rows.view(np.uint32) >> 16).astype(np.uint16), "BF16")
        if kind == "bf16"
        else rows
    )
    numbers = (tensor_type.value, ROWS, COLUMNS, wanted.shape[1], block, stored_as)
    read = load_ggml().dequantize(wanted, tensor_type)
    parts = [struct.pack("<10q", *numbers, *map(len, before)), *before, stored.tobytes()]
    parts += [wanted.tobytes(), is_odd.tobytes(), read.tobytes()]
    return b"".join(parts), is_odd


@pytest.mark.slow
@needs_kernels
@pytest.mark.skipif(
    not shutil.which(COMPILER) or not shutil.which(EMULATOR),
    reason=f"needs {COMPILER} and {EMULATOR} (Debian: g++-aarch64-linux-gnu and qemu-user)",
)
def test_the_bytes_on_arm64_are_those_of_libggml_on_x86_64(tmp_path: Path) -> None:
    n_cases = n_odd = 0
    with (tmp_path / "cases").open("wb") as file:
        for tensor_type in TYPES:
            for kind in KINDS:
                for weights in WEIGHTS:
                    if weights == "none" and tensor_type in NEEDS_IMPORTANCE:
                        continue
                    data, is_odd = case(tensor_type, kind, weights)
                    file.write(data)
                    n_cases, n_odd = n_cases + 1, n_odd + int(is_odd.sum())
    assert n_odd < 0.05 * ROWS * n_cases
    program, source = tmp_path / "program", Path(__file__).with_name("host_arm64.cpp")
    command = compiling.command([COMPILER], "armv8-a", program)[:-1]
    command = [word for word in command if word not in compiling.OF_A_LIBRARY]
    subprocess.run([*command, "-static", f"-I{compiling.SOURCE}", source], check=True)
    emulated = subprocess.run(
        [EMULATOR, program, tmp_path / "cases"], check=True, capture_output=True, text=True
    )
    assert emulated.stdout == (
        f"{n_cases} cases: 0 rows differ, 0 are odd elsewhere, 0 values differ\n"
    )
