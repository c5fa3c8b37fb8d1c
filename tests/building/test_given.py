"""Builds that take observations, or an importance matrix, from files that are there."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import reap2gguf
from reap2gguf.api.builds import estimate
from reap2gguf.artifacts.observations import Observations
from reap2gguf.building import given_stage, pipeline
from reap2gguf.building.plan import make_plan
from reap2gguf.bundle.manifest import hash_file
from reap2gguf.errors import CalibrationError, Reap2ggufError, UsageError
from reap2gguf.gguf_files.imatrix import ImatrixEntry, load_imatrix, save_both
from reap2gguf.gguf_files.reader import read_gguf_header
from reap2gguf.options import CalibrationOptions, ComputeOptions
from reap2gguf.progress import Silent
from reap2gguf.terminal.plan_json import plan_as_json
from reap2gguf.terminal.plan_views import plan_lines
from reap2gguf.verifying.bundle import verify_bundle
from reap2gguf.verifying.context import Strictness
from reap2gguf.verifying.opening import open_source
from tests.building.builds import PROSE, build, contents, options, refuse_at, stages_reused
from tests.tiny import TinyQwen3Moe, TinyQwen35Moe, child_environment


@dataclass(frozen=True)
class Parts:
    """A model, a whole build of it, and the files that `observe` and that build left."""

    model: Path
    earlier: pipeline.BuildResult
    observations: Path
    imatrix: Path
    nothing: CalibrationOptions  # an empty text, which any reading refuses

    @property
    def both(self) -> dict[str, Any]:
        return {"observations": self.observations, "imatrix": self.imatrix}


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Parts:
    folder = tmp_path_factory.mktemp("parts")
    model = TinyQwen3Moe().write(folder / "tiny")
    earlier = build(model, folder / "out")
    observations = folder / "obs.safetensors"
    reap2gguf.observe(
        model,
        observations,
        calibration=CalibrationOptions(str(PROSE), samples=4, max_length=128),
        compute=ComputeOptions(device="cpu"),
    )
    imatrix = folder / "mine.gguf"
    imatrix.write_bytes((earlier.gguf_folder / "imatrix.gguf").read_bytes())
    imatrix.with_suffix(".dat").write_bytes((earlier.gguf_folder / "imatrix.dat").read_bytes())
    (folder / "empty.txt").touch()
    nothing = CalibrationOptions(str(folder / "empty.txt"))
    with pytest.raises(CalibrationError):
        build(model, folder / "refused", calibration=nothing)
    return Parts(model, earlier, observations, imatrix, nothing)


def violations(result: pipeline.BuildResult, model: Path) -> tuple[str, ...]:
    """What `verify BUNDLE --source MODEL --exact` finds."""
    with open_source(str(model), Silent()) as source:
        strict = Strictness(is_exact=True, source=source)
        return verify_bundle(result.gguf_folder, 2, Silent(), strict).violations


def test_given_observations_choose_the_same_experts(parts: Parts, tmp_path: Path) -> None:
    result = build(parts.model, tmp_path, observations=parts.observations)
    assert list(stages_reused(result)) == ["texts", "prune", "imatrix", "export", "verify"]
    assert not list((tmp_path / ".work" / "observations").iterdir())
    pruning, before = result.manifest.pruning, parts.earlier.manifest.pruning
    assert pruning.kept == before.kept
    assert pruning.observations_file == "obs.safetensors"
    assert before.observations_file is None
    seen = Observations.load(parts.observations)
    assert (pruning.n_rows, pruning.n_tokens) == (seen.n_rows, seen.n_tokens)
    calibration = result.manifest.calibration
    assert (calibration.spec, calibration.sha256) == (seen.calibration, seen.calibration_sha256)
    assert calibration.seed is None
    card = (result.gguf_folder / "README.md").read_text()
    assert "reused from the file `obs.safetensors`" in card
    assert f"{seen.n_tokens:,} tokens in total, reused from `obs.safetensors`" in card
    assert not violations(result, parts.model)
    weights = {name: raw for name, raw in contents(result).items() if name.endswith("tensors")}
    assert weights.items() <= contents(parts.earlier).items()


def test_a_given_imatrix_is_taken_into_the_bundle(parts: Parts, tmp_path: Path) -> None:
    result = build(parts.model, tmp_path, imatrix=parts.imatrix, recipes=("q8_0",))
    assert stages_reused(result).keys() == stages_reused(parts.earlier).keys()
    for name in ("imatrix.gguf", "imatrix.dat"):
        was = parts.earlier.gguf_folder / name
        assert (result.gguf_folder / name).read_bytes() == was.read_bytes()
    assert not (result.gguf_folder / "calibration.txt").exists()
    calibration = result.manifest.calibration
    assert calibration.imatrix_file == "mine.gguf"
    assert calibration.imatrix_text == parts.earlier.manifest.calibration.imatrix_text
    card = (result.gguf_folder / "README.md").read_text()
    assert "comes from the file\n`mine.gguf`, which records" in card
    assert "calibration.txt" not in card
    assert not violations(result, parts.model)


def test_the_header_names_the_text_of_a_given_imatrix(wide: Path, tmp_path: Path) -> None:
    earlier = build(wide, tmp_path / "one", keep_experts=2, recipes=("q4km",))
    (tmp_path / "theirs.dat").write_bytes((earlier.gguf_folder / "imatrix.dat").read_bytes())
    given = {"imatrix": tmp_path / "theirs.dat", "keep_experts": 2, "recipes": ("q4km",)}
    result = build(wide, tmp_path / "two", **given)
    metadata = read_gguf_header(next(result.gguf_folder.glob("*Q4_K_M.gguf"))).metadata
    assert metadata["quantize.imatrix.dataset"] == PROSE.name
    assert metadata["quantize.imatrix.file"] == "imatrix.gguf"
    entry = load_imatrix(result.gguf_folder / "imatrix.gguf").entries["blk.0.ffn_up_exps.weight"]
    assert entry.sums.shape == (2, 256)
    assert not violations(result, wide)


def test_with_both_no_text_is_read_and_torch_is_not_loaded(parts: Parts, tmp_path: Path) -> None:
    program = f"""
import sys
sys.modules["torch"] = None
sys.modules["datasets"] = None
import reap2gguf
from reap2gguf.options import CalibrationOptions
options = reap2gguf.BuildOptions(
    recipes=("q8_0",), model={str(parts.model)!r}, output={str(tmp_path)!r},
    observations={str(parts.observations)!r}, imatrix={str(parts.imatrix)!r},
    calibration=CalibrationOptions({parts.nothing.spec!r}),
)
result = reap2gguf.build(options)
print(*(stage.name for stage in result.stages))
"""
    ran = subprocess.run(
        [sys.executable, "-c", program], env=child_environment({}), capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split() == ["prune", "imatrix", "export", "verify"]
    report = verify_bundle(tmp_path / "tiny-REAP-0.25-GGUF", 2, Silent())
    assert not report.violations
    assert not list((tmp_path / ".work" / "texts").iterdir())


def test_an_interrupted_build_with_both_is_resumed(
    parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = parts.both | {"calibration": parts.nothing}
    with monkeypatch.context() as patch:
        refuse_at(patch, given_stage, "save_both")
        with pytest.raises(KeyboardInterrupt):
            build(parts.model, tmp_path, **given)
    result = build(parts.model, tmp_path, **given)
    assert stages_reused(result) == {
        "prune": False, "imatrix": False, "export": False, "verify": False,
    }  # fmt: skip
    assert not build(parts.model, tmp_path, **given).stages
    renamed = tmp_path / "other.safetensors"
    renamed.write_bytes(parts.observations.read_bytes())
    again = build(parts.model, tmp_path, **given | {"observations": renamed})
    assert again.manifest.pruning.observations_file == "other.safetensors"


def test_observations_with_an_own_text_read_no_calibration(parts: Parts, tmp_path: Path) -> None:
    given = {
        "observations": parts.observations,
        "imatrix_text": PROSE,
        "calibration": parts.nothing,
    }
    result = build(parts.model, tmp_path, **given)
    assert result.manifest.calibration.components == ()
    assert (result.gguf_folder / "calibration.txt").read_text() == PROSE.read_text()
    assert not violations(result, parts.model)


def test_all_experts_with_a_given_imatrix(parts: Parts, tmp_path: Path) -> None:
    with reap2gguf_imatrix(parts.model, tmp_path / "whole.gguf") as imatrix:
        result = build(
            parts.model, tmp_path / "out", compression=0, imatrix=imatrix, calibration=parts.nothing
        )
    assert "texts" not in stages_reused(result)
    assert result.manifest.calibration.spec is None
    assert not violations(result, parts.model)


class reap2gguf_imatrix:
    """The importance matrix of a model as `reap2gguf imatrix` writes it."""

    def __init__(self, model: Path, path: Path) -> None:
        self._model, self._path = model, path

    def __enter__(self) -> Path:
        compute = ComputeOptions(device="cpu")
        reap2gguf.imatrix(self._model, PROSE, self._path, chunk=128, compute=compute)
        return self._path

    def __exit__(self, *error: object) -> None:
        return None


def test_the_plan_says_what_is_reused(parts: Parts, tmp_path: Path) -> None:
    plan = make_plan(options(parts.model, tmp_path, observations=parts.observations))
    needs = estimate(plan)
    text = " ".join("\n".join(plan_lines(plan, needs)).split())
    assert "calibration: observations: obs.safetensors, reused, prose.txt, 512 tokens" in text
    assert plan_as_json(plan, needs)["observations"] == "obs.safetensors"
    plan = make_plan(options(parts.model, tmp_path, **parts.both, calibration=parts.nothing))
    text = " ".join("\n".join(plan_lines(plan, estimate(plan))).split())
    assert (
        "calibration: observations: obs.safetensors, reused, importance matrix: mine.gguf, reused"
    ) in text
    assert plan.n_sweeps == 0


@pytest.mark.slow
def test_an_mtp_block_is_not_asked_where_it_was_not_before(tmp_path: Path) -> None:
    model = TinyQwen35Moe(vision=False).write(tmp_path / "tiny")
    observations = tmp_path / "obs.safetensors"
    calibration = CalibrationOptions(str(PROSE), samples=4, max_length=128)
    compute = ComputeOptions(device="cpu")
    reap2gguf.observe(model, observations, calibration=calibration, compute=compute)
    result = build(model, tmp_path / "out", observations=observations)
    mtp = result.manifest.pruning.mtp
    assert (mtp.state, mtp.n_tokens) == ("pruned", 0)
    assert not violations(result, model)


def refusal(model: Path, output: Path, **changes: Any) -> str:
    with pytest.raises(Reap2ggufError) as refused:
        make_plan(options(model, output, **changes))
    return str(refused.value)


def test_observations_of_another_model_are_refused(parts: Parts, tmp_path: Path) -> None:
    other = TinyQwen3Moe(seed=5).write(tmp_path / "other")
    found = refusal(other, tmp_path, observations=parts.observations)
    assert "of another checkpoint" in found
    assert "run `reap2gguf observe` on this one" in found
    assert str(parts.observations) in found


def test_an_imatrix_of_the_model_before_pruning_is_cut(
    parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a build that ranks experts, and in one that is given all; resumed, and in the record."""
    with reap2gguf_imatrix(parts.model, tmp_path / "whole.gguf") as imatrix:
        given: dict[str, Any] = {"imatrix": imatrix}
    with monkeypatch.context() as patch:
        refuse_at(patch, given_stage, "save_both")
        with pytest.raises(KeyboardInterrupt):
            build(parts.model, tmp_path / "out", **given)
    result = build(parts.model, tmp_path / "out", **given)
    assert stages_reused(result)["observe"]
    cut = reap2gguf.slice_imatrix(imatrix, result.gguf_folder).imatrix
    found = load_imatrix(result.gguf_folder / "imatrix.gguf")
    assert found.entries.keys() == cut.entries.keys()
    for name, entry in found.entries.items():
        np.testing.assert_array_equal(entry.sums, cut.entries[name].sums)
        np.testing.assert_array_equal(entry.counts, cut.entries[name].counts)
    record = result.manifest.calibration
    assert (record.imatrix_file, record.imatrix_cut_from) == ("whole.gguf", 8)
    assert result.manifest.options is not None
    (asked,) = [one for one in result.manifest.options.inputs if one.option == "--imatrix"]
    assert asked.sha256 == hash_file(imatrix).sha256
    card = " ".join((result.gguf_folder / "README.md").read_text().split())
    assert "It was made of the model before pruning: of 8 experts per layer, it has those" in card
    assert not violations(result, parts.model)
    assert not build(parts.model, tmp_path / "out", **given).stages
    older = parts.both | {"imatrix": imatrix.with_suffix(".dat"), "calibration": parts.nothing}
    other = build(parts.model, tmp_path / "older", **older)
    assert not violations(other, parts.model)
    of_dat = load_imatrix(other.gguf_folder / "imatrix.gguf")
    for name, entry in of_dat.entries.items():
        np.testing.assert_allclose(entry.importance(), cut.entries[name].importance(), rtol=1e-5)


def test_what_a_given_imatrix_covers_is_said(parts: Parts, tmp_path: Path) -> None:
    with reap2gguf_imatrix(parts.model, tmp_path / "whole.gguf") as path:
        whole = load_imatrix(path)
    counts = {name: entry.counts.copy() for name, entry in whole.entries.items()}
    counts["blk.0.ffn_up_exps.weight"][:2] = 0
    some = {name: replace(one, counts=counts[name]) for name, one in whole.entries.items()}
    spare = ImatrixEntry("output.weight", np.ones((1, 64), np.float32), np.array([1]))
    save_both(replace(whole, entries={**some, spare.name: spare}), path)
    lines: list[str] = []
    plan = make_plan(options(parts.model, tmp_path / "out", imatrix=path), lines.append)
    assert plan.imatrix is not None
    text = "\n".join(lines)
    assert "experts (one per tensor) were never hit and are quantized with equal weights" in text
    assert "whole.gguf: is of the model before pruning, with 8 experts per layer; it is cut" in text
    values = plan_as_json(plan, estimate(plan))["imatrix_coverage"]
    assert values["n_unseen"] >= 2
    assert "reused and cut to the experts that stay" in " ".join(
        "\n".join(plan_lines(plan, estimate(plan))).split()
    )
    few = {name: one for name, one in whole.entries.items() if "attn" in name}
    save_both(replace(whole, entries=few), path)
    found = refusal(parts.model, tmp_path / "out", imatrix=path)
    assert found.startswith(f"{path}: covers ")
    assert "have no entry, such as blk.0.ffn_down_exps.weight; expected at least 80%" in found
    assert "add several with `reap2gguf imatrix merge`, or leave it out" in found


def test_an_imatrix_of_another_model_is_refused(parts: Parts, tmp_path: Path) -> None:
    imatrix = load_imatrix(parts.imatrix)
    strange = ImatrixEntry("blk.9.attn_q.weight", np.ones((1, 64), np.float32), np.array([1]))
    entries = imatrix.entries | {strange.name: strange}
    save_both(replace(imatrix, entries=entries), tmp_path / "strange.gguf")
    found = refusal(parts.model, tmp_path / "out", imatrix=tmp_path / "strange.gguf")
    assert "has an entry for 'blk.9.attn_q.weight', which the model does not have" in found


def test_a_type_that_needs_what_a_given_imatrix_lacks_is_refused(
    wide: Path, tmp_path: Path
) -> None:
    with reap2gguf_imatrix(wide, tmp_path / "whole.gguf") as path:
        imatrix = load_imatrix(path)
    entries = {name: one for name, one in imatrix.entries.items() if "ffn_up_exps" not in name}
    save_both(replace(imatrix, entries=entries), path)
    recipe = tmp_path / "low.toml"
    recipe.write_text('title = "Low"\nlabel = "IQ2_XS"\nfile_type = "IQ2_XS"\n')
    found = refusal(wide, tmp_path / "out", imatrix=path, compression=0, recipes=(str(recipe),))
    assert "needs an importance matrix, and whole.gguf has none for it" in found


@pytest.mark.parametrize("name", ["observations", "imatrix"])
def test_what_a_build_would_replace_is_refused(parts: Parts, tmp_path: Path, name: str) -> None:
    for folder in ("tiny-REAP-0.25", "tiny-REAP-0.25-GGUF", ".work/tiny-REAP-0.25"):
        place = tmp_path / folder / "given"
        place.parent.mkdir(parents=True)
        place.write_bytes(getattr(parts, name).read_bytes())
        found = refusal(parts.model, tmp_path, **{name: place})
        assert "the build of tiny-REAP-0.25 would replace it" in found
    found = refusal(parts.model, tmp_path, **{name: tmp_path / "not there"})
    assert "cannot be read" in found


def test_what_contradicts_is_refused(parts: Parts, tmp_path: Path) -> None:
    found = refusal(parts.model, tmp_path, observations=parts.observations, compression=0)
    assert "they choose the experts to drop, and all 8 are kept" in found
    with pytest.raises(UsageError, match="exclude each other"):
        options(parts.model, tmp_path, imatrix=parts.imatrix, imatrix_text=PROSE)
