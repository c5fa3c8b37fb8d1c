"""Variants of a kernel are compiled before the first of them is timed."""

from __future__ import annotations

import sys
import threading
from concurrent.futures import Future
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from reap2gguf.observing.compute.compiling import variants_compiled_together
from tests.observing.devices import GPU

N_VARIANTS = 4


class Variant:
    def __init__(self, number: int) -> None:
        self.number = number

    def all_kwargs(self) -> dict[str, int]:
        return {"BLOCK": self.number}


class Mode:
    """As Triton's AsyncCompileMode: what is submitted within it is done when it is left."""

    active: Mode | None = None

    def __init__(self, executor: Any, ignore_errors: bool) -> None:
        assert ignore_errors
        self.executor = executor
        self.submitted: list[Future[None]] = []

    def __enter__(self) -> Mode:
        Mode.active = self
        return self

    def __exit__(self, *_: Any) -> None:
        for one in self.submitted:
            one.result(timeout=60)
        Mode.active = None


class Kernel:
    """A kernel whose compilers wait for one another."""

    def __init__(self) -> None:
        self.all_there = threading.Barrier(N_VARIANTS)
        self.compiled: list[int] = []

    def _compile(self, number: int) -> None:
        self.all_there.wait(timeout=60)
        self.compiled.append(number)

    def warmup(self, *args: Any, grid: Any, **options: int) -> None:
        assert args == ("x", 3)
        assert Mode.active is not None
        future = Mode.active.executor.submit(self._compile, options["BLOCK"])
        Mode.active.submitted.append(future)


class Tuner:
    """As Triton's Autotuner: it tries the variants of `prune_configs`."""

    def __init__(self, fn: Kernel) -> None:
        self.fn = fn
        self.nargs = {"pointer": "x", "size": 3}
        self.timed_after: list[int] = []
        self.timed: list[str] = []

    def do_bench(self, kernel: Any, quantiles: Any) -> None:
        self.timed.append("long")

    def prune_configs(self, kwargs: dict[str, Any]) -> list[Variant]:
        return [Variant(number) for number in range(N_VARIANTS)]

    def run(self, **kwargs: Any) -> None:
        for _ in self.prune_configs(kwargs):
            self.timed_after.append(len(self.fn.compiled))
            self.do_bench(self.fn, quantiles=None)


@pytest.fixture
def tuner(monkeypatch: pytest.MonkeyPatch) -> Tuner:
    triton, autotuner = ModuleType("triton"), ModuleType("triton.runtime.autotuner")
    triton.AsyncCompileMode = Mode  # type: ignore[attr-defined]
    autotuner.Autotuner = Tuner  # type: ignore[attr-defined]
    tuner = Tuner(Kernel())
    triton.testing = ModuleType("triton.testing")  # type: ignore[attr-defined]

    def do_bench(kernel: Any, quantiles: Any, warmup: int, rep: int) -> None:
        assert kernel is tuner.fn
        tuner.timed.append(f"{warmup} and {rep} ms")

    triton.testing.do_bench = do_bench
    for name, module in {
        "triton": triton,
        "triton.runtime": ModuleType("triton.runtime"),
        "triton.runtime.autotuner": autotuner,
    }.items():
        monkeypatch.setitem(sys.modules, name, module)
    return tuner


def test_all_are_compiled_at_the_same_time_before_one_is_timed(tuner: Tuner) -> None:
    with variants_compiled_together(N_VARIANTS):
        tuner.run(grid=(1,), warmup=False)
    assert tuner.timed_after == [N_VARIANTS] * N_VARIANTS
    assert sorted(tuner.fn.compiled) == list(range(N_VARIANTS))
    assert set(tuner.timed) == {"2 and 10 ms"}


def test_triton_is_as_before_afterwards(tuner: Tuner) -> None:
    before = Tuner.prune_configs
    with pytest.raises(RuntimeError), variants_compiled_together(N_VARIANTS):
        raise RuntimeError
    assert Tuner.prune_configs is before
    tuner.run(grid=(1,), warmup=False)
    assert tuner.timed_after == [0] * N_VARIANTS
    assert set(tuner.timed) == {"long"}


def test_an_old_triton_is_left_alone(tuner: Tuner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(sys.modules["triton"], "AsyncCompileMode")
    with variants_compiled_together(N_VARIANTS):
        tuner.run(grid=(1,), warmup=False)
    assert tuner.timed_after == [0] * N_VARIANTS


@pytest.mark.gpu
@GPU[1]
def test_kernels_of_the_package_for_linear_attention(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    normalise = pytest.importorskip("fla.modules.l2norm").l2norm_fwd
    jit = pytest.importorskip("triton.runtime.jit")
    threads: set[str] = set()
    compiled_by = jit.JITFunction._do_compile

    def noted(self: Any, *args: Any, **options: Any) -> Any:
        real = self.compile

        def compile_here(*inner: Any, **more: Any) -> Any:
            threads.add(threading.current_thread().name)
            return real(*inner, **more)

        monkeypatch.setattr(self, "compile", compile_here)
        return compiled_by(self, *args, **options)

    monkeypatch.setattr(jit.JITFunction, "_do_compile", noted)
    values = torch.randn(512, 128, device="cuda")
    with variants_compiled_together(4):
        found = normalise(values)[0]
    expected = torch.nn.functional.normalize(values, dim=-1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert len(threads) > 1
    assert threading.current_thread().name not in threads
