"""Bundles of what single commands made."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import reap2gguf
from reap2gguf.building.likeness import read_likeness
from reap2gguf.building.stage import BuildResult
from reap2gguf.building.workdir import Workdir
from reap2gguf.bundle.manifest import Manifest
from reap2gguf.bundle.opening import open_bundle
from reap2gguf.cli import cli
from reap2gguf.errors import (
    ArtifactError,
    OutputError,
    Reap2ggufError,
    UsageError,
    VerificationError,
)
from reap2gguf.options import CalibrationOptions, ComputeOptions
from reap2gguf.progress import Silent
from reap2gguf.verifying.bundle import check_bundle
from reap2gguf.verifying.report import VerifyReport
from tests.building.builds import PROSE
from tests.tiny import TinyQwen3Moe, TinyQwen35Moe

CPU = ComputeOptions(device="cpu")


@dataclass(frozen=True)
class Made:
    """What the single commands left in one folder."""

    folder: Path
    source: Path

    @property
    def pruned(self) -> Path:
        return self.folder / "pruned"

    @property
    def files(self) -> tuple[Path, ...]:
        return self.folder / "pruned-Q8_0.gguf", self.folder / "pruned-mine.gguf"

    @property
    def all(self) -> dict[str, Any]:
        return {
            "source": self.source,
            "imatrix": self.folder / "i.gguf",
            "observations": self.folder / "obs.safetensors",
            "text": PROSE,
        }

    def bundle(self, output: Path, **changes: Any) -> BuildResult:
        given = {**self.all, **changes}
        return reap2gguf.make_bundle(self.pruned, *self.files, output=output, **given)


def make(model: Path, folder: Path) -> Made:
    made = Made(folder, model)
    observations = folder / "obs.safetensors"
    calibration = CalibrationOptions(str(PROSE), samples=4, max_length=128)
    reap2gguf.observe(model, observations, calibration=calibration, compute=CPU)
    reap2gguf.prune(model, observations, made.pruned, compression=0.25)
    imatrix = folder / "i.gguf"
    reap2gguf.imatrix(made.pruned, PROSE, imatrix, chunk=128, compute=CPU)
    for recipe, file in zip(("q8_0", "bf16"), made.files, strict=True):
        reap2gguf.quantize(made.pruned, recipe, file, imatrix=imatrix)
    return made


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("made")
    return make(TinyQwen3Moe().write(folder / "tiny"), folder)


def verified(result: BuildResult, source: Path | None) -> VerifyReport:
    report = reap2gguf.verify(result.gguf_folder, source=source)
    assert report.violations == ()
    return report


def test_verify_and_push_take_it(made: Made, tmp_path: Path) -> None:
    before = {file: file.read_bytes() for file in made.folder.rglob("*") if file.is_file()}
    result = made.bundle(tmp_path / "out", name="model")
    assert result.hf_folder == tmp_path / "out" / "model"
    assert {file.name for file in result.gguf_folder.iterdir()} == {
        "README.md", "Modelfile", "SHA256SUMS", "bits.png", "calibration.txt", "imatrix.dat",
        "imatrix.gguf", "model-Q8_0.gguf", "model-BF16.gguf", "observations.safetensors",
        "reap2gguf.json", "saliency.png", "usage.png",
    }  # fmt: skip
    assert "kept_experts.json" not in {file.name for file in result.hf_folder.iterdir()}
    verified(result, None)
    verified(result, made.source)
    check_bundle(open_bundle(result.gguf_folder), 2, Silent())
    assert (result.gguf_folder / "model-Q8_0.gguf").samefile(made.files[0])
    for file, content in before.items():
        assert file.read_bytes() == content
    assert not (tmp_path / "out" / ".work" / ".model.adding").exists()


def test_what_is_known_is_recorded(made: Made, tmp_path: Path) -> None:
    manifest = made.bundle(tmp_path / "out").manifest
    assert Manifest.load(tmp_path / "out" / "pruned") == manifest
    assert manifest.name == "pruned"
    assert manifest.source.label == "tiny"
    pruning, calibration = manifest.pruning, manifest.calibration
    assert (pruning.method, pruning.n_experts, pruning.n_kept) == ("reap", 8, 6)
    assert pruning.observations_file == "obs.safetensors"
    assert pruning.n_tokens > 0
    assert calibration.imatrix_file == "i.gguf"
    assert calibration.imatrix_text == PROSE.name
    assert [record.label for record in manifest.gguf] == ["Q8_0", "mine"]
    card = (tmp_path / "out" / "pruned-GGUF" / "README.md").read_text()
    assert "`calibration.txt` is the text that was given with it" in card
    assert "keeps 6 of 8 experts" in card
    with pytest.raises(ArtifactError, match="no options, as `bundle` made it"):
        read_likeness(tmp_path / "out" / "pruned-GGUF")


def test_what_is_not_known_is_left_out(made: Made, tmp_path: Path) -> None:
    nothing = {"imatrix": None, "observations": None, "text": None}
    result = made.bundle(tmp_path / "out", **nothing)
    manifest = verified_manifest(result, made.source)
    assert (manifest.has_imatrix, manifest.has_text) == (False, False)
    assert manifest.pruning.n_tokens == 0
    names = {file.name for file in result.gguf_folder.iterdir()}
    assert not names & {"imatrix.gguf", "imatrix.dat", "calibration.txt"}
    for folder in (result.gguf_folder, result.hf_folder):
        card = (folder / "README.md").read_text()
        assert "What the experts were ranked on is not recorded." in card
        assert "imatrix.gguf" not in card
        assert "None" not in card


def verified_manifest(result: BuildResult, source: Path) -> Manifest:
    verified(result, source)
    return Manifest.load(result.gguf_folder)


def test_a_model_that_is_not_pruned(made: Made, tmp_path: Path) -> None:
    file = tmp_path / "tiny-Q8_0.gguf"
    reap2gguf.quantize(made.source, "q8_0", file)
    result = reap2gguf.make_bundle(made.source, file, output=tmp_path / "out")
    assert result.hf_folder is None
    assert {one.name for one in (tmp_path / "out").iterdir()} == {".work", "tiny-GGUF"}
    assert result.manifest.hf is None
    assert not verified(result, made.source).not_checked
    with pytest.raises(UsageError, match="leave out --source"):
        reap2gguf.make_bundle(made.source, file, source=made.source, output=tmp_path / "other")


@pytest.mark.slow
def test_a_vision_projector_is_made(tmp_path: Path) -> None:
    made = make(TinyQwen35Moe().write(tmp_path / "tiny"), tmp_path)
    result = made.bundle(tmp_path / "out")
    assert [side.file for side in result.manifest.side_files] == ["mmproj-pruned-F16.gguf"]
    assert result.manifest.pruning.mtp.state == "pruned"
    verified(result, made.source)


def test_an_interrupted_call_leaves_no_name(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Workdir, "finalize", stop)
        with pytest.raises(KeyboardInterrupt):
            made.bundle(tmp_path / "out")
    assert {one.name for one in (tmp_path / "out").iterdir()} == {".work"}
    with monkeypatch.context() as patch:
        patch.setattr(Workdir, "_finalize", stop)
        with pytest.raises(KeyboardInterrupt):
            made.bundle(tmp_path / "out")
    made.bundle(tmp_path / "out")  # the interrupted one is carried through
    with pytest.raises(OutputError, match="exists already"):
        made.bundle(tmp_path / "out")
    assert reap2gguf.verify(tmp_path / "out" / "pruned-GGUF", source=made.source).violations == ()


def refused(kind: type[Reap2ggufError], made: Made, output: Path, **changes: Any) -> str:
    with pytest.raises(kind) as found:
        made.bundle(output, **changes)
    assert {one.name for one in output.glob("[!.]*")} == set()
    return str(found.value)


def test_what_does_not_fit_is_refused(made: Made, tmp_path: Path) -> None:
    output = tmp_path / "out"
    assert "pass --source" in refused(UsageError, made, output, source=None)
    assert "pass it with --imatrix" in refused(UsageError, made, output, imatrix=None)
    assert "the name '-' is not allowed" in refused(UsageError, made, output, name="-")
    wrong = {"labels": {str(made.files[1]): "Q8_0"}}
    assert "have the label 'Q8_0'" in refused(UsageError, made, output, **wrong)
    assert "no such file was given" in refused(UsageError, made, output, labels={"x.gguf": "A"})
    whole = tmp_path / "whole.gguf"
    reap2gguf.imatrix(made.source, PROSE, whole, chunk=128, compute=CPU)
    found = refused(Reap2ggufError, made, output, imatrix=whole)
    assert "such as the one before pruning" in found
    other = tmp_path / "other.safetensors"
    calibration = CalibrationOptions(str(made.source / "config.json"), samples=1, max_length=32)
    text = tmp_path / "text.txt"
    text.write_text("zero one two three " * 60)
    calibration = CalibrationOptions(str(text), samples=1, max_length=16)
    reap2gguf.observe(made.source, other, calibration=calibration, compute=CPU)
    found = refused(Reap2ggufError, made, output, observations=other)
    assert "keep other experts in layer" in found


def test_files_of_another_model_are_refused(made: Made, tmp_path: Path) -> None:
    output = tmp_path / "out"
    other = TinyQwen3Moe(seed=5).write(tmp_path / "other")
    none = {"observations": None}
    assert refused(VerificationError, made, output, source=other, **none)
    strange = tmp_path / "pruned-strange.gguf"
    strange.write_bytes(made.files[0].read_bytes())
    with strange.open("r+b") as file:
        file.seek(-600, 2)
        file.write(b"\x7f" * 500)
    with pytest.raises(VerificationError):
        reap2gguf.make_bundle(made.pruned, strange, output=output, **made.all)
    folder = Path(shutil.copytree(made.pruned, tmp_path / "pruned"))
    record = folder / "kept_experts.json"
    values = json.loads(record.read_text())
    record.write_text(json.dumps({**values, "method": "best"}))
    with pytest.raises(Reap2ggufError, match="method is 'best', expected one of"):
        reap2gguf.make_bundle(folder, *made.files, output=output, **made.all)


def test_the_command(made: Made, tmp_path: Path) -> None:
    words = ["bundle", str(made.pruned), *map(str, made.files), "--source", str(made.source)]
    words += ["--output", str(tmp_path / "out"), "--name", "typed"]
    done = CliRunner().invoke(cli, words)
    assert done.exit_code == 0, done.output
    assert "typed-Q8_0.gguf" in done.output
    again = CliRunner().invoke(cli, words)
    assert again.exit_code == 2
    assert "exists already" in again.output


def test_a_file_is_added_to_a_bundle_without_an_importance_matrix(
    made: Made, tmp_path: Path
) -> None:
    result = made.bundle(tmp_path / "out", imatrix=None, text=None)
    assert not result.manifest.has_imatrix
    added = reap2gguf.add(result.gguf_folder, recipes="Q4_K_M,bf16", threads=1)
    verified(added, made.source)
