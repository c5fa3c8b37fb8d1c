"""The sums of experts against REAP's formula, written out on transformers' own model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from reap2gguf.errors import ObservationError
from reap2gguf.observing.saliency import SaliencyObserver
from reap2gguf.pruning.select import CRITERIA
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
        for part in fields(seen):
            found, right = getattr(seen, part.name), getattr(expected, part.name)
            np.testing.assert_allclose(found, right, rtol=2e-5, atol=1e-9)


# by name, the score of an expert from its tokens' gate weights and the norms of its outputs
NAIVE = {
    "reap": lambda g, n: mean(a * b for a, b in zip(g, n, strict=True)),
    "frequency": lambda g, n: len(n),
    "ean_sum": lambda g, n: sum(n),
    "ean_mean": lambda g, n: mean(n),
    "weighted_ean_sum": lambda g, n: sum(a * b for a, b in zip(g, n, strict=True)),
    "weighted_frequency": lambda g, n: sum(g),
    "mix25": lambda g, n: NAIVE["reap"](g, n) * len(n) ** 0.25,
    "mix50": lambda g, n: NAIVE["reap"](g, n) * len(n) ** 0.5,
    "mix75": lambda g, n: NAIVE["reap"](g, n) * len(n) ** 0.75,
    "gate_mean": lambda g, n: mean(g),
    "gate2_sum": lambda g, n: sum(a * a for a in g),
    "gate2_mean": lambda g, n: mean(a * a for a in g),
    "norm2_sum": lambda g, n: sum(b * b for b in n),
    "msan": lambda g, n: mean(b * b for b in n),
    "gate2_norm_sum": lambda g, n: sum(a * a * b for a, b in zip(g, n, strict=True)),
    "gate2_norm_mean": lambda g, n: mean(a * a * b for a, b in zip(g, n, strict=True)),
    "gate_norm2_sum": lambda g, n: sum(a * b * b for a, b in zip(g, n, strict=True)),
    "gate_norm2_mean": lambda g, n: mean(a * b * b for a, b in zip(g, n, strict=True)),
    "gate2_norm2_sum": lambda g, n: sum((a * b) ** 2 for a, b in zip(g, n, strict=True)),
    "gate2_norm2_mean": lambda g, n: mean((a * b) ** 2 for a, b in zip(g, n, strict=True)),
}


def mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found) if found else 0.0


def test_every_criterion_is_its_formula_in_float64(tmp_path: Path) -> None:
    """A model in float64, token by token, against the sums of a sweep in float32."""
    folder = TinyQwen3Moe().write(tmp_path / "model")
    rows = rows_of(40, 40, 23, 7)
    observer, _ = run_sweep(SaliencyObserver, folder, rows)
    witness = Witness(folder, rows, torch.float64)
    assert list(NAIVE) == list(CRITERIA)
    for layer, seen in observer.layers.items():
        pairs = witness.gates_and_norms(layer)
        for name, score in NAIVE.items():
            expected = [score(gates, norms) for gates, norms in pairs]
            found = CRITERIA[name](seen)
            np.testing.assert_allclose(found, expected, rtol=5e-5, atol=1e-9, err_msg=name)


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
