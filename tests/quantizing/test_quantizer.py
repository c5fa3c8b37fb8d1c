"""Kernels are used where they make libggml's bytes, and libggml where they do not."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from gguf import GGMLQuantizationType as T

from reap2gguf.errors import DependencyError
from reap2gguf.ggml import load_ggml
from reap2gguf.quantizing.quantizer import Quantizer, load_quantizer

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]


@dataclass
class FakeKernels:
    """libggml's bytes, with faults that a test asks for."""

    wrong_from: int = 10**9  # rows of a call with more rows than the self-test are wrong from here
    odd: tuple[int, ...] = ()
    is_always_wrong: bool = False
    calls: int = 0
    target: str = "fake"
    path: Path = Path("fake.so")

    def covers(self, tensor_type: T) -> bool:
        return tensor_type is T.Q4_K

    def quantize(
        self, rows: Floats, tensor_type: T, importance: Floats | None, tables: object
    ) -> tuple[Bytes, npt.NDArray[np.bool_]]:
        self.calls += 1
        target = load_ggml().quantize(rows, tensor_type, importance)
        is_odd = np.zeros(len(rows), dtype=np.bool_)
        if self.is_always_wrong:
            target[:, -1] ^= 1
        elif self.calls > 1:  # the first call is the self-test
            target[self.wrong_from :, -1] ^= 1
            for row in self.odd:
                target[row], is_odd[row] = 0, True
        return target, is_odd


@pytest.fixture
def rows() -> Floats:
    return np.random.default_rng(1).standard_normal((64, 512)).astype(np.float32)


def quantizer(kernels: FakeKernels, checked: float) -> Quantizer:
    return Quantizer(load_ggml(), kernels, checked)  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def _is_x86(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reap2gguf.quantizing.quantizer.machine", lambda: "x86_64")


def test_a_kernel_that_differs_is_not_used(rows: Floats) -> None:
    kernels = FakeKernels(is_always_wrong=True)
    one = quantizer(kernels, 1.0)
    expected = load_ggml().quantize(rows, T.Q4_K)
    assert not one.uses_kernel(T.Q4_K, is_weighted=False)
    for _ in range(2):
        assert (one.quantize(rows, T.Q4_K) == expected).all()
    assert kernels.calls == 1  # only the self-test


def test_other_types_are_left_to_libggml(rows: Floats) -> None:
    kernels = FakeKernels()
    found = quantizer(kernels, 1.0).quantize(rows, T.Q8_0)
    assert (found == load_ggml().quantize(rows, T.Q8_0)).all()
    assert kernels.calls == 0


def test_odd_rows_are_left_to_libggml(rows: Floats) -> None:
    found = quantizer(FakeKernels(odd=(0, 7, 63)), 1.0).quantize(rows, T.Q4_K)
    assert (found == load_ggml().quantize(rows, T.Q4_K)).all()


def test_all_blocks_are_compared_when_asked(rows: Floats) -> None:
    with pytest.raises(
        DependencyError, match=r"Q4_K: the compiled kernel and libggml .* different bytes"
    ):
        quantizer(FakeKernels(wrong_from=63), 1.0).quantize(rows, T.Q4_K)


def test_a_sample_finds_a_kernel_that_is_often_wrong(rows: Floats) -> None:
    with pytest.raises(DependencyError, match="REAP2GGUF_KERNELS=off"):
        quantizer(FakeKernels(wrong_from=0), 1e-6).quantize(rows, T.Q4_K)


def test_nothing_is_compared_when_asked(rows: Floats) -> None:
    found = quantizer(FakeKernels(wrong_from=0), 0.0).quantize(rows, T.Q4_K)
    assert (found != load_ggml().quantize(rows, T.Q4_K)).any()


def test_requests_are_refused_as_by_libggml(rows: Floats) -> None:
    one = load_quantizer()
    with pytest.raises(ValueError, match="not a multiple"):
        one.quantize(rows[:, :200], T.Q4_K)
    with pytest.raises(ValueError, match="importance"):
        one.quantize(rows, T.Q4_K, np.ones(3, np.float32))
    with pytest.raises(ValueError, match="beyond Q4_K's range"):
        one.quantize(rows * np.float32(1e12), T.Q4_K)


def test_variable_turns_kernels_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REAP2GGUF_KERNELS", "off")
    assert load_quantizer().kernels is None
