"""Scores of weights alone against their formulas, written out on transformers' own model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from reap2gguf.checkpoint.checkpoint import Checkpoint
from reap2gguf.errors import CheckpointError
from reap2gguf.models.table import describe
from reap2gguf.progress import Silent
from reap2gguf.pruning import weight_scores as module
from reap2gguf.pruning.methods import FROM_WEIGHTS
from reap2gguf.pruning.select import Scores
from reap2gguf.pruning.weight_scores import weight_scores
from tests.quantized import as_fp8, as_packed
from tests.tiny import TinyQwen3Moe, TinyQwen35Moe

_PARTS = ("gate", "up", "down")


def found(folder: Path, method: str, n_threads: int = 1) -> dict[int, Scores]:
    with Checkpoint.open(folder) as checkpoint:
        return weight_scores(checkpoint, describe(checkpoint), method, Silent(), n_threads)


def expected(folder: Path, method: str) -> dict[int, list[float]]:
    """Expert by expert, in float64."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    scores: dict[int, list[float]] = {}
    for layer, block in enumerate(model.model.layers):
        if not hasattr(block.mlp, "experts"):
            continue
        experts, router = block.mlp.experts, block.mlp.gate.weight.detach().double()
        for expert in range(experts.num_experts):
            first = experts.gate_up_proj[expert].detach().double().flatten()
            down = experts.down_proj[expert].detach().double().flatten()
            if method == "aimer":
                every = torch.cat((first, down))
                rms = (every.square().sum() / len(every)).sqrt()
                score = 1 - every.abs().sum() / len(every) / rms
            else:
                score = first.norm() * down.norm() * router[expert].norm()
            scores.setdefault(layer, []).append(float(score))
    return scores


@pytest.mark.parametrize("method", FROM_WEIGHTS)
@pytest.mark.parametrize(
    "spec",
    [TinyQwen3Moe(), TinyQwen3Moe(fused=True), TinyQwen3Moe(n_layers=3, dense_layers=(1,))],
    ids=["2d", "3d", "dense layer"],
)
def test_scores_are_their_formulas(
    spec: TinyQwen3Moe, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = spec.write(tmp_path / "model")
    right = expected(folder, method)
    scores = found(folder, method)
    assert list(scores) == list(right)
    for layer, values in right.items():
        np.testing.assert_allclose(scores[layer], values, rtol=1e-10)
    monkeypatch.setattr(module, "_VALUES", 100)  # less than a matrix
    in_parts = found(folder, method, n_threads=3)
    for layer, values in right.items():
        np.testing.assert_allclose(in_parts[layer], values, rtol=1e-10)
        np.testing.assert_array_equal(in_parts[layer], found(folder, method, 2)[layer])


@pytest.mark.parametrize("method", FROM_WEIGHTS)
def test_storage_of_experts_does_not_matter(method: str, tmp_path: Path) -> None:
    apart = found(TinyQwen3Moe().write(tmp_path / "2d"), method)
    fused = found(TinyQwen3Moe(fused=True).write(tmp_path / "3d"), method)
    for layer, scores in apart.items():
        np.testing.assert_allclose(fused[layer], scores, rtol=1e-12)


@pytest.mark.parametrize("method", FROM_WEIGHTS)
def test_the_block_of_multi_token_prediction_has_scores(method: str, tmp_path: Path) -> None:
    spec = TinyQwen35Moe()
    scores = found(spec.write(tmp_path / "model"), method)
    n_layers = len(spec.layers)
    assert list(scores) == [*range(n_layers), n_layers]
    assert all(len(set(values.tolist())) == spec.n_experts for values in scores.values())


QUANTIZED = [as_fp8(TinyQwen3Moe(), (24, 20)), as_packed(TinyQwen3Moe())]


@pytest.mark.parametrize("method", FROM_WEIGHTS)
@pytest.mark.parametrize("case", QUANTIZED, ids=lambda case: case.scheme)
def test_quantized_weights_are_decoded(case: Any, method: str, tmp_path: Path) -> None:
    folder = case.write(tmp_path / "model")
    scores = found(folder, method)
    with Checkpoint.open(folder) as opened:
        for layer, values in scores.items():
            prefix = f"model.layers.{layer}.mlp."
            router = opened.read_float32(prefix + "gate.weight").astype(np.float64)
            for expert, score in enumerate(values):
                names = [f"{prefix}experts.{expert}.{part}_proj.weight" for part in _PARTS]
                gate, up, down = (opened.read_float32(one).astype(np.float64) for one in names)
                every = np.concatenate([gate.ravel(), up.ravel(), down.ravel()])
                right = 1 - np.abs(every).mean() / np.sqrt(np.square(every).mean())
                if method == "weight_norms":
                    first = np.hypot(np.linalg.norm(gate), np.linalg.norm(up))
                    right = first * np.linalg.norm(down) * np.linalg.norm(router[expert])
                assert score == pytest.approx(right, rel=1e-9)


def changed(folder: Path, expert: int, value: float) -> None:
    """Set all weights of an expert of layer 1."""
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if name.startswith(f"model.layers.1.mlp.experts.{expert}."):
            tensor.fill_(value)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("method", FROM_WEIGHTS)
def test_an_expert_of_zeros_has_the_lowest_score(method: str, tmp_path: Path) -> None:
    folder = TinyQwen3Moe().write(tmp_path / "model")
    changed(folder, 3, 0.0)
    scores = found(folder, method)
    assert scores[1][3] == 0 < np.delete(scores[1], 3).min()


def test_equal_magnitudes_have_an_aimer_of_one(tmp_path: Path) -> None:
    folder = TinyQwen3Moe().write(tmp_path / "model")
    changed(folder, 3, -0.25)
    assert found(folder, "aimer")[1][3] == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("method", FROM_WEIGHTS)
def test_weights_that_are_not_finite_are_named(method: str, tmp_path: Path) -> None:
    folder = TinyQwen3Moe().write(tmp_path / "model")
    changed(folder, 3, float("nan"))
    with pytest.raises(CheckpointError, match="layer 1: the weights of expert 3 are not finite"):
        found(folder, method)
