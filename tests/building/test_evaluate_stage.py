"""What a build measures, and when."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from reap2gguf.building.evaluate_stage import Evaluate
from reap2gguf.building.needs.memory import evaluation_needs
from reap2gguf.building.needs.room import room_needs
from reap2gguf.building.needs.scoring import MOST_CHUNKS, chunks_to_score
from reap2gguf.building.pipeline import build
from reap2gguf.building.plan import make_plan
from reap2gguf.bundle.manifest import Manifest
from reap2gguf.errors import OutputError
from reap2gguf.observing import spool
from reap2gguf.observing.budget import Budget, Need, fit, layer_bytes
from reap2gguf.options import BuildOptions, CalibrationOptions, ComputeOptions
from reap2gguf.progress import Silent
from reap2gguf.terminal.json_views import result_as_json
from reap2gguf.terminal.views import result_lines
from tests.building.needs.machines import H100, LAPTOP, laptop, needs_on
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


@pytest.mark.usefixtures("few")
def test_a_plan_decides_like_the_stage(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By headers alone, and by the decoders of all variants."""
    needs: list[Need] = []

    def noted(need: Need, *others: Any) -> Budget:
        needs.append(need)
        return fit(need, *others)

    monkeypatch.setattr("reap2gguf.building.needs.memory.CHUNK", 64)
    monkeypatch.setattr("reap2gguf.building.needs.memory.fit", noted)
    monkeypatch.setattr("reap2gguf.evaluating.engine.fit", noted)
    plan = make_plan(options(model, tmp_path / "out", evaluate="always"))
    found = needs_on(plan)
    assert found.evaluation is not None
    assert found.memory_bytes >= found.evaluation.host_bytes
    planned = needs[-1]
    build(plan, Silent())
    measured = needs[-1]
    assert replace(planned, layer=0) == replace(measured, layer=0)
    # some values stay float32 in any type
    assert planned.layer == pytest.approx(measured.layer, rel=0.001)
    view = max(layer_bytes(plan.model, plan.checkpoint.tensors, 4, on_gpu=False).values())
    assert planned.layer > view  # that of a file: its weights are float32, and the source's are not
    never = needs_on(make_plan(options(model, tmp_path / "out", evaluate="never")))
    assert never.evaluation is None


def test_more_text_takes_more_memory(model: Path, tmp_path: Path) -> None:
    plan = make_plan(options(model, tmp_path / "out", evaluate="always"))
    found = needs_on(plan)
    few, many = (evaluation_needs(plan, found.sizes, n, LAPTOP) for n in (64, 6400))
    assert few is not None
    assert many is not None
    states = 6336 * 512 * plan.n_variants * plan.model.facts.hidden_size * 4
    assert many.hidden_bytes - few.hidden_bytes == states
    assert (few.spool_bytes, many.host_bytes - few.host_bytes) == (0, states)
    on_disk = evaluation_needs(plan, found.sizes, 64_000, LAPTOP)
    assert on_disk is not None
    assert on_disk.spool_bytes == on_disk.hidden_bytes
    assert on_disk.host_bytes < many.host_bytes
    no_room = evaluation_needs(plan, found.sizes, 64, laptop(memory_free_bytes=520 * 2**20))
    assert no_room is not None
    assert "not enough memory" in no_room.problem


def test_on_a_gpu_the_heads_take_what_is_free(model: Path, tmp_path: Path) -> None:
    compute = ComputeOptions("cuda")
    plan = make_plan(replace(options(model, tmp_path / "out", evaluate="always"), compute=compute))
    needs = needs_on(plan, H100)
    assert needs.evaluation is not None
    vocabulary, n_variants = plan.model.facts.vocab_size, plan.n_variants
    assert needs.gpu_memory_bytes >= 4 * (n_variants + 2) * 4096 * vocabulary
    assert needs.gpu_memory_bytes >= needs.evaluation.device_bytes


@pytest.mark.usefixtures("few")
def test_hidden_states_that_wait_on_the_disk_are_counted_by_plan_and_build(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of all variants, beside all that the build has made by then."""
    monkeypatch.setattr("reap2gguf.building.needs.memory.CHUNK", 64)
    on_disk = ComputeOptions("cpu", spool="disk")
    plan = make_plan(replace(options(model, tmp_path / "out", evaluate="always"), compute=on_disk))
    needed, checked = needs_on(plan).disk, room_needs(plan)
    assert needed.scoring == checked.scoring > 0
    assert needed.room_bytes == needed.final_bytes + needed.scoring
    assert checked.room_bytes == checked.final_bytes + checked.scoring
    assert needs_on(plan).peak_bytes >= needed.room_bytes
    assert not needs_on(plan, laptop(disk_free_bytes=needed.room_bytes)).lacks_disk
    assert needs_on(plan, laptop(disk_free_bytes=needed.room_bytes - 1)).lacks_disk

    made: list[int] = []

    def reserved(folder: Path, n_bytes: int) -> BinaryIO:
        made.append(n_bytes)
        return reserve(folder, n_bytes)

    reserve = spool._reserve
    monkeypatch.setattr(spool, "_reserve", reserved)
    usage = shutil.disk_usage(tmp_path)
    little = usage._replace(free=checked.room_bytes - 1)
    with monkeypatch.context() as patch:
        patch.setattr("reap2gguf.building.workdir.shutil.disk_usage", lambda path: little)
        with pytest.raises(OutputError, match=f"the build writes {checked.room_bytes:,} bytes"):
            build(plan, Silent())
    assert not made
    build(make_plan(plan.options), Silent())
    assert sum(made[plan.n_sweeps :]) == needed.scoring
