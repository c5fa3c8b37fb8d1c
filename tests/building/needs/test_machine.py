"""What a machine has, with drivers and disks replaced."""

from __future__ import annotations

import ctypes
import os
import shutil
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest

from reap2gguf.building.needs import machine
from reap2gguf.building.needs.machine import Gpu, find_gpu, this_machine
from reap2gguf.options import ComputeOptions

GIB = 2**30


class Driver:
    """NVML with two GPUs."""

    def __init__(self, fails: str = "") -> None:
        self._fails = fails
        self.is_open = False

    def _answer(self, name: str) -> int:
        return 999 if self._fails == name else 0

    def nvmlInit_v2(self) -> int:
        self.is_open = True
        return self._answer("init")

    def nvmlShutdown(self) -> int:
        self.is_open = False
        return 0

    def nvmlDeviceGetHandleByIndex_v2(self, index: Any, handle: Any) -> int:
        handle._obj.value = index.value + 1
        return self._answer("handle") if index.value < 2 else 2

    def nvmlDeviceGetName(self, handle: Any, name: Any, size: Any) -> int:
        name.value = f"GPU {handle.value}".encode()
        return self._answer("name")

    def nvmlDeviceGetMemoryInfo(self, handle: Any, memory: Any) -> int:
        memory._obj.total, memory._obj.free = handle.value * 80 * GIB, handle.value * 79 * GIB
        return self._answer("memory")


@pytest.fixture(autouse=True)
def torch_for_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "version", lambda name: "2.13.0")
    monkeypatch.setattr(machine.sys, "platform", "linux")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def use(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: driver)


@pytest.mark.parametrize(
    ("visible", "found"),
    [
        (None, Gpu("GPU 1", 80 * GIB, 79 * GIB)),
        ("0", Gpu("GPU 1", 80 * GIB, 79 * GIB)),
        ("1,0", Gpu("GPU 2", 160 * GIB, 158 * GIB)),
        ("GPU-8f2c", Gpu("GPU 1", 80 * GIB, 79 * GIB)),
        ("7", None),
        ("", None),
        ("-1", None),
    ],
)
def test_the_gpu_that_is_visible(
    visible: str | None, found: Gpu | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = Driver()
    use(driver, monkeypatch)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert find_gpu() == found
    assert not driver.is_open


@pytest.mark.parametrize("fails", ["init", "handle", "name", "memory"])
def test_a_driver_that_does_not_answer(fails: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use(Driver(fails), monkeypatch)
    assert find_gpu() is None


def test_no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert find_gpu() is None


def test_a_torch_that_cannot_use_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    use(Driver(), monkeypatch)
    monkeypatch.setattr(machine, "version", lambda name: "2.13.0+cpu")
    assert find_gpu() is None

    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(machine, "version", missing)
    assert find_gpu() is None


def test_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(Driver(), monkeypatch)
    found = this_machine(ComputeOptions("cpu", threads=3), tmp_path / "a" / "b", tmp_path)
    assert (found.device, found.gpu, found.cores) == ("cpu", None, 3)
    assert found.is_one_disk
    assert found.disk_free_bytes > 0
    assert 0 < found.memory_free_bytes <= found.memory_bytes
    with_gpu = this_machine(ComputeOptions(), tmp_path, tmp_path)
    assert (with_gpu.device, with_gpu.gpu) == ("cuda", Gpu("GPU 1", 80 * GIB, 79 * GIB))
    use(Driver("init"), monkeypatch)
    without = this_machine(ComputeOptions("cuda"), tmp_path, tmp_path)
    assert (without.device, without.gpu) == ("cuda", None)


def test_a_disk_that_does_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(folder: os.PathLike[str]) -> None:
        raise OSError("gone")

    monkeypatch.setattr(shutil, "disk_usage", refuse)
    assert this_machine(ComputeOptions("cpu"), tmp_path, tmp_path).disk_free_bytes == 0
