"""The quantizers of gpu.cu make libggml's bytes: on a GPU, and as plain C++ where there is none."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as T

from reap2gguf.ggml import NEEDS_IMPORTANCE, load_ggml
from reap2gguf.progress import CallbackProgress, Silent
from reap2gguf.quantizing.kernels import cuda, nvrtc
from reap2gguf.quantizing.kernels.codebooks import codebook, entries_shape
from reap2gguf.quantizing.kernels.compiling import compiler, machine
from reap2gguf.quantizing.kernels.cuda import STORED_AS, Book, Channel, Gpu, load_gpu
from reap2gguf.quantizing.kernels.driver import CudaError, Driver, Stream
from reap2gguf.quantizing.kernels.gpu_kernels import FORMS, Key
from reap2gguf.quantizing.quantizer import Quantizer
from reap2gguf.quantizing.stored_rows import StoredRows

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]
GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
on_host = pytest.mark.skipif(
    compiler() is None or machine() != "x86_64", reason="needs a C++ compiler and libggml on x86-64"
)
COLUMNS = 512
QUICK = (Key("quantize", T.Q4_K), Key("quantize", T.Q8_0), Key("quantize", T.IQ2_S, True))
KEYS = [
    Key("quantize", one, is_weighted)
    for one in FORMS
    for is_weighted in (False, True)
    if is_weighted or one not in NEEDS_IMPORTANCE
]
BOOKS = [one for one in FORMS if entries_shape(one)]
READ_QUICKLY = (T.Q4_K, T.IQ3_S)


def named(key: Key) -> str:
    assert key.tensor_type is not None
    return f"{key.tensor_type.name}-{'weighted' if key.is_weighted else 'plain'}"


def rows(n_rows: int, dtype: str) -> tuple[Bytes, Floats]:
    """Rows as they are stored, and as float32: all kinds, among them zeros, constants and tiny."""
    random = np.random.default_rng(n_rows)
    values = random.standard_t(3, (n_rows, COLUMNS)).astype(np.float32)
    values[1::9] *= 10 ** random.uniform(-7, 2, (len(values[1::9]), 1)).astype(np.float32)
    values[2::9] = 0
    values[3::9] = values[3::9, :1]
    values[4::9] = np.abs(values[4::9])
    values[5::9] = np.round(values[5::9])
    values[6::9, :300] = -0.0
    kind = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[dtype]
    stored = torch.from_numpy(values).to(kind).view(torch.uint8).numpy()
    return stored, StoredRows.of(stored.reshape(-1), dtype, COLUMNS).values


def importance(n_matrices: int) -> Floats:
    random = np.random.default_rng(9)
    found = random.gamma(0.3, 10, (n_matrices, COLUMNS)).astype(np.float32)
    found[:, ::7] = 0
    return found


def compare(
    made: Bytes,
    is_odd: npt.NDArray[np.bool_],
    values: Floats,
    tensor_type: T,
    weights: Floats | None,
    matrix_of: npt.NDArray[np.int32],
) -> None:
    assert is_odd.mean() < 0.1
    for matrix in range(matrix_of.max() + 1):
        some = matrix_of == matrix
        one = None if weights is None else weights[matrix]
        wanted = load_ggml().quantize(values[some], tensor_type, one)
        assert np.array_equal(made[some][~is_odd[some]], wanted[~is_odd[some]])


@pytest.fixture(scope="module")
def gpu(tmp_path_factory: pytest.TempPathFactory) -> Gpu:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        found = load_gpu()
        keys = [(key.tensor_type, key.is_weighted) for key in KEYS if key.tensor_type]
        said: list[str] = []
        found.prepare(keys, 4, CallbackProgress(lambda event: said.append(event.title)))
        assert said[0] == "Compiling kernels, once on this machine"
        said.clear()
        load_gpu().prepare(keys, 4, CallbackProgress(lambda event: said.append(event.title)))
        assert said == []
    return found


@pytest.mark.parametrize("dtype", STORED_AS)
@pytest.mark.parametrize("key", [pytest.param(one, marks=GPU, id=named(one)) for one in KEYS])
def test_a_gpu_makes_libggmls_bytes(key: Key, dtype: str, gpu: Gpu) -> None:
    assert key.tensor_type is not None
    tensor_type, is_weighted = key.tensor_type, key.is_weighted
    channel = gpu.channel()
    for n_rows in (1, 37, 700):
        stored, values = rows(n_rows, dtype)
        matrix_of = np.arange(n_rows, dtype=np.int32) // 300
        weights = importance(3) if is_weighted else None
        channel.stored(stored.size)[:] = stored.reshape(-1)
        channel.send(0, stored.size)
        found = channel.quantize(dtype, values.shape, [tensor_type], weights, matrix_of)
        assert np.array_equal(found.largest, np.abs(values).max(axis=1))
        blocks = found.blocks[tensor_type]
        compare(blocks.data, blocks.is_odd, values, tensor_type, weights, matrix_of)
        again = gpu.dequantize(blocks.data.copy(), tensor_type)
        assert np.array_equal(again, load_ggml().dequantize(blocks.data, tensor_type))


@pytest.mark.parametrize("value", [pytest.param(one, marks=GPU) for one in (np.inf, np.nan)])
def test_a_gpu_names_rows_that_are_not_finite(value: float, gpu: Gpu) -> None:
    _, values = rows(40, "F32")
    values[[7, 31], 100] = value
    _, is_odd = gpu.quantize(values, T.Q4_K)
    assert np.flatnonzero(is_odd).tolist() == [7, 31]


@pytest.mark.parametrize("n_threads", [pytest.param(6, marks=GPU)])
def test_threads_share_a_gpu(n_threads: int, gpu: Gpu) -> None:
    from concurrent.futures import ThreadPoolExecutor

    _, values = rows(700, "F32")
    wanted = load_ggml().quantize(values, T.Q4_K)
    with ThreadPoolExecutor(n_threads) as pool:
        found = list(pool.map(lambda _: gpu.quantize(values, T.Q4_K), range(24)))
    assert all(np.array_equal(data[~is_odd], wanted[~is_odd]) for data, is_odd in found)


def extreme_rows() -> Floats:
    """Rows of every scale, of a scale for each block, with zeros, far from zero, and equal."""
    random = np.random.default_rng(5)
    values = random.standard_normal((96, COLUMNS)).astype(np.float32)
    values[:40] *= (10 ** np.linspace(-40, 18, 40)).astype(np.float32)[:, None]
    blocks = values[40:60].reshape(20, -1, 16)
    blocks *= 10 ** random.uniform(-9, 4, (20, blocks.shape[1], 1)).astype(np.float32)
    values[60:70][random.random((10, COLUMNS)) < 0.97] = 0
    values[70:80] = -np.abs(values[70:80]) - 3
    values[80:90] = np.round(values[80:90]) / 4
    values[90:] = values[90:, :1]
    return values


def extreme_importances() -> list[Floats]:
    """Ones, 12 decades, half of zeros, one alone, very small, very large."""
    random = np.random.default_rng(6)
    found = np.ones((6, COLUMNS), np.float32)
    found[1] = 10 ** random.uniform(-6, 6, COLUMNS)
    found[2, random.random(COLUMNS) < 0.5] = 0
    found[3] = np.arange(COLUMNS) == 100
    found[4] *= np.float32(1e-38)
    found[5] *= np.float32(1e30)
    return list(found)


@pytest.mark.parametrize("tensor_type", [pytest.param(one, marks=GPU) for one in BOOKS])
def test_a_gpu_makes_libggmls_bytes_of_extremes(tensor_type: T, gpu: Gpu) -> None:
    values = extreme_rows()
    for weights in extreme_importances():
        data, is_odd = gpu.quantize(values, tensor_type, weights)
        wanted = load_ggml()._quantize(values[~is_odd], tensor_type, weights)
        assert np.array_equal(data[~is_odd], wanted)
        assert not is_odd[60:].all()


@pytest.mark.parametrize("key", [pytest.param(one, marks=GPU, id=named(one)) for one in KEYS])
def test_the_self_test_accepts_a_gpu(key: Key, gpu: Gpu) -> None:
    assert key.tensor_type is not None
    assert Quantizer(load_ggml(), gpu).uses_kernel(key.tensor_type, key.is_weighted)


@pytest.mark.parametrize("tensor_type", [pytest.param(one, marks=GPU) for one in BOOKS])
def test_a_codebook_is_sent_once_and_given_back(tensor_type: T, gpu: Gpu) -> None:
    values, weights = rows(9, "F32")[1], importance(1)
    data, _ = gpu.quantize(values, tensor_type, weights)
    book = gpu.book(tensor_type, Stream(gpu.driver))
    assert gpu.book(tensor_type, Stream(gpu.driver)) is book
    gpu.close()
    assert book.memory.address == 0
    assert np.array_equal(gpu.quantize(values, tensor_type, weights)[0], data)


@pytest.mark.parametrize("tensor_type", sorted(NEEDS_IMPORTANCE.intersection(FORMS)))
def test_a_type_without_its_importance_is_refused(tensor_type: T) -> None:
    channel = Channel.__new__(Channel)  # refused before the GPU is asked for anything
    with pytest.raises(ValueError, match=f"{tensor_type.name} needs an importance"):
        channel.quantize("F32", (4, COLUMNS), [tensor_type])


class HostDriver:
    """Memory of this machine in place of a GPU's."""

    def __init__(self) -> None:
        self.kept: list[Bytes] = []

    def call(self, name: str, address: Any, n_bytes: int) -> None:
        assert name == "cuMemAlloc_v2"
        self.kept.append(np.full(n_bytes + 256, 255, np.uint8))
        found = self.kept[-1].ctypes.data
        address._obj.value = found + -found % 256

    def to_device(self, target: int, source: Bytes) -> None:
        ctypes.memmove(target, source.ctypes.data, source.nbytes)

    def wait(self) -> None:
        pass


@pytest.fixture(scope="module")
def books() -> dict[T, Book]:
    driver: Any = HostDriver()
    return {one: Book.of(one, driver, driver) for one in FORMS}


def test_a_codebook_is_laid_out_as_the_kernels_read_it(books: dict[T, Book]) -> None:
    for one, book in books.items():
        wanted = codebook(load_ggml(), one)
        if wanted is None:
            assert (book.tables.value, book.entries.value) == (None, None)
            continue
        places, codes = (ctypes.c_void_p * 2).from_address(book.tables.value or 0)
        sent = {places: wanted.places, codes: wanted.codes, book.entries.value: wanted.entries}
        for address, part in sent.items():
            assert address is not None
            assert address % 256 == 0
            assert ctypes.string_at(address, part.nbytes) == part.tobytes()


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Key], ctypes.CDLL]:
    """gpu.cu as C++, for one kernel."""
    folder = tmp_path_factory.mktemp("host")

    def make(key: Key) -> ctypes.CDLL:
        path = folder / f"{key.kernel}-{key.tensor_type}-{key.is_weighted}.so"
        command = compiler()
        assert command is not None
        flags = ["-std=c++17", "-O1", "-ffp-contract=off", "-fPIC", "-shared", "-w"]
        given = [f"-D{text}" for text in key.definitions]
        source = str(Path(__file__).with_name("host_gpu.cpp"))
        include = f"-I{nvrtc.SOURCE}"
        subprocess.run([*command, *flags, *given, include, "-o", path, source], check=True)
        return ctypes.CDLL(str(path))

    return make


def _address(values: npt.NDArray[np.generic] | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if values is None else values.ctypes.data)


@on_host
@pytest.mark.parametrize(
    "key",
    [
        pytest.param(one, marks=[] if one in QUICK else [pytest.mark.slow], id=named(one))
        for one in KEYS
    ],
)
def test_its_source_makes_libggmls_bytes(
    key: Key, compiled: Callable[[Key], ctypes.CDLL], books: dict[T, Book]
) -> None:
    assert key.tensor_type is not None
    library, tensor_type, is_weighted = compiled(key), key.tensor_type, key.is_weighted
    columns, size = GGML_QUANT_SIZES[tensor_type]
    for dtype, stored_as in STORED_AS.items():
        n_rows = 75
        stored, values = rows(n_rows, dtype)
        aligned = np.empty(stored.size + 16, np.uint8)
        aligned = aligned[-aligned.ctypes.data % 16 :][: stored.size]
        aligned[:] = stored.reshape(-1)
        largest = np.abs(values).max(axis=1)
        largest[50] = np.inf  # a row that is left out
        squares = np.add.accumulate(values * values, axis=1)[:, -1] / np.float32(COLUMNS)
        matrix_of = np.arange(n_rows, dtype=np.int32) // 30
        weights = importance(3) if is_weighted else None
        n_blocks = COLUMNS // columns
        n_threads = n_rows * n_blocks * FORMS[tensor_type].n_threads
        room = np.full(n_rows * n_blocks * size + 16, 7, np.uint8)
        made = room[-room.ctypes.data % 16 :][: n_rows * n_blocks * size].reshape(n_rows, -1)
        is_odd = np.zeros(n_rows, np.bool_)
        library.run_quantize(
            -(-n_threads // 128), _address(aligned), stored_as, n_rows, COLUMNS,
            _address(weights), _address(matrix_of), _address(largest),
            _address(squares if is_weighted else None), books[tensor_type].tables,
            _address(made), _address(is_odd),
        )  # fmt: skip
        assert (made[50] == 7).all()
        kept = np.arange(n_rows) != 50
        compare(made[kept], is_odd[kept], values[kept], tensor_type, weights, matrix_of[kept])


@on_host
@pytest.mark.parametrize(
    "tensor_type",
    [pytest.param(one, marks=[] if one in READ_QUICKLY else [pytest.mark.slow]) for one in FORMS],
)
def test_its_source_reads_blocks_as_libggml_does(
    tensor_type: T, compiled: Callable[[Key], ctypes.CDLL], books: dict[T, Book]
) -> None:
    library = compiled(Key("dequantize", tensor_type))
    _, values = rows(40, "F32")
    raw = load_ggml().quantize(values, tensor_type, importance(1)[0])
    n_blocks = raw.size // GGML_QUANT_SIZES[tensor_type][1]
    out = np.empty_like(values)
    library.run_dequantize(
        -(-values.size // 16 // 128), _address(raw), ctypes.c_int64(n_blocks),
        books[tensor_type].entries, _address(out),
    )  # fmt: skip
    assert np.array_equal(out, load_ggml().dequantize(raw, tensor_type))


def test_every_kernel_has_a_request_of_its_own() -> None:
    keys = [Key("find_largest"), *KEYS, *(Key("dequantize", one) for one in FORMS)]
    requests = {(tuple(key.definitions), key.registers) for key in keys}
    assert len(requests) == len(keys)


class Counting(Gpu):
    """libggml in place of the kernels, which counts what it makes."""

    made: list[T]

    def quantize(self, rows: Any, tensor_type: T, *others: Any) -> Any:
        self.made.append(tensor_type)
        return load_ggml().quantize(rows, tensor_type, others[0]), np.zeros(len(rows), np.bool_)


def test_kernels_are_tried_once_per_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each export loads the same kernels again; others are tried for themselves."""
    monkeypatch.setattr(Quantizer, "is_reference", True)
    monkeypatch.setattr(cuda, "_COMPILED", {})
    made: list[T] = []
    monkeypatch.setattr(Counting, "made", made, raising=False)

    def tries(arch: str, driver: int = 12, compiler: int = 4) -> int:
        gpu = Counting(
            SimpleNamespace(arch=arch, version=driver),  # type: ignore[arg-type]
            SimpleNamespace(version=(12, compiler)),  # type: ignore[arg-type]
        )
        before = len(made)
        for is_weighted in (True, False):
            kind = T.Q4_K
            assert Quantizer(load_ggml(), gpu).uses_kernel(kind, is_weighted)
        return len(made) - before

    assert [tries("sm_90"), tries("sm_90")] == [2, 0]
    assert [tries("sm_80"), tries("sm_90", driver=13), tries("sm_90", compiler=5)] == [2, 2, 2]
    assert [tries("sm_80"), tries("sm_90")] == [0, 0]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a driver")
def test_without_a_driver_there_is_no_gpu() -> None:
    with pytest.raises(CudaError, match="no CUDA driver"):
        load_gpu()


def test_a_driver_that_is_too_old_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = tmp_path / "libcuda.so.1"
    if (command := compiler()) is None:
        pytest.skip("needs a C++ compiler")
    (tmp_path / "old.cpp").write_text('extern "C" int cuInit(unsigned) { return 0; }')
    subprocess.run([*command, "-shared", "-fPIC", "-o", library, tmp_path / "old.cpp"], check=True)
    monkeypatch.setattr("reap2gguf.quantizing.kernels.driver._LIBRARIES", [str(library)])
    with pytest.raises(CudaError, match="too old"):
        Driver()


def test_a_cached_kernel_is_not_compiled_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compiled: list[str] = []

    class FakeCompiler:
        version = (13, 0)

        def compile(self, arch: str, definitions: list[str], registers: int) -> bytes:
            compiled.append(f"{arch} {definitions}")
            return b"code"

    class FakeDriver:
        arch, version = "sm_90", 13000

        def enter(self) -> None:
            pass

        def load(self, code: bytes, *names: str) -> tuple[str, ...]:
            assert code == b"code"
            return names

    for count in (2, 0):
        made = Gpu(FakeDriver(), FakeCompiler())  # type: ignore[arg-type]
        made.prepare([(T.Q4_0, True)], 2, Silent())
        assert len(compiled) == count  # one is of both kernels that look at rows
        compiled.clear()
