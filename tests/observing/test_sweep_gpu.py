"""The sweep on a GPU against the sweep on the CPU."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

from reap2gguf.errors import UsageError
from reap2gguf.observing import budget
from reap2gguf.observing.importance import ImportanceObserver
from reap2gguf.observing.saliency import SaliencyObserver
from reap2gguf.options import ComputeOptions
from tests.observing.devices import GPU
from tests.observing.sweeps import rows_of, run_sweep
from tests.tiny import TinyQwen35Moe

pytestmark = GPU


ROWS = rows_of(512, 512, 300, 512, 64)


def test_saliency(example: Path) -> None:
    seen = {}
    for device, dtype in (("cpu", "float32"), ("cuda", "float32"), ("cuda", "bfloat16")):
        observer, _ = run_sweep(SaliencyObserver, example, ROWS, ComputeOptions(device, dtype))
        seen[device, dtype] = observer.layers
    for layer, exact in seen["cpu", "float32"].items():
        single = seen["cuda", "float32"][layer]
        assert np.abs(single.count - exact.count).max() <= 0.001 * exact.count.sum()
        np.testing.assert_allclose(single.reap_sum, exact.reap_sum, rtol=0.01, atol=1.0)
        half = seen["cuda", "bfloat16"][layer]
        assert half.reap_sum.sum() == pytest.approx(exact.reap_sum.sum(), rel=0.02)


@pytest.mark.parametrize("spool", ["host", "disk"])
def test_every_spool_gives_the_same_bits(
    spool: str, example: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(budget.MOST_TOKENS, "cuda", 1024)  # many batches, so that copies overlap
    seen = {}
    for kind in ("device", spool):
        options = ComputeOptions("cuda", spool=kind, memory=2**31, scratch=tmp_path)
        observer, _ = run_sweep(SaliencyObserver, example, ROWS * 20, options)
        seen[kind] = observer.layers
    for layer, here in seen["device"].items():
        there = seen[spool][layer]
        np.testing.assert_array_equal(there.count, here.count)
        np.testing.assert_array_equal(there.reap_sum, here.reap_sum)
        np.testing.assert_array_equal(there.norm_max, here.norm_max)


def test_every_sum_of_saliency(example: Path) -> None:
    """Layer 0, whose inputs differ by rounding alone: every array of the CPU, on the GPU."""
    first = {}
    for device in ("cpu", "cuda"):
        options = ComputeOptions(device, "float32")
        first[device] = run_sweep(SaliencyObserver, example, ROWS, options)[0].layers[0]
    assert first["cuda"].is_complete
    np.testing.assert_array_equal(first["cuda"].count, first["cpu"].count)
    for part in fields(first["cpu"]):
        found, expected = (getattr(first[device], part.name) for device in ("cuda", "cpu"))
        np.testing.assert_allclose(found, expected, rtol=2e-3, atol=1e-6, err_msg=part.name)


def test_too_little_memory_is_an_error(example: Path) -> None:
    options = ComputeOptions("cuda", memory=2**20 * 600)
    with pytest.raises(UsageError, match=r"--memory 600 MiB is too small; .* smaller --max-length"):
        run_sweep(SaliencyObserver, example, ROWS * 100, options)


def test_importance(example: Path) -> None:
    found = {}
    for device in ("cpu", "cuda"):
        options = ComputeOptions(device, "float32")
        observer, _ = run_sweep(ImportanceObserver, example, ROWS, options)
        found[device] = observer.entries
    assert found["cpu"].keys() == found["cuda"].keys()
    for name, entry in found["cpu"].items():
        # a few tokens are routed otherwise in other rounding
        near = found["cuda"][name].sums
        error = np.linalg.norm(near - entry.sums) / np.linalg.norm(entry.sums)
        assert error < 0.02, name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_deltanet_and_the_mtp_block(dtype: str, tmp_path: Path) -> None:
    folder = TinyQwen35Moe().write(tmp_path / "model")
    found = {}
    for device in ("cpu", "cuda"):
        options = ComputeOptions(device, dtype if device == "cuda" else "float32")
        observer, report = run_sweep(SaliencyObserver, folder, ROWS, options, ROWS[:1])
        assert report.mtp_tokens == 510
        found[device] = observer.layers
    assert found["cpu"].keys() == found["cuda"].keys() == set(range(5))
    for layer, exact in found["cpu"].items():
        near = found["cuda"][layer]
        assert near.reap_sum.sum() == pytest.approx(exact.reap_sum.sum(), rel=0.05), layer
