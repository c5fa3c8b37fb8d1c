"""The sums of experts against REAP's formula, written out on transformers' own model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from reap2gguf.errors import ObservationError
from reap2gguf.observing.saliency import SaliencyObserver
from tests.observing.sweeps import rows_of, run_sweep
from tests.observing.witness import LAYOUTS, Witness
from tests.tiny import TinyQwen3Moe


@pytest.mark.parametrize("layout", LAYOUTS)
def test_saliency_is_reaps_formula(layout: str, tmp_path: Path) -> None:
    spec = LAYOUTS[layout]
    folder = spec.write(tmp_path / "model")
    rows = rows_of(40, 40, 23, 7)
    observer, report = run_sweep(SaliencyObserver, folder, rows)
    assert (report.n_rows, report.n_tokens, report.n_dropped_rows) == (4, 110, 0)
    witness = Witness(folder, rows)
    assert set(observer.layers) == set(range(spec.n_layers)) - set(spec.dense_layers)
    for layer, seen in observer.layers.items():
        expected = witness.saliency(layer)
        np.testing.assert_array_equal(seen.count, expected.count)
        assert seen.count.sum() == 110 * spec.top_k
        for name in ("reap_sum", "gate_sum", "norm_sum", "norm_max"):
            np.testing.assert_allclose(
                getattr(seen, name), getattr(expected, name), rtol=2e-5, atol=1e-9
            )


def test_2d_and_3d_storage_give_the_same_sums(tmp_path: Path) -> None:
    rows = rows_of(33, 20)
    apart, _ = run_sweep(SaliencyObserver, TinyQwen3Moe().write(tmp_path / "2d"), rows)
    fused, _ = run_sweep(SaliencyObserver, TinyQwen3Moe(fused=True).write(tmp_path / "3d"), rows)
    for layer in apart.layers:
        np.testing.assert_array_equal(apart.layers[layer].reap_sum, fused.layers[layer].reap_sum)


@pytest.mark.parametrize("fused", [False, True])
def test_a_norm_that_overflows_names_layer_and_expert(fused: bool, tmp_path: Path) -> None:
    """The output is finite in float32, and its norm is not."""
    folder = TinyQwen3Moe(fused=fused, top_k=8).write(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    prefix = "model.layers.1.mlp.experts."
    if fused:
        tensors[prefix + "down_proj"][5] *= 1e23
    else:
        tensors[prefix + "5.down_proj.weight"] *= 1e23
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        ObservationError, match=r"layer 1: the norm of the output of expert 5 overflows float32"
    ):
        run_sweep(SaliencyObserver, folder, rows_of(16, 16))
