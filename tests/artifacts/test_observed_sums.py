"""Sums of an importance matrix in an observations file: whole, shared, and damaged."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from reap2gguf.artifacts.observations import Observations
from reap2gguf.artifacts.observed_sums import MatrixSums, ObservedSums
from reap2gguf.checkpoint.writer import CHECKSUM
from tests.artifacts.test_observations import refusal, rewrite, sample


def matrix() -> ObservedSums:
    generator = np.random.default_rng(0)
    inputs = generator.random((4, 8)).astype(np.float32), generator.integers(0, 99, 4)
    others = generator.random((4, 6)).astype(np.float32), generator.integers(0, 99, 4)
    named = {"ffn_gate_exps": inputs, "ffn_up_exps": inputs, "ffn_down_exps": others}
    entries = {
        f"blk.1.{name}.weight": MatrixSums(f"blk.1.{name}.weight", *sums)
        for name, sums in named.items()
    }
    return ObservedSums(entries, 7, 512)


def saved(folder: Path) -> Path:
    path = folder / "observations.safetensors"
    replace(sample(), imatrix=matrix()).save(path)
    return path


def test_a_round_trip_keeps_every_sum(tmp_path: Path) -> None:
    found = Observations.load(saved(tmp_path))
    assert found.imatrix is not None
    expected = matrix()
    assert found.imatrix.entries.keys() == expected.entries.keys()
    for name, entry in expected.entries.items():
        np.testing.assert_array_equal(found.imatrix.entries[name].sums, entry.sums)
        np.testing.assert_array_equal(found.imatrix.entries[name].counts, entry.counts)
    assert replace(found.imatrix, entries={}) == replace(expected, entries={})
    assert replace(found, layers={}, imatrix=None) == replace(sample(), layers={})


def test_sums_that_matrices_share_are_stored_once(tmp_path: Path) -> None:
    names = [name for name in load_file(saved(tmp_path)) if name.startswith("imatrix")]
    assert sorted(names) == [
        "imatrix.0.counts", "imatrix.0.sums", "imatrix.1.counts", "imatrix.1.sums",
    ]  # fmt: skip


def test_observations_without_sums_have_the_bytes_that_they_had(tmp_path: Path) -> None:
    sample().save(tmp_path / "plain")
    assert not any(name.startswith("imatrix") for name in load_file(tmp_path / "plain"))
    assert Observations.load(tmp_path / "plain").imatrix is None


SAID = {"entries": [["a", "b"], ["c"]], "chunks": 7, "chunk_size": 512}
DAMAGES: dict[str, tuple[dict[str, Any], str]] = {
    "a sum that is missing": ({"imatrix.0.sums": None}, "imatrix.0.sums is missing"),
    "a sum of another type": (
        {"imatrix.0.sums": np.ones((4, 8), np.float64)}, "imatrix.0.sums is missing, of another"
    ),
    "a sum too many": ({"imatrix.7.sums": np.ones((4, 8), np.float32)}, "imatrix.7.sums is"),
    "counts of another length": (
        {"imatrix.0.counts": np.ones(3, np.int64)}, "imatrix.0 has sums"
    ),
    "a sum of three axes": ({"imatrix.0.sums": np.ones((4, 2, 4), np.float32)}, "has sums"),
    "a negative sum": ({"imatrix.0.sums": -np.ones((4, 8), np.float32)}, "has negative, NaN"),
    "an infinite sum": (
        {"imatrix.1.sums": np.full((4, 6), np.inf, np.float32)}, "has negative, NaN"
    ),
    "a negative count": ({"imatrix.1.counts": -np.ones(4, np.int64)}, "has negative, NaN"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_arrays_are_refused(damage: str, tmp_path: Path) -> None:
    changed, message = DAMAGES[damage]
    path = saved(tmp_path)
    rewrite(path, {CHECKSUM: None}, **changed)
    assert message in refusal(path)


def test_a_changed_sum_is_noticed(tmp_path: Path) -> None:
    path = saved(tmp_path)
    rewrite(path, **{"imatrix.0.sums": np.ones((4, 8), np.float32)})
    assert "damaged" in refusal(path)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (SAID | {"entries": "abc"}, "are no lists"),
        (SAID | {"entries": [["a"], "c"]}, "are no lists"),
        (SAID | {"entries": [["a", "a"], ["c"]]}, "occur twice"),
        (SAID | {"entries": [["a", 1], ["c"]]}, "not names"),
        (SAID | {"entries": [["a"], []]}, "empty list"),
        (SAID | {"entries": [["a"]]}, "imatrix.1"),
        (SAID | {"chunks": -1}, "chunks of imatrix"),
        (SAID | {"chunk_size": 1.5}, "chunk_size of imatrix"),
        (SAID | {"chunks": True}, "chunks of imatrix"),
        ({"entries": []}, "is no list of matrices"),
        ([], "is no list of matrices"),
    ],
)
def test_damaged_metadata_is_refused(said: Any, message: str, tmp_path: Path) -> None:
    path = saved(tmp_path)
    rewrite(path, {CHECKSUM: None, "imatrix": json.dumps(said)})
    assert message in refusal(path)


def test_text_that_is_no_json_is_refused(tmp_path: Path) -> None:
    for text in ("{", "[" * 100_000):
        path = saved(tmp_path)
        rewrite(path, {CHECKSUM: None, "imatrix": text})
        assert "imatrix is no list of matrices" in refusal(path)


def test_arrays_that_are_not_announced_are_refused(tmp_path: Path) -> None:
    path = saved(tmp_path)
    rewrite(path, {CHECKSUM: None, "imatrix": None})
    assert "not in its list of matrices" in refusal(path)
