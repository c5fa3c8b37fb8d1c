"""What a build measures, and when."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from reap2gguf.building.evaluate_stage import Evaluate
from reap2gguf.building.needs.scoring import MOST_CHUNKS, chunks_to_score
from reap2gguf.building.pipeline import build
from reap2gguf.building.plan import make_plan
from reap2gguf.bundle.manifest import Manifest
from reap2gguf.options import BuildOptions, CalibrationOptions, ComputeOptions
from reap2gguf.progress import Silent
from reap2gguf.terminal.json_views import result_as_json
from reap2gguf.terminal.views import result_lines
from tests.tiny import TinyQwen3Moe


def options(model: Path, output: Path, **changes: Any) -> BuildOptions:
    return BuildOptions(
        recipes=("q8_0", "q4km"),
        model=str(model),
        output=output,
        name="tiny",
        keep_experts=6,
        calibration=CalibrationOptions(samples=4, max_length=64),
        compute=ComputeOptions(device="cpu"),
        **changes,
    )


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Score little text."""
    monkeypatch.setattr("reap2gguf.building.needs.scoring.MOST_CHUNKS", 2)
    monkeypatch.setattr("reap2gguf.building.evaluate_stage.CHUNK", 64)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return TinyQwen3Moe(vocab=4096).write(tmp_path / "model")


def test_how_much_is_scored() -> None:
    assert chunks_to_score("never", 10**9, 1) == 0
    assert chunks_to_score("always", 0, 100) == MOST_CHUNKS
    assert chunks_to_score("auto", 0, 1) == 0
    assert chunks_to_score("auto", 10**9, 4) == MOST_CHUNKS
    assert chunks_to_score("auto", 8 * 512 * 4 * 5, 4) == 8
    assert chunks_to_score("auto", 8 * 512 * 4 * 5 - 1, 4) == 0


@pytest.mark.usefixtures("few")
def test_a_build_measures_all_its_variants(model: Path, tmp_path: Path) -> None:
    result = build(make_plan(options(model, tmp_path / "out", evaluate="always")), Silent())
    assert result is not None
    found = result.manifest.evaluation
    assert found is not None
    shown = [line for line in result_lines(result) if line.startswith("  quality   ")]
    source, pruned, first, _ = shown
    assert source == (
        f"  quality   source: perplexity {found.variants[0].perplexity.value:.2f} ± "
        f"{found.variants[0].perplexity.error:.2f}"
    )
    (from_source,) = (one for one in found.comparisons if one.variant == "pruned")
    assert pruned.endswith(f", mean KL {from_source.divergence.mean.value:.4f} from source")
    assert first.startswith("  quality   tiny-Q8_0.gguf: perplexity ")
    assert " from source, " in first
    assert first.endswith(" from pruned")
    assert result_as_json(result)["evaluation"] == found.as_json()
    files = [record.file for record in result.manifest.gguf]
    assert [one.name for one in found.variants] == ["source", "pruned", *files]
    assert len(found.comparisons) == 1 + 2 * len(files)
    assert found.text is not None
    assert (found.text.label, found.text.n_chunks) == ("held-out", 2)
    assert Manifest.load(result.gguf_folder).evaluation == found
    assert "held-out" in (result.gguf_folder / "README.md").read_text()
    again = build(make_plan(options(model, tmp_path / "again", evaluate="always")), Silent())
    assert again is not None
    assert again.manifest == result.manifest


@pytest.mark.usefixtures("few")
def test_a_model_that_keeps_all_has_no_pruned_form(model: Path, tmp_path: Path) -> None:
    asked = options(model, tmp_path / "out", evaluate="always")
    whole = BuildOptions(
        recipes=asked.recipes,
        model=asked.model,
        output=asked.output,
        name="tiny",
        compression=0,
        calibration=asked.calibration,
        compute=asked.compute,
        evaluate="always",
    )
    result = build(make_plan(whole), Silent())
    assert result is not None
    assert result.manifest.evaluation is not None
    kinds = [one.kind for one in result.manifest.evaluation.variants]
    assert kinds == ["source", "gguf", "gguf"]


def test_little_text_is_not_measured_unasked(model: Path, tmp_path: Path) -> None:
    result = build(make_plan(options(model, tmp_path / "out")), Silent())
    assert result is not None
    assert result.manifest.evaluation is None
    manifest = json.loads((result.gguf_folder / "reap2gguf.json").read_text())
    assert manifest["options"]["evaluate"] == "auto"


class Killed(BaseException):
    """The build was stopped."""


@pytest.mark.usefixtures("few")
def test_a_build_killed_while_it_measures_goes_on(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = options(model, tmp_path / "out", evaluate="always")
    compute = Evaluate.compute

    def stop(stage: Evaluate) -> Any:
        raise Killed

    monkeypatch.setattr(Evaluate, "compute", stop)
    with pytest.raises(Killed):
        build(make_plan(asked), Silent())
    monkeypatch.setattr(Evaluate, "compute", compute)
    result = build(make_plan(asked), Silent())
    assert result is not None
    assert result.manifest.evaluation is not None
    reused = {stage.name: stage.reused for stage in result.stages}
    assert reused["verify"]
    assert not reused["evaluate"]
