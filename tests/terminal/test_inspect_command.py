"""`inspect` as it is typed: observations, bundles and importance matrices."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFWriter

import reap2gguf
from reap2gguf.artifacts.observations import Observations
from reap2gguf.bundle.manifest import Manifest
from reap2gguf.errors import UsageError
from reap2gguf.gguf_files.imatrix import load_imatrix
from reap2gguf.terminal import inspect_views
from tests.conftest import Bundle
from tests.test_cli import run

HEADS = ("12.5%", "25%", "37.5%", "50%")


@pytest.fixture(scope="module")
def observations(built: Bundle) -> Path:
    (path,) = (built.output / ".work" / "observations").iterdir()
    return path


def test_observations(observations: Path) -> None:
    result = run("inspect", observations)
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert lines[0].startswith(f"{observations.name}: ")
    head = next(line for line in lines if line.startswith(" layer"))
    assert head.split()[:8] == [
        "layer",
        "unseen",
        "fewest",
        "median",
        *HEADS,
    ]
    begun = lines.index(head) + 1
    rows = [line.split()[0] for line in lines[begun : begun + 6]]
    assert rows == ["0", "1", "2", "3", "lowest", "mean"]
    assert all(len(line) <= 80 for line in lines)
    assert sum("of the scores stay with" in line for line in lines) == 2


def test_a_bar_without_blocks(observations: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "\u2588" in run("inspect", observations).output
    monkeypatch.setattr(inspect_views, "can_print", lambda text: False)
    output = run("inspect", observations).output
    assert output.isascii()
    assert "####" in output


def test_many_ratios_leave_no_room_for_a_bar(observations: Path) -> None:
    output = run("inspect", observations, "--ratios", "10%,0.2,30%,0.4,50%,0.6").output
    assert "stays at" not in output
    assert "10%     20%     30%     40%     50%     60%" in output
    assert all(len(line) <= 80 for line in output.splitlines())


def test_observations_as_values(observations: Path) -> None:
    output = run("inspect", observations, "--csv", "--ratios", "0,0.5", "--method", "frequency")
    rows = list(csv.DictReader(output.output.splitlines()))
    found = json.loads(
        run("inspect", observations, "--json", "--ratios", "0,0.5", "--method", "frequency").output
    )
    assert [int(row["layer"]) for row in rows] == [0, 1, 2, 3]
    assert [float(row["kept_at_0.5"]) for row in rows] == [
        one["shares"][1] for one in found["layers"]
    ]
    assert {float(row["kept_at_0"]) for row in rows} == {1.0}
    assert found["kind"] == "observations"
    assert found["method"] == "frequency"
    assert found["coverage"]["n_experts"] == 64
    seen = Observations.load(observations)
    assert found["made_with"] == seen.made_with
    half = reap2gguf.inspect(seen, method="frequency", ratios=[0, 0.5])
    assert isinstance(half, reap2gguf.ObservationsInspection)
    assert list(half.means) == found["mean_shares"]


@pytest.mark.parametrize("side", ["hf", "gguf"])
def test_a_bundle(built: Bundle, side: str) -> None:
    folder = getattr(built, side)
    result = run("inspect", folder)
    assert result.exit_code == 0, result.output
    assert "keeps 12 of 16 experts in each of 4 layers, ranked by reap" in result.output
    found = json.loads(run("inspect", folder, "--json").output)
    at_quarter = json.loads(
        run("inspect", next((built.output / ".work" / "observations").iterdir()), "--json",
            "--ratios", "0.25").output
    )  # fmt: skip
    assert found["has_observations"]
    assert found["mean_share"] == pytest.approx(at_quarter["mean_shares"][0])
    kept = Manifest.load(folder).pruning.kept
    assert {one["layer"]: tuple(one["kept"]) for one in found["layers"]} == kept
    rows = list(csv.DictReader(run("inspect", folder, "--csv").output.splitlines()))
    assert [int(row["n_kept"]) for row in rows] == [12] * 4


def test_other_ratios_of_a_bundle(built: Bundle, observations: Path, tmp_path: Path) -> None:
    of_bundle = run("inspect", built.hf, "--ratios", "0.125,50%", "--csv").output
    assert of_bundle == run("inspect", observations, "--ratios", "0.125,50%", "--csv").output
    shutil.copytree(built.gguf, tmp_path / "alone-GGUF")
    assert (
        of_bundle
        == run("inspect", tmp_path / "alone-GGUF", "--ratios", "0.125,50%", "--csv").output
    )
    (tmp_path / "alone-GGUF" / "observations.safetensors").unlink()
    result = run("inspect", tmp_path / "alone-GGUF", "--ratios", "0.5")
    assert result.exit_code == 2
    assert "the observations are no longer in .work/observations" in result.output


def test_a_bundle_without_its_observations(built: Bundle, tmp_path: Path) -> None:
    folder = tmp_path / built.gguf.name
    folder.mkdir()
    shutil.copy(built.gguf / "reap2gguf.json", folder)
    others = tmp_path / ".work" / "observations"
    others.mkdir(parents=True)
    (others / "other.safetensors").write_bytes(b"of another build")
    output = run("inspect", folder).output
    assert "experts: fewest tokens" in output
    assert "the observations are no longer in .work/observations" in output
    found = reap2gguf.inspect(folder)
    assert isinstance(found, reap2gguf.BundleInspection)
    assert found.mean is None
    assert json.loads(run("inspect", folder, "--json").output)["mean_share"] is None


@pytest.mark.parametrize("name", ["imatrix.gguf", "imatrix.dat"])
def test_an_importance_matrix(built: Bundle, name: str) -> None:
    path = built.gguf / name
    result = run("inspect", path)
    assert result.exit_code == 0, result.output
    assert "blk.*.ffn_down_exps.weight" in result.output
    assert all(len(line) <= 80 for line in result.output.splitlines())
    found = json.loads(run("inspect", path, "--json").output)
    assert len(found["groups"]) == 8
    assert found["n_experts"] == (48 if name == "imatrix.gguf" else 0)
    assert isinstance(reap2gguf.inspect(load_imatrix(path)), reap2gguf.ImatrixInspection)
    rows = list(csv.DictReader(run("inspect", path, "--csv").output.splitlines()))
    assert [row["name"] for row in rows] == [one["name"] for one in found["groups"]]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--ratios", "x"), "'x' is not a ratio such as 0.25 or 25%"),
        (("--ratios", "1"), "ratio 1.0: expected 0 or more and less than 1"),
        (("--ratios", "nan"), "ratio nan: expected 0 or more and less than 1"),
        (("--ratios", "-5%"), "ratio -0.05: expected 0 or more"),
        (("--ratios", ",".join(["0.5"] * 65)), "65 ratios, expected 1 to 64"),
        (("--csv", "--json"), "--csv and --json exclude each other"),
    ],
)
def test_wrong_arguments(arguments: tuple[str, ...], said: str, observations: Path) -> None:
    result = run("inspect", observations, *arguments)
    assert result.exit_code == 2
    assert said in result.output


def written_side_file(folder: Path) -> Path:
    """A GGUF file that is neither of a model nor an importance matrix."""
    writer = GGUFWriter(folder / "side.gguf", "clip")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    return folder / "side.gguf"


def test_what_is_nothing_to_inspect(built: Bundle, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("text")
    cases: list[tuple[Any, str]] = [
        (tmp_path, "not a bundle"),
        (tmp_path / "text.txt", "text.txt"),
        (tmp_path / "missing", "missing"),
        (written_side_file(tmp_path), "general.type is not imatrix"),
    ]
    for path, said in cases:
        result = run("inspect", path)
        assert result.exit_code == 2, path
        assert said in result.output
    with pytest.raises(UsageError, match="expected one of"):
        reap2gguf.inspect(tmp_path, method="other")
