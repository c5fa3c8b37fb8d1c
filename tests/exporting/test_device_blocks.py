"""What a GPU quantizes has the bytes, checks and errors of a CPU's; a stand-in does its work.

The stand-in is libggml behind the interface of `Gpu`, so that all but the kernels runs everywhere.
`test_cuda.py` compares the kernels.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from gguf import GGMLQuantizationType as T
from safetensors.torch import load_file, save_file

from reap2gguf.checkpoint.checkpoint import Checkpoint
from reap2gguf.errors import CheckpointError, DependencyError
from reap2gguf.exporting import device_blocks, model_files
from reap2gguf.exporting.row_ranges import batches
from reap2gguf.ggml import load_ggml
from reap2gguf.gguf_files.imatrix import Imatrix
from reap2gguf.models.table import describe
from reap2gguf.options import ComputeOptions
from reap2gguf.progress import CallbackProgress
from reap2gguf.quantizing.kernels.cuda import Blocks, Quantized
from reap2gguf.quantizing.kernels.driver import CudaError
from reap2gguf.quantizing.kernels.gpu_kernels import FORMS
from reap2gguf.quantizing.kernels.nvrtc import CompileError
from reap2gguf.quantizing.quantizer import BlockKernels, Quantizer
from reap2gguf.quantizing.stored_rows import StoredRows
from tests.exporting.files import export_files, gguf_tensors, plain, random_imatrix
from tests.tiny import TinyQwen3Moe

Floats = npt.NDArray[np.float32]
RECIPES = ("Q4_K_M", "IQ4_XS", "Q8_0", "IQ3_M", "BF16")


@dataclass
class FakeGpu:
    """libggml in place of a GPU: `odd` rows get no bytes, `wrong` types get wrong ones."""

    odd: int = 0  # every so many rows; 0: none
    wrong: frozenset[T] = frozenset()
    fails: bool = False
    batch_rows: list[int] = field(default_factory=list)
    prepared: list[tuple[T, bool]] = field(default_factory=list)
    is_closed: bool = False
    buffer: npt.NDArray[np.uint8] = field(default_factory=lambda: np.empty(0, np.uint8))
    sent: int = 0

    def covers(self, tensor_type: T) -> bool:
        return tensor_type in FORMS

    def prepare(self, types: Iterable[tuple[T, bool]], n_threads: int, progress: object) -> None:
        self.prepared = list(types)

    def channel(self) -> FakeGpu:
        return FakeGpu(self.odd, self.wrong, self.fails, self.batch_rows)  # one for each thread

    def stored(self, n_bytes: int) -> npt.NDArray[np.uint8]:
        self.buffer, self.sent = np.empty(n_bytes, np.uint8), 0
        return self.buffer

    def send(self, first: int, last: int) -> None:
        assert first == self.sent
        self.sent = last

    def quantize(self, *arguments: Any) -> Any:
        if isinstance(arguments[0], str):
            return self.quantize_stored(*arguments)
        rows, tensor_type, importance, _ = arguments
        data = load_ggml().quantize(rows, tensor_type, importance)
        data[:, -1] ^= tensor_type in self.wrong
        return data, np.zeros(len(rows), np.bool_)

    def quantize_stored(
        self,
        dtype: str,
        shape: tuple[int, int],
        types: Collection[T],
        importance: Floats | None,
        matrix_of: npt.NDArray[np.int32],
    ) -> Quantized:
        if self.fails:
            raise CudaError("cuLaunchKernel: out of order (719)")
        assert self.sent == self.buffer.size
        rows = StoredRows.of(self.buffer, dtype, shape[1]).values
        assert rows.shape == shape
        self.batch_rows.append(len(rows))
        blocks = {}
        for one in types:
            parts = [
                load_ggml()._quantize(
                    rows[matrix_of == matrix],
                    one,
                    None if importance is None else importance[matrix],
                )
                for matrix in range(matrix_of.max() + 1)
            ]
            is_odd = np.zeros(len(rows), np.bool_)
            if self.odd:
                is_odd[:: self.odd] = True
            data = np.concatenate(parts)
            data[is_odd] = 0
            blocks[one] = Blocks(data, is_odd)
        return Quantized(np.abs(rows).max(axis=1), blocks)

    def close(self) -> None:
        self.is_closed = True


@pytest.fixture(scope="module")
def imatrix(wide: Path) -> Imatrix:
    return random_imatrix(gguf_tensors(wide))


@pytest.fixture(autouse=True)
def _is_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ComputeOptions, "likely_device", property(lambda self: "cuda"))
    monkeypatch.setattr(device_blocks, "_MUCH_WORK", 0)
    monkeypatch.setattr(Quantizer, "is_reference", True)
    monkeypatch.setattr("reap2gguf.exporting.gguf_export.load_quantizer", with_kernels)


def with_kernels(checked: float) -> Quantizer:
    """A machine that has kernels; here none of them does a type."""
    return Quantizer(load_ggml(), _NoType(), checked)


class _NoType:
    def covers(self, tensor_type: T, /) -> bool:
        return False

    def quantize(self, *arguments: object) -> Any:
        raise AssertionError(arguments)


def use(gpu: FakeGpu | Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def load() -> FakeGpu:
        if isinstance(gpu, Exception):
            raise gpu
        return gpu

    monkeypatch.setattr(device_blocks, "load_gpu", load)


def on_cpu(
    folder: Path, target: Path, imatrix: Imatrix | None, monkeypatch: pytest.MonkeyPatch
) -> dict[str, Path]:
    target.mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(ComputeOptions, "likely_device", property(lambda self: "cpu"))
        return export_files(folder, target, map(plain, RECIPES), imatrix)


@pytest.mark.parametrize(
    ("odd", "most_values"),
    [
        pytest.param(0, 2**22, marks=pytest.mark.slow),
        pytest.param(5, 2**22, marks=pytest.mark.slow),
        (3, 20_000),
    ],
)
def test_files_are_those_of_a_cpu(
    odd: int,
    most_values: int,
    wide: Path,
    imatrix: Imatrix,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wanted = on_cpu(wide, tmp_path / "cpu", imatrix, monkeypatch)
    monkeypatch.setattr("reap2gguf.gguf_files.rows.MAX_VALUES", most_values)
    gpu = FakeGpu(odd)
    use(gpu, monkeypatch)
    found = export_files(wide, tmp_path, map(plain, RECIPES), imatrix)
    for name, path in found.items():
        assert path.read_bytes() == wanted[name].read_bytes(), name
    assert gpu.batch_rows
    assert gpu.is_closed
    assert (T.Q4_K, True) in gpu.prepared
    assert all(tensor_type in FORMS for tensor_type, _ in gpu.prepared)


def test_without_importance_too(
    wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(gpu := FakeGpu(odd=4), monkeypatch)
    path = export_files(wide, tmp_path, [plain("Q5_K_M")])["Q5_K_M"].read_bytes()
    assert (T.Q5_K, False) in gpu.prepared
    monkeypatch.setattr(ComputeOptions, "likely_device", property(lambda self: "cpu"))
    assert export_files(wide, tmp_path, [plain("Q5_K_M")])["Q5_K_M"].read_bytes() == path


def test_matrices_go_together_up_to_the_bytes_of_a_batch(wide: Path) -> None:
    with Checkpoint.open(wide) as checkpoint:
        tensors = describe(checkpoint).gguf_tensors(checkpoint.tensors)
        experts = next(tensor for tensor in tensors if tensor.n_matrices > 2)
        one = 2 * experts.n_columns * experts.shape[1]
        for most in (0, one, 2 * one, 3 * one - 1, 100 * one):
            found = list(batches(checkpoint, [experts], most))
            sizes = [sum(rows.last - rows.first for rows in batch) * 2 for batch in found]
            assert sum(sizes) == 2 * experts.shape[0] * experts.shape[1]
            most_together = max(1, most // one)
            assert max(len(batch) for batch in found) == min(most_together, experts.shape[0])
        everything = [rows for batch in batches(checkpoint, tensors, 2**24) for rows in batch]
        assert everything == [rows for (rows,) in batches(checkpoint, tensors)]


def broken(folder: Path, values: float) -> str:
    """Put values into one expert's matrix; its name."""
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    tensors[name][:] = values * torch.sign(tensors[name].float())
    save_file(tensors, folder / "model.safetensors")
    return name


@pytest.mark.parametrize("value", [torch.inf, torch.nan, 1e-30])
def test_errors_are_those_of_a_cpu(
    value: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = TinyQwen3Moe().write(tmp_path / "model")
    name = broken(folder, value)
    use(FakeGpu(), monkeypatch)
    words = []
    for device in ("cuda", "cpu"):
        monkeypatch.setattr(ComputeOptions, "likely_device", property(lambda self, d=device: d))
        with pytest.raises(CheckpointError, match=name) as error:
            export_files(folder, tmp_path, [plain("Q8_0")])
        words.append(str(error.value))
    assert words[0] == words[1]


def test_a_gpu_that_fails_ends_the_export_with_what_to_do(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(gpu := FakeGpu(fails=True), monkeypatch)
    with pytest.raises(DependencyError, match=r"GPU failed .* \(cuLaunchKernel.*DEVICES=-1"):
        export_files(tiny, tmp_path, [plain("Q8_0")])
    assert gpu.is_closed
    assert not list(tmp_path.glob("*.gguf*"))


def notes_of(
    folder: Path, target: Path, monkeypatch: pytest.MonkeyPatch, device: str = "cuda"
) -> list[str]:
    """What an export to Q8_0 says."""
    said: list[str] = []
    export = model_files.export_gguf

    def told(*arguments: Any) -> None:
        weights, tensors, outputs, imatrix, n_threads, _, journal, hashes, _, checked = arguments
        progress = CallbackProgress(
            lambda event: said.append(event.text) if event.kind == "note" else None
        )
        shown = progress, journal, hashes
        export(weights, tensors, outputs, imatrix, n_threads, *shown, device, checked)

    monkeypatch.setattr(model_files, "export_gguf", told)
    export_files(folder, target, [plain("Q8_0")])
    return said


@pytest.mark.parametrize(
    "error", [CompileError("NVRTC was not found"), CudaError("cuInit: no device (100)")]
)
def test_without_what_it_needs_the_processor_does_it(
    error: Exception, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(error, monkeypatch)
    (note,) = notes_of(tiny, tmp_path, monkeypatch)
    assert note == f"the GPU does not quantize: {error}; the processor does"
    assert (tmp_path / "Q8_0.gguf").is_file()


def test_a_type_with_wrong_bytes_is_left_to_the_processor(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(gpu := FakeGpu(wrong=frozenset({T.Q8_0})), monkeypatch)
    (note,) = notes_of(tiny, tmp_path, monkeypatch)
    assert "libggml's bytes of Q8_0" in note
    assert not gpu.batch_rows


def test_little_work_is_the_processors(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(AssertionError("not asked for"), monkeypatch)
    monkeypatch.setattr(device_blocks, "_MUCH_WORK", 2**28)
    assert notes_of(tiny, tmp_path, monkeypatch, "auto") == []


def test_kernels_that_are_off_are_off_on_a_gpu_too(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(AssertionError("not asked for"), monkeypatch)
    monkeypatch.setattr(
        "reap2gguf.exporting.gguf_export.load_quantizer",
        lambda checked: Quantizer(load_ggml(), None, checked),
    )
    assert notes_of(tiny, tmp_path, monkeypatch) == []


def test_a_wrong_block_is_found_in_a_sample(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Wrong(FakeGpu):
        def channel(self) -> FakeGpu:
            return Wrong()

        def quantize_stored(self, *arguments: Any) -> Quantized:
            found = super().quantize_stored(*arguments)
            for blocks in found.blocks.values():
                blocks.data[:] ^= 1
            return found

    use(Wrong(), monkeypatch)
    with pytest.raises(DependencyError, match="different bytes of the same values"):
        export_files(tiny, tmp_path, [plain("Q8_0")])


def test_the_stand_in_is_a_quantizer() -> None:
    kernels: BlockKernels = FakeGpu()
    assert Quantizer(load_ggml(), kernels).uses_kernel(T.Q8_0, False)
