"""What is kept beside an output is what was kept, or nothing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from reap2gguf.bundle.evaluation import Evaluation
from reap2gguf.evaluating.kept import KeptRecords, load_scores, save_scores
from reap2gguf.evaluating.scores import Pair, ScoredRow, Scores, VariantScores
from tests.evaluations import EXAMPLE

ROWS = [ScoredRow(np.arange(5), 3), ScoredRow(np.arange(4), 1)]
NAMES = ("source", "pruned")
PAIRS: list[Pair] = [NAMES]
SCORES = Scores(
    ROWS,
    {
        "source": VariantScores(np.arange(5.0), np.arange(5)),
        "pruned": VariantScores(np.arange(5.0) + 1, np.arange(5) + 1),
    },
    {NAMES: np.array([0.1, 0.2, np.nan, 0.4, 0.5])},
)


def test_scores_are_found_again(tmp_path: Path) -> None:
    path = tmp_path / "scores"
    assert load_scores(path, "key", ROWS, NAMES, PAIRS) is None
    save_scores(path, "key", SCORES)
    found = load_scores(path, "key", ROWS, NAMES, PAIRS)
    assert found is not None
    for name, one in SCORES.variants.items():
        assert found.variants[name].nll.tolist() == one.nll.tolist()
        assert found.variants[name].top.tolist() == one.top.tolist()
    np.testing.assert_array_equal(found.divergences[NAMES], SCORES.divergences[NAMES])
    assert load_scores(path, "other", ROWS, NAMES, PAIRS) is None
    assert load_scores(path, "key", ROWS[:1], NAMES, PAIRS) is None
    assert load_scores(path, "key", ROWS, [*NAMES, "x"], PAIRS) is None
    assert load_scores(path, "key", ROWS, NAMES, []) is None


@pytest.mark.parametrize("place", [2, 200, -3])
def test_damaged_scores_are_none(place: int, tmp_path: Path) -> None:
    path = tmp_path / "scores"
    save_scores(path, "key", SCORES)
    data = bytearray(path.read_bytes())
    data[place] ^= 0x55
    path.write_bytes(data)
    assert load_scores(path, "key", ROWS, NAMES, PAIRS) is None


def test_records_are_found_again(tmp_path: Path) -> None:
    path = tmp_path / "records"
    record = Evaluation("llama.cpp", None, speeds=EXAMPLE.speeds)
    KeptRecords(path).put("a", record)
    records = KeptRecords(path)
    records.put("b", replace(record, speeds=[]))
    again = KeptRecords(path)
    kept = again.get("a"), again.get("b")
    assert [one is not None and list(one.speeds) for one in kept] == [list(EXAMPLE.speeds), []]
    assert again.get("c") is None
    KeptRecords(None).put("a", record)


@pytest.mark.parametrize("content", ["{", "[]", '{"a": 1}', json.dumps({"a": {"text": None}})])
def test_damaged_records_are_none(content: str, tmp_path: Path) -> None:
    path = tmp_path / "records"
    path.write_text(content)
    assert KeptRecords(path).get("a") is None
