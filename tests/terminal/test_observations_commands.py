"""`observations` as it is typed: show and merge."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import reap2gguf
from reap2gguf.artifacts.observations import LayerObservation, Observations
from tests.artifacts.test_observations import old
from tests.artifacts.test_observations_merge import with_sums
from tests.test_cli import run

COUNTS = {0: [500, 0, 100, 40], 1: [10, 20, 30, 1_000_000], 2: [0, 0, 5, 6]}


@pytest.fixture
def seen(tmp_path: Path) -> Path:
    path = tmp_path / "seen.safetensors"
    observed().save(path)
    return path


def observed(calibration: str = "prose") -> Observations:
    layers = {}
    for layer, counts in COUNTS.items():
        values = np.array(counts, dtype=np.float64)
        layers[layer] = LayerObservation(values.astype(np.int64), *[values] * 10)
    return Observations(layers, "model", calibration, calibration, 7, 1000, 1)


def test_show(seen: Path) -> None:
    result = run(
        "observations", "show", seen, "--method", "weighted_ean_sum", "--ratios", "25%,0.5"
    )
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert lines[0] == "seen.safetensors: 7 rows, 1,000 tokens of prose"
    assert all(len(line) <= 80 for line in lines)
    rows = {line.split()[0]: line.split()[1:] for line in lines if line.startswith(" ")}
    assert rows["layer"] == ["unseen", "fewest", "median", "most", "25%", "50%"]
    assert rows["0"] == ["1", "0", "70", "500", "100.0%", "93.8%"]
    assert rows["1"] == ["0", "10", "25", "1,000,000", "100.0%", "100.0%"]
    assert rows["2"] == ["2", "0", "2", "6", "100.0%", "100.0%"]
    assert rows["all"][:4] == ["3", "0", "15", "1,000,000"]
    assert "layer 0: never seen: expert 1" in lines
    assert "layer 2: never seen: experts 0, 1" in lines
    assert "1 rows were skipped: their values were not finite" in lines
    assert "earlier version" not in result.output


def test_show_as_values(seen: Path) -> None:
    found = json.loads(run("observations", "show", seen, "--json").output)
    assert found["kind"] == "observations"
    assert (found["n_rows"], found["n_dropped_rows"], found["is_complete"]) == (7, 1, True)
    assert [one["unseen"] for one in found["layers"]] == [[1], [], [0, 1]]
    assert [one["most"] for one in found["layers"]] == [500, 1_000_000, 6]
    inspected = json.loads(run("inspect", seen, "--json").output)
    assert found["mean_shares"] == inspected["mean_shares"]
    table = run("observations", "show", seen, "--csv").output
    assert [row["most"] for row in csv.DictReader(table.splitlines())] == ["500", "1000000", "6"]


def test_show_of_an_older_file(tmp_path: Path) -> None:
    path = tmp_path / "old.safetensors"
    old(observed()).save(path)
    lines = run("observations", "show", path).output.splitlines()
    assert any(line.startswith("made by an earlier version: criteria with squ") for line in lines)
    assert not json.loads(run("observations", "show", path, "--json").output)["is_complete"]
    result = run("observations", "show", path, "--method", "msan")
    assert result.exit_code == 2
    assert "run `reap2gguf observe` again" in result.output


def test_merge(seen: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.safetensors"
    replace(observed("code"), n_rows=3).save(other)
    output = tmp_path / "both.safetensors"
    result = run("observations", "merge", seen, other, "-o", output)
    assert result.exit_code == 0, result.output
    assert "10 rows, 2,000 tokens, 3 layers of 2 files" in result.output
    assert Observations.load(output).layers[0].count.tolist() == [1000, 0, 200, 80]
    again = tmp_path / "again.safetensors"
    found = json.loads(run("observations", "merge", seen, other, "-o", again, "--json").output)
    assert found["calibration"] == "prose + code"
    assert found["output"] == str(again)
    assert again.read_bytes() == output.read_bytes()


def test_merged_sums_of_an_importance_matrix(seen: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.safetensors"
    with_sums(observed("code"), 2.0).save(other)
    output = tmp_path / "both.safetensors"
    result = run("observations", "merge", seen, other, "-o", output)
    assert "seen.safetensors: has no sums of an importance matrix" in " ".join(
        result.output.split()
    )
    assert Observations.load(output).imatrix is None
    with_sums(observed(), 3.0).save(seen)
    words = ("observations", "merge", seen, other, "-o", output, "--json")
    assert f"{output}: exists already" in run(*words).output
    result = run(*words, "--overwrite")
    assert json.loads(result.output)["has_imatrix"]


def test_files_that_do_not_fit(seen: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.safetensors"
    replace(observed("code"), model_fingerprint="another").save(other)
    matrix = tmp_path / "imatrix.gguf"
    matrix.write_bytes(b"GGUF")
    output = tmp_path / "o.safetensors"
    for arguments, message in (
        (("merge", seen, other, "-o", output), "is of another checkpoint"),
        (("merge", seen, seen, "-o", output), "was observed on the same rows"),
        (("merge", seen, "-o", output), "expected two or more"),
        (("merge", seen, tmp_path / "gone", "-o", output), "gone"),
        (("show", tmp_path / "gone"), "gone"),
        (("show", matrix), "imatrix.gguf"),
        (("show", seen, "--method", "aimer"), "aimer"),
        (("show", seen, "--csv", "--json"), "exclude each other"),
    ):
        result = run("observations", *arguments)
        assert result.exit_code == 2, arguments
        assert message in result.output
        assert "Traceback" not in result.output
    assert not output.exists()


def test_a_real_file(tiny: Path, tmp_path: Path) -> None:
    """Merged from two texts, it prunes the model that both were observed on."""
    files = []
    for number, text in enumerate(("one text. " * 400, "and quite another! " * 400)):
        written = tmp_path / f"text{number}.txt"
        written.write_text(text)
        files.append(tmp_path / f"{number}.safetensors")
        run("observe", tiny, "--calibration", written, "--max-length", 128, "-o", files[-1])
    output = tmp_path / "both.safetensors"
    assert run("observations", "merge", *files, "-o", output).exit_code == 0
    selection = reap2gguf.select(tiny, output, keep_experts=4, protect_super_experts=True)
    assert all(len(ids) == 4 for ids in selection.kept.values())
