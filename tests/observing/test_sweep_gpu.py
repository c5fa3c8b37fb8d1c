"""The sweep on a GPU against the sweep on the CPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from reap2gguf.checkpoint.checkpoint import Checkpoint
from reap2gguf.errors import UsageError
from reap2gguf.models import describe
from reap2gguf.observing import sizes
from reap2gguf.observing.importance import ImportanceObserver
from reap2gguf.observing.saliency import SaliencyObserver
from reap2gguf.observing.sweep import SweepOptions, sweep
from reap2gguf.progress import Silent
from tests.observing.devices import GPU
from tests.tiny import TinyQwen35Moe

pytestmark = GPU


def rows() -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [generator.integers(0, 4000, length) for length in (512, 512, 300, 512, 64)]


def test_saliency(example: Path) -> None:
    checkpoint = Checkpoint.open(example)
    model = describe(checkpoint)
    seen = {}
    for device, dtype in (("cpu", "float32"), ("cuda", "float32"), ("cuda", "bfloat16")):
        observer = SaliencyObserver(model)
        sweep(checkpoint, model, rows(), observer, SweepOptions(device, dtype), "test", Silent())
        seen[device, dtype] = observer.layers
    for layer, exact in seen["cpu", "float32"].items():
        single = seen["cuda", "float32"][layer]
        assert np.abs(single.count - exact.count).max() <= 0.001 * exact.count.sum()
        np.testing.assert_allclose(single.reap_sum, exact.reap_sum, rtol=0.01, atol=1.0)
        half = seen["cuda", "bfloat16"][layer]
        assert half.reap_sum.sum() == pytest.approx(exact.reap_sum.sum(), rel=0.02)


@pytest.mark.parametrize("spool", ["host", "disk"])
def test_where_hidden_states_wait_changes_nothing(
    spool: str, example: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sizes.MOST_TOKENS, "cuda", 1024)  # many batches, so that copies overlap
    checkpoint = Checkpoint.open(example)
    model = describe(checkpoint)
    seen = {}
    for kind in ("device", spool):
        observer = SaliencyObserver(model)
        options = SweepOptions("cuda", spool=kind, memory=2**31, folder=tmp_path)
        sweep(checkpoint, model, rows() * 20, observer, options, "test", Silent())
        seen[kind] = observer.layers
    for layer, here in seen["device"].items():
        there = seen[spool][layer]
        np.testing.assert_array_equal(there.count, here.count)
        np.testing.assert_array_equal(there.reap_sum, here.reap_sum)
        np.testing.assert_array_equal(there.norm_max, here.norm_max)


def test_too_little_memory_is_said(example: Path) -> None:
    checkpoint = Checkpoint.open(example)
    model = describe(checkpoint)
    options = SweepOptions("cuda", memory=2**20 * 600)
    with pytest.raises(UsageError, match=r"expected at least .* pass a smaller --max-length"):
        sweep(checkpoint, model, rows() * 100, SaliencyObserver(model), options, "test", Silent())


def test_importance(example: Path) -> None:
    checkpoint = Checkpoint.open(example)
    model = describe(checkpoint)
    found = {}
    for device in ("cpu", "cuda"):
        observer = ImportanceObserver(model)
        options = SweepOptions(device, "float32")
        sweep(checkpoint, model, rows(), observer, options, "test", Silent())
        found[device] = observer.entries
    assert found["cpu"].keys() == found["cuda"].keys()
    for name, entry in found["cpu"].items():
        # a few tokens are routed otherwise in other rounding
        near = found["cuda"][name].sums
        error = np.linalg.norm(near - entry.sums) / np.linalg.norm(entry.sums)
        assert error < 0.02, name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_deltanet_and_the_mtp_block(dtype: str, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(TinyQwen35Moe().write(tmp_path / "model"))
    model = describe(checkpoint)
    found = {}
    for device in ("cpu", "cuda"):
        observer = SaliencyObserver(model)
        options = SweepOptions(device, dtype if device == "cuda" else "float32")
        report = sweep(checkpoint, model, rows(), observer, options, "test", Silent(), rows()[:1])
        assert report.mtp_tokens == 510
        found[device] = observer.layers
    assert found["cpu"].keys() == found["cuda"].keys() == set(range(5))
    for layer, exact in found["cpu"].items():
        near = found["cuda"][layer]
        assert near.reap_sum.sum() == pytest.approx(exact.reap_sum.sum(), rel=0.05), layer
