"""Whole repairs of tiny models, against transformers and numpy, and interrupted ones."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from reap2gguf.errors import UsageError
from reap2gguf.observing import state
from reap2gguf.options import Resume
from reap2gguf.progress import Silent
from reap2gguf.pruning.replaced import ReplacedView
from reap2gguf.pruning.view import PrunedView
from reap2gguf.pruning.write import write_pruned
from reap2gguf.repairing.fit import LayerFit
from reap2gguf.repairing.gram_size import WAYS
from reap2gguf.repairing.limits import LEAST_ROWS, repaired_layers
from reap2gguf.repairing.record import RepairFolder
from tests.families import (
    deepseek,
    gemma,
    glm,
    granite,
    kimi_linear,
    lfm2,
    mixtral,
    nemotron,
    olmoe,
    qwen2,
    qwen3_next,
)
from tests.repairing.repairs import CPU, files, pruned_view, repaired, rows_of, values
from tests.repairing.witness import Expected, calls, expected_repair, targets
from tests.tiny import TinyQwen3Moe, TinyQwen35Moe

ROWS = rows_of()
IS_HELD = np.repeat(np.arange(len(ROWS)) % 8 == 7, len(ROWS[0]))
MODELS: dict[str, Any] = {
    "qwen3": TinyQwen3Moe(),
    "qwen3 fused, a dense layer first": TinyQwen3Moe(n_layers=3, fused=True, dense_layers=(0,)),
    "qwen3 float32": TinyQwen3Moe(dtype=torch.float32),
    "qwen3.5 with MTP and a shared expert": TinyQwen35Moe(),
}


def first_of(module: Any) -> dict[str, Any]:
    return {
        architecture: next(iter(layouts.values()))
        for architecture, layouts in module.LAYOUTS.items()
    }


for family in (
    *(deepseek, gemma, glm, granite, kimi_linear, lfm2),
    *(mixtral, nemotron, olmoe, qwen2, qwen3_next),
):
    MODELS |= first_of(family)


FAST = ("qwen3", "qwen3.5 with MTP and a shared expert", "DeepseekV3ForCausalLM")


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[] if n in FAST else [pytest.mark.slow]) for n in MODELS],
)
def test_a_repair_is_the_ridge_regression_of_what_transformers_computes(
    name: str, tmp_path: Path
) -> None:
    source, written = MODELS[name].write(tmp_path / "model"), tmp_path / "repaired"
    with pruned_view(source) as view:
        found, folder = repaired(view, tmp_path / "repair")
        layers = repaired_layers(view.model)
        assert list(found) == layers
        with folder.open(layers) as stored:
            after = ReplacedView(view, stored)
            written.mkdir()
            write_pruned(after, written, Silent())
            for layer in (layers[0], layers[-1]):
                path = f"{layer}.{view.model.experts_path(layer)}"
                # in transformers, the layers before have their new weights
                pruned = calls(written, ROWS, path)
                target = targets(source, pruned, path)
                expected = expected_repair(target, pruned, down_of(view, layer), IS_HELD)
                is_bfloat16 = "BF16" in {view.tensors[name].dtype for name in stored.tensors}
                compare(found[layer].facts, down_of(after, layer), expected, is_bfloat16)


def down_of(view: PrunedView, layer: int) -> np.ndarray:
    """The stored `down_proj` of a layer, (E, H, F)."""
    slabs = view.model.expert_tensors(layer, view.tensors)["down"].slabs
    matrices = [(view.read_float32(slab.stored, index=slab.index), slab) for slab in slabs]
    return np.stack([one.T if slab.transposed else one for one, slab in matrices]).astype(float)


def compare(fit: LayerFit, down: np.ndarray, expected: Expected, is_bfloat16: bool) -> None:
    assert fit.alpha is not None
    assert fit.error_before == pytest.approx(expected.before, rel=1e-4)
    # the strongest of those that take 95 % off the squared error of what the best one takes off
    falls = {alpha: expected.before**2 - error**2 for alpha, error in expected.after.items()}
    assert fit.alpha == max(a for a, fall in falls.items() if fall >= 0.95 * max(falls.values()))
    assert fit.error_after == pytest.approx(expected.after[fit.alpha], rel=2e-3)
    # within half a unit in the last place of what is stored, and the rounding of float32 inputs
    unit = 2.0**-8 if is_bfloat16 else 1e-5
    wanted = expected.down[fit.alpha]
    assert (np.abs(down - wanted) <= unit * np.abs(wanted) + 2e-5).mean() > 0.999


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return TinyQwen3Moe(n_layers=3).write(tmp_path_factory.mktemp("repair") / "model")


def test_every_way_of_holding_the_gram_matrix_gives_the_same_weights(
    source: Path, tmp_path: Path
) -> None:
    found = {}
    with pruned_view(source) as view:
        for way in WAYS:
            _, folder = repaired(view, tmp_path / way, way=way)
            with folder.open(repaired_layers(view.model)) as stored:
                found[way] = values(stored)
    first = found["device"]
    for other in found.values():
        assert other.keys() == first.keys()
        for name, tensor in first.items():
            # values that lie between two of bfloat16 may go to either
            differs = tensor != other[name]
            assert differs.float().mean() < 1e-3
            assert torch.allclose(tensor, other[name], rtol=2**-7)


@pytest.mark.parametrize("kind", ["ridge", "scale"])
def test_two_runs_and_any_number_of_threads_give_the_same_bytes(
    kind: str, source: Path, tmp_path: Path
) -> None:
    made = []
    with pruned_view(source) as view:
        for number, n_threads in enumerate((2, 2, 1)):
            options = replace(CPU, threads=n_threads)
            _, folder = repaired(view, tmp_path / str(number), kind=kind, options=options)
            made.append(files(folder))
    assert made[0] == made[1] == made[2]
    assert len(made[0]) == 3


@pytest.mark.parametrize("spool", ["device", "disk"])
@pytest.mark.parametrize("keeps_states", [True, False])
def test_an_interrupted_repair_goes_on_to_the_same_bytes(
    spool: str,
    keeps_states: bool,
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(state, "MOST_OF_TIME", 1e9)  # every layer is worth saving
    resume = Resume(tmp_path / "state", "key") if keeps_states else None
    options = replace(CPU, spool=spool, scratch=tmp_path, resume=resume)
    save, fitted = RepairFolder.save, []

    def stop_at(layer: int | None) -> None:
        def counted(self: RepairFolder, index: int, *rest: Any) -> Any:
            if index == layer:
                raise KeyboardInterrupt
            fitted.append(index)
            return save(self, index, *rest)

        monkeypatch.setattr(RepairFolder, "save", counted)

    with pruned_view(source) as view:
        stop_at(None)
        _, whole = repaired(view, tmp_path / "whole")
        fitted.clear()
        for layer in (1, 2):
            stop_at(layer)
            with pytest.raises(KeyboardInterrupt):
                repaired(view, tmp_path / "stopped", options=options)
        stop_at(None)
        _, folder = repaired(view, tmp_path / "stopped", options=options)
    assert fitted == [0, 1, 2]
    assert files(folder) == files(whole)


def test_a_damaged_file_of_a_layer_is_made_again(source: Path, tmp_path: Path) -> None:
    with pruned_view(source) as view:
        _, folder = repaired(view, tmp_path / "repair")
        before = files(folder)
        damaged = bytearray(folder.file(1).read_bytes())
        damaged[-1] ^= 1
        folder.file(1).write_bytes(damaged)
        repaired(view, tmp_path / "repair")
        assert files(folder) == before


def test_rows_of_other_lengths_are_padded_and_the_padding_does_not_count(
    source: Path, tmp_path: Path
) -> None:
    rows = [row[: 20 + number] for number, row in enumerate(ROWS[:24])]
    with pruned_view(source) as view:
        found, _ = repaired(view, tmp_path / "repair", rows)
    fit = found[0].facts
    # batches go from the longest row to the shortest; every eighth of them is held out
    longest_first = sorted((len(row) for row in rows), reverse=True)
    assert fit.n_held_out == sum(longest_first[7::8])
    assert fit.n_fitted == sum(longest_first) - fit.n_held_out


def test_with_all_experts_nothing_is_wrong_and_nothing_changes(
    source: Path, tmp_path: Path
) -> None:
    with pruned_view(source, step=1) as view:
        found, folder = repaired(view, tmp_path / "repair")
        with folder.open(repaired_layers(view.model)) as stored:
            assert not stored.tensors
    assert all(one.facts.alpha is None for one in found.values())
    assert all(one.facts.error_before == 0 for one in found.values())


def test_too_few_rows_are_refused(source: Path, tmp_path: Path) -> None:
    with (
        pruned_view(source) as view,
        pytest.raises(UsageError, match=f"expected at least {LEAST_ROWS}"),
    ):
        repaired(view, tmp_path / "repair", ROWS[: LEAST_ROWS - 1])
