"""Experts against bits: what each number of experts costs, and which one is best."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import reap2gguf
from reap2gguf.cli import cli
from reap2gguf.errors import ArtifactError, OutputError, UsageError
from reap2gguf.fitting import errors_table, trading
from reap2gguf.fitting.probing import Probing
from reap2gguf.gguf_files.imatrix import save_gguf
from reap2gguf.options import CalibrationOptions, ComputeOptions
from tests.building.builds import PROSE
from tests.exporting.files import gguf_tensors, random_imatrix
from tests.test_cli import one_line, run
from tests.tiny import TinyQwen3Moe

CPU = ComputeOptions(device="cpu", threads=2)
SIZE = 190_000
COUNTS = (8, 6, 4)


@dataclass(frozen=True)
class Parts:
    model: Path
    observations: Path
    imatrix: Path

    def weigh(self, **changes: Any) -> reap2gguf.BudgetResult:
        values: dict[str, Any] = {
            "observations": self.observations,
            "imatrix": self.imatrix,
            "keep_experts": COUNTS,
            "target_size": SIZE,
            "chunks": 3,
            "compute": CPU,
        }
        return reap2gguf.weigh_budget(self.model, **values | changes)


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Parts:
    folder = tmp_path_factory.mktemp("trading")
    model = TinyQwen3Moe().write(folder / "tiny")
    observations, imatrix = folder / "o.safetensors", folder / "i.gguf"
    texts = CalibrationOptions(str(PROSE), samples=4, max_length=128)
    reap2gguf.observe(model, observations, calibration=texts, compute=CPU)
    save_gguf(random_imatrix(gguf_tensors(model)), imatrix)
    return Parts(model, observations, imatrix)


@pytest.fixture(scope="module")
def weighed(parts: Parts) -> reap2gguf.BudgetResult:
    return parts.weigh()


def test_both_parts_of_the_damage(weighed: reap2gguf.BudgetResult) -> None:
    whole, most, half = weighed.candidates
    assert [one.n_experts for one in weighed.candidates] == [8, 6, 4]
    assert (whole.pruning, whole.pruning_error) == (0, 0)
    assert 0 < most.pruning < half.pruning
    assert 0 < most.pruning_error < half.pruning
    quantizing = [one.quantizing for one in weighed.candidates]
    assert None not in quantizing
    assert quantizing == sorted(quantizing, reverse=True)  # fewer experts have more bits
    bits = [one.bits_per_weight for one in weighed.candidates]
    assert bits == sorted(bits)
    for one in weighed.candidates:
        assert one.n_bytes is not None
        assert one.n_bytes <= SIZE
        assert one.quantizing is not None
        assert one.damage == one.pruning + one.quantizing
    assert weighed.best.damage == min(one.damage for one in weighed.candidates)
    assert weighed.n_scored == 3 * 255


def test_pruning_costs_what_evaluate_measures(
    parts: Parts, weighed: reap2gguf.BudgetResult, tmp_path: Path
) -> None:
    reap2gguf.prune(parts.model, parts.observations, tmp_path / "pruned", keep_experts=6)
    options = reap2gguf.EvaluateOptions(text="held-out", chunks=3)
    found = reap2gguf.evaluate(parts.model, tmp_path / "pruned", options=options, compute=CPU)
    (apart,) = found.comparisons
    assert weighed.candidates[1].pruning == pytest.approx(apart.divergence.mean.value, rel=1e-6)


def test_quantizing_costs_what_a_recipe_for_the_pruned_model_does(
    parts: Parts, weighed: reap2gguf.BudgetResult, tmp_path: Path
) -> None:
    folder, cut = tmp_path / "pruned", tmp_path / "cut.gguf"
    reap2gguf.prune(parts.model, parts.observations, folder, keep_experts=6)
    reap2gguf.slice_imatrix(parts.imatrix, folder, cut)
    bits = weighed.candidates[1].bits_per_weight
    assert bits is not None
    found = reap2gguf.fit_recipe(
        folder, tmp_path / "x.toml", imatrix=cut, target_bpw=bits + 1e-6, sensitivity="table"
    )
    assert found.bits_per_weight == bits


def test_tensors_without_experts_are_measured_once(
    parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure, names = errors_table._measure_one, list[str]()

    def counted(host: Any, making: Any, tensor: Any, types: Any) -> Any:
        names.append(tensor.name)
        return measure(host, making, tensor, types)

    monkeypatch.setattr(errors_table, "_measure_one", counted)
    parts.weigh()
    assert names.count("blk.0.attn_q.weight") == 1
    assert names.count("blk.0.ffn_up_exps.weight") == 3


def test_measured_sensitivities_weigh_the_same_errors(
    parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of all experts it is what `fit` makes with the weights that are measured on the source; of
    fewer it is the same with errors of the view."""
    asked: list[Any] = []
    sensitivities, chosen = Probing.sensitivities, trading.fit

    def measured(self: Probing, problem: Any, errors: Any, progress: Any) -> Any:
        asked.append(sensitivities(self, problem, errors, progress))
        return asked[-1]

    def fitted(*arguments: Any) -> Any:
        asked.append(arguments[-1])
        return chosen(*arguments)

    monkeypatch.setattr(Probing, "sensitivities", measured)
    monkeypatch.setattr(trading, "fit", fitted)
    found = parts.weigh(sensitivity="measured", cache=tmp_path, keep_experts=(8, 6))
    assert len(asked) == 3  # measured once, for both numbers
    assert asked[0] == asked[1] == asked[2]
    by_table = parts.weigh(keep_experts=(8, 6))
    for one, other in zip(found.candidates, by_table.candidates, strict=True):
        assert one.pruning == other.pruning
        assert one.quantizing != other.quantizing
    assert asked[3] is None


def test_what_was_measured_is_that_of_recipes_fit(
    parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(OutputError, match="create it first"):
        parts.weigh(sensitivity="measured", cache=tmp_path / "kept")
    (tmp_path / "kept").mkdir()
    parts.weigh(sensitivity="measured", cache=tmp_path / "kept", keep_experts=(6,))
    (kept,) = (tmp_path / "kept").iterdir()
    assert kept.name == "tiny.sensitivities.json"
    before = kept.read_bytes()
    monkeypatch.setattr(Probing, "_measured", lambda *_: pytest.fail("measured again"))
    recipe = tmp_path / "kept" / "x.toml"
    reap2gguf.fit_recipe(
        parts.model, recipe, imatrix=parts.imatrix, target_size=SIZE, device="cpu", threads=2
    )
    parts.weigh(sensitivity="measured", cache=tmp_path / "kept", keep_experts=(8, 4))
    assert kept.read_bytes() == before


def test_nothing_is_written_without_a_cache(parts: Parts) -> None:
    before = {*parts.model.parent.rglob("*")}
    parts.weigh(sensitivity="measured", keep_experts=(6,), chunks=2)
    assert {*parts.model.parent.rglob("*")} == before


def test_what_does_not_fit_is_said(parts: Parts) -> None:
    found = parts.weigh(target_size=125_000, chunks=2)
    whole = found.candidates[0]
    assert whole.quantizing is None
    assert "pass at least --target-size" in whole.problem
    assert found.best.n_experts < 8
    with pytest.raises(UsageError, match="pass at least --target-size"):
        parts.weigh(target_size=1000)


def test_what_is_refused(parts: Parts, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="the model has 8 experts"):
        parts.weigh(keep_experts=(9,))
    with pytest.raises(UsageError, match="keep_experts is empty"):
        parts.weigh(keep_experts=())
    with pytest.raises(UsageError, match="pass a target"):
        parts.weigh(target_size=None)
    with pytest.raises(UsageError, match="sensitivity is 'guessed'"):
        parts.weigh(sensitivity="guessed")
    other = TinyQwen3Moe(seed=1).write(tmp_path / "other")
    with pytest.raises(ArtifactError, match="of another checkpoint"):
        Parts(other, parts.observations, parts.imatrix).weigh()


def test_the_command(parts: Parts) -> None:
    base = ["recipes", "budget", parts.model, "--observations", parts.observations]
    base += ["--imatrix", parts.imatrix, "--chunks", "2", "--device", "cpu"]
    base += ["--sensitivity", "table"]
    sized = [*base, "--target-size", "125000B"]
    text = run(*sized).output
    assert "does not fit" in text
    assert text.count("best") == 1
    result = CliRunner().invoke(cli, [str(one) for one in [*sized, "--json"]])
    found = json.loads(result.stdout)
    assert [one["n_experts"] for one in found["candidates"]] == [8, 7, 6, 5, 4]
    assert f"--keep-experts {found['best']}" in text
    assert found["candidates"][0]["damage"] is None
    one_line(run(*base), "pass one of --target-size")
    one_line(run(*sized, "--keep-experts", "8;4"), "not a list of numbers")
