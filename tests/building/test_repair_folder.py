"""`prune` with a repair: the folder, its record, and its verification."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import reap2gguf
from reap2gguf.building.bundle_options import BundleOptions
from reap2gguf.building.bundling import bundle
from reap2gguf.bundle.layout import KEPT_FILE
from reap2gguf.errors import OutputError, UsageError
from reap2gguf.options import CalibrationOptions, ComputeOptions
from reap2gguf.progress import Silent
from reap2gguf.repairing.record import RepairFolder
from tests.building.builds import PROSE
from tests.tiny import TinyQwen3Moe

CALIBRATION = CalibrationOptions(str(PROSE), samples=24, max_length=64)
CPU = ComputeOptions(device="cpu")
REPAIR: dict[str, Any] = {"keep_experts": 4, "calibration": CALIBRATION, "compute": CPU}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return TinyQwen3Moe().write(tmp_path_factory.mktemp("repair") / "tiny")


@pytest.fixture(scope="module")
def seen(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("seen") / "observations.safetensors"
    reap2gguf.observe(model, path, calibration=CALIBRATION, compute=CPU)
    return path


def prune(model: Path, seen: Path, output: Path, repair: str = "ridge") -> dict[str, bytes]:
    """Every file of a folder that `prune` writes."""
    reap2gguf.prune(model, seen, output, repair=repair, **REPAIR)
    return {file.name: file.read_bytes() for file in output.iterdir()}


def test_a_repaired_folder_is_verified_by_its_record(
    model: Path, seen: Path, tmp_path: Path
) -> None:
    output = tmp_path / "pruned"
    files = prune(model, seen, output)
    record = json.loads(files[KEPT_FILE])["repair"]
    assert record["kind"] == "ridge"
    assert b"repaired" in files["README.md"]
    report = reap2gguf.verify(output, source=str(model))
    assert not report.violations
    assert any("repair of the experts is not computed again" in n for n in report.not_checked)
    # one value of a repaired matrix is another
    tensors = load_file(output / "model.safetensors")
    name = next(name for name in tensors if "down_proj" in name)
    tensors[name][0, 0] += 1
    save_file(tensors, output / "model.safetensors", {"format": "pt"})
    violations = reap2gguf.verify(output, source=str(model)).violations
    assert any("is not what the repair gave" in line for line in violations)
    (violation,) = reap2gguf.verify(output).violations  # the record's hashes are enough
    assert "is not what the repair gave" in violation


@pytest.mark.parametrize("layer", [0, 1])
def test_an_interrupted_repair_goes_on_to_the_same_bytes(
    layer: int, model: Path, seen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "whole").mkdir()
    whole = prune(model, seen, tmp_path / "whole" / "pruned")
    save = RepairFolder.save

    def stop(self: RepairFolder, index: int, *rest: Any) -> Any:
        if index == layer:
            raise KeyboardInterrupt
        return save(self, index, *rest)

    output = tmp_path / "pruned"
    with monkeypatch.context() as patch:
        patch.setattr(RepairFolder, "save", stop)
        with pytest.raises(KeyboardInterrupt):
            prune(model, seen, output)
    assert not output.exists()
    assert prune(model, seen, output) == whole
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pruned", "whole"]


def test_what_cannot_be_repaired_is_refused(model: Path, seen: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nothing to repair"):
        reap2gguf.prune(model, seen, tmp_path / "all", repair="scale", keep_experts=8)
    with pytest.raises(UsageError, match="repair is 'much', expected one of none, ridge, scale"):
        prune(model, seen, tmp_path / "much", repair="much")
    (tmp_path / "there").mkdir()
    with pytest.raises(OutputError, match="exists already"):
        prune(model, seen, tmp_path / "there")


def test_a_repaired_folder_is_no_part_of_a_bundle(model: Path, seen: Path, tmp_path: Path) -> None:
    prune(model, seen, tmp_path / "pruned")
    asked = BundleOptions(tmp_path / "pruned", (tmp_path / "some.gguf",), source=str(model))
    with pytest.raises(UsageError, match="its experts were repaired, which `bundle` cannot record"):
        bundle(asked, Silent())
