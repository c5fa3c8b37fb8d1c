"""The memory of an export on a GPU is within what is planned, by buffers that a driver counts."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from reap2gguf.checkpoint.checkpoint import Checkpoint
from reap2gguf.exporting import device_blocks, gguf_export, memory
from reap2gguf.exporting.memory import export_memory
from reap2gguf.ggml import load_ggml
from reap2gguf.gguf_files.imatrix import Imatrix
from reap2gguf.models.table import describe
from reap2gguf.options import ComputeOptions
from reap2gguf.pruning.view import PrunedView
from reap2gguf.quantizing.kernels.cuda import Gpu
from reap2gguf.quantizing.kernels.driver import Function
from reap2gguf.quantizing.quantizer import Quantizer
from reap2gguf.quantizing.resolve import resolve
from tests.exporting.files import export_files, gguf_tensors, plain, random_imatrix
from tests.tiny import TinyQwen3Moe

RECIPES = ("Q4_K_M", "Q6_K", "Q8_0", "IQ3_M")


class CountingDriver:
    """Gives out memory as CUDA's driver does, all zeros, and computes nothing."""

    arch, version = "sm_90", 13000

    def __init__(self) -> None:
        self.held = {"pinned": 0, "device": 0}
        self.most = dict(self.held)
        self._buffers: dict[int, tuple[str, Any]] = {}
        self._lock = threading.Lock()

    def enter(self) -> None:
        """There is no context."""

    def call(self, name: str, *arguments: Any) -> None:
        with self._lock:
            if name in ("cuMemHostAlloc", "cuMemAlloc_v2"):
                kind = "pinned" if name == "cuMemHostAlloc" else "device"
                buffer = ctypes.create_string_buffer(arguments[1])
                address = ctypes.addressof(buffer)
                arguments[0]._obj.value = address
                self._buffers[address] = kind, buffer
                self.held[kind] += arguments[1]
                self.most[kind] = max(self.most[kind], self.held[kind])
            elif name in ("cuMemFreeHost", "cuMemFree_v2"):
                kind, buffer = self._buffers.pop(arguments[0].value)
                self.held[kind] -= len(buffer)


class CountingGpu(Gpu):
    """A GPU whose kernels do nothing."""

    def prepare(self, types: Iterable[object], n_threads: int, progress: object) -> None:
        """Nothing is compiled."""

    def function(self, key: object) -> Function:
        return Function("", ctypes.c_void_p())


def with_kernels(checked: float) -> Quantizer:
    """A machine that has kernels, which do no type."""
    return Quantizer(load_ggml(), object(), checked)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shape = TinyQwen3Moe(hidden=512, width=256, n_experts=16)
    return shape.write(tmp_path_factory.mktemp("wide") / "model")


@pytest.fixture(scope="module")
def imatrix(wide: Path) -> Imatrix:
    return random_imatrix(gguf_tensors(wide))


@pytest.mark.slow
@pytest.mark.parametrize("batch_bytes", [2**24, 2**19, 2**17])
def test_buffers_are_no_more_than_planned_and_not_far_less(
    batch_bytes: int,
    wide: Path,
    imatrix: Imatrix,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    driver = CountingDriver()
    compiler = SimpleNamespace(version=(12, 4))
    gpu = CountingGpu(driver, compiler)  # type: ignore[arg-type]
    monkeypatch.setattr(device_blocks, "load_gpu", lambda: gpu)
    monkeypatch.setattr(device_blocks, "_MUCH_WORK", 0)
    for name in ("_FEWEST_THREADS", "_MOST_THREADS"):  # one, so that it meets all tensors
        monkeypatch.setattr(device_blocks, name, 1)
    for module in (device_blocks, memory):
        monkeypatch.setattr(module, "BATCH_BYTES", batch_bytes)
    monkeypatch.setattr(memory, "_LOCAL_BYTES", 0)  # the driver's own, not counted here
    monkeypatch.setattr(memory, "_CODEBOOK_BYTES", 2**17 + 2**13)  # as IQ3_S has it
    monkeypatch.setattr(ComputeOptions, "likely_device", property(lambda self: "cuda"))
    monkeypatch.setattr(Quantizer, "uses_kernel", lambda self, *key: self.kernels is gpu)
    monkeypatch.setattr(gguf_export, "load_quantizer", lambda checked: with_kernels(0.0))
    export_files(wide, tmp_path, map(plain, RECIPES), imatrix)
    assert not any(driver.held.values())  # all is given back
    with Checkpoint.open(wide) as checkpoint:
        model = describe(checkpoint)
        kept = {layer: tuple(range(model.facts.n_experts)) for layer in model.facts.moe_layers}
        view = PrunedView(checkpoint, model, kept)
        tensors = model.gguf_tensors(checkpoint.tensors)
        recipes = [
            resolve(plain(name), tensors, model.facts, model.facts.n_experts, has_imatrix=True)
            for name in RECIPES
        ]
        found = export_memory(view, recipes, "auto", 2, has_gpu=True)
        assert not export_memory(view, recipes, "auto", 2, has_gpu=False).device
        assert not export_memory(view, recipes, "cpu", 2, has_gpu=True).pinned
    assert driver.most["pinned"] <= found.pinned <= 1.5 * driver.most["pinned"]
    books = memory._CODEBOOK_BYTES * 3  # of IQ2_S, IQ3_S and IQ3_XXS, which are smaller
    assert driver.most["device"] <= found.device <= 1.5 * driver.most["device"] + books
