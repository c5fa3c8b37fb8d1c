"""What was measured later gets into a finished bundle, whole or not at all."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from reap2gguf.building.measured import record_evaluation
from reap2gguf.bundle.evaluation import Evaluation
from reap2gguf.bundle.manifest import Manifest
from reap2gguf.errors import UsageError, VerificationError
from reap2gguf.options import ComputeOptions
from reap2gguf.progress import Silent
from reap2gguf.verifying.bundle import verify_paths
from reap2gguf.verifying.context import Strictness
from tests.conftest import Bundle
from tests.evaluations import EXAMPLE as EVALUATION

CPU = ComputeOptions(device="cpu")


class Noting(Silent):
    """Keeps what it is told."""

    def __init__(self, told: list[str]) -> None:
        self._told = told

    def note(self, text: str) -> None:
        self._told.append(text)


@pytest.fixture
def bundle(built: Bundle, tmp_path: Path) -> Path:
    """A copy of a finished bundle; its GGUF folder."""
    output = tmp_path / "output"
    shutil.copytree(built.output, output, ignore=shutil.ignore_patterns(".work"))
    return output / built.gguf.name


def evaluation_of(folder: Path) -> Evaluation:
    """An evaluation of a bundle's files, of made-up figures."""
    names = [record.file for record in Manifest.load(folder).gguf]
    files = EVALUATION.of_kind("gguf")
    new = {old.name: name for old, name in zip(files, names, strict=True)}
    return replace(
        EVALUATION,
        variants=[replace(one, name=new.get(one.name, one.name)) for one in EVALUATION.variants],
        comparisons=[
            replace(one, variant=new.get(one.variant, one.variant))
            for one in EVALUATION.comparisons
        ],
        tasks=[replace(one, variant=new.get(one.variant, one.variant)) for one in EVALUATION.tasks],
        speeds=[
            replace(one, variant=new.get(one.variant, one.variant)) for one in EVALUATION.speeds
        ],
    )


def test_cards_and_manifests_have_it(bundle: Path) -> None:
    before = {path.name: path.read_bytes() for path in bundle.glob("*.gguf")}
    found = evaluation_of(bundle)
    result = record_evaluation(bundle, found, None, CPU, Silent())
    assert result.hf_folder is not None
    for folder in (bundle, result.hf_folder):
        assert Manifest.load(folder).evaluation == found
        card = (folder / "README.md").read_text()
        assert f"{found.variants[1].perplexity.value:.2f}" in card
    assert {path.name: path.read_bytes() for path in bundle.glob("*.gguf")} == before
    report = verify_paths([bundle], 1, Silent(), Strictness(False))
    assert not report.violations


def test_what_is_not_measured_again_stays(bundle: Path) -> None:
    found = evaluation_of(bundle)
    record_evaluation(bundle, found, None, CPU, Silent())
    told: list[str] = []
    progress = Noting(told)
    speed = replace(found.speeds[0], n_threads=7)
    only_speed = Evaluation("streamed", None, speeds=[speed])
    again = record_evaluation(bundle, only_speed, None, CPU, progress).manifest.evaluation
    assert again is not None
    assert (again.text, again.variants, again.tasks) == (found.text, found.variants, found.tasks)
    assert again.comparisons == found.comparisons
    assert again.speeds == (speed,)
    assert "earlier figures that were not measured again stay: the text, tasks, answers" in told
    assert f"{found.variants[1].perplexity.value:.2f}" in (bundle / "README.md").read_text()
    assert not verify_paths([bundle], 1, Silent(), Strictness(False)).violations
    # another text, without the source
    assert found.text is not None
    other = replace(
        found, text=replace(found.text, label="other"), variants=found.variants[1:],
        comparisons=[one for one in found.comparisons if one.reference != "source"],
    )  # fmt: skip
    last = record_evaluation(bundle, other, None, CPU, progress).manifest.evaluation
    assert last is not None
    assert (last.variants, last.comparisons) == (other.variants, other.comparisons)
    assert "the earlier figures of source are removed" in told[-1]


def test_other_files_are_refused(bundle: Path) -> None:
    with pytest.raises(UsageError, match="was measured, but the bundle has no such file"):
        record_evaluation(bundle, EVALUATION, None, CPU, Silent())
    assert Manifest.load(bundle).evaluation is None


def test_a_damaged_bundle_stays_as_it_is(bundle: Path) -> None:
    found = evaluation_of(bundle)
    (bundle / "calibration.txt").write_text("other")
    with pytest.raises(VerificationError):
        record_evaluation(bundle, found, None, CPU, Silent())
    assert Manifest.load(bundle).evaluation is None
