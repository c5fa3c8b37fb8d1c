"""The record of an evaluation: written, read, and refused where it is damaged."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from reap2gguf.bundle.evaluation import Evaluation, evaluation_of
from reap2gguf.errors import ArtifactError
from tests.evaluations import EXAMPLE, Q4, Q8


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    EXAMPLE.save(tmp_path / "evaluation.json")
    assert Evaluation.load(tmp_path / "evaluation.json") == EXAMPLE


def test_figures_are_found_by_names() -> None:
    first = EXAMPLE.variants[-1].name
    assert EXAMPLE.variant(first) is EXAMPLE.variants[-1]
    assert EXAMPLE.divergence(first, "pruned") is not None
    assert EXAMPLE.divergence("source", first) is None
    assert [one.task for one in EXAMPLE.scores("pruned")] == ["arc_easy", "arc_easy"]


def test_answers_are_compared_token_by_token() -> None:
    compared, alone = EXAMPLE.smoke_tests
    assert (compared.n_agree, compared.same_prompt) == (1, True)
    assert (alone.n_agree, alone.same_prompt) == (None, None)
    assert str(alone).endswith("not compared with transformers: it is too large")


def test_an_older_file_has_no_smoke_tests() -> None:
    values = EXAMPLE.as_json()
    del values["smoke_tests"]
    assert evaluation_of(values) == replace(EXAMPLE, smoke_tests=())


def damaged(path: str, value: Any) -> dict[str, Any]:
    """The example as JSON with one other value."""
    values: Any = json.loads(json.dumps(EXAMPLE.as_json()))
    *steps, last = path.split(".")
    at = values
    for step in steps:
        at = at[int(step) if step.isdigit() else step]
    at[last] = value
    found: dict[str, Any] = values
    return found


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("engine", "guess"),
        ("text", []),
        ("text.n_tokens", -1),
        ("text.has_bos", 1),
        ("variants", {}),
        ("variants.0.kind", "other"),
        ("variants.0.name", "x" * 5000),
        ("variants.0.perplexity", 9.5),
        ("variants.0.perplexity.value", float("nan")),
        ("variants.0.bits_per_weight", float("inf")),
        ("comparisons.0.variant", "unknown"),
        ("comparisons.0.divergence.mean", None),
        ("comparisons.0.divergence.other", {"value": 1.0, "error": 0.0}),
        ("speeds.0.peak_bytes", 2**70),
        ("smoke_tests", {}),
        ("smoke_tests.0.has_template", 1),
        ("smoke_tests.0.llama_cpp", None),
        ("smoke_tests.0.llama_cpp.tokens", [-1]),
        ("smoke_tests.0.llama_cpp.prompt_tokens", [1] * (2**18 + 1)),
        ("smoke_tests.0.transformers.text", "x" * (2**20 + 1)),
        ("made_with", {"torch": 2}),
    ],
)
def test_damage_is_refused(tmp_path: Path, path: str, value: Any) -> None:
    values = damaged(path, value)
    with pytest.raises((KeyError, TypeError, ValueError)):
        evaluation_of(values)
    file = tmp_path / "evaluation.json"
    file.write_text(json.dumps({"format": 1, **values}))
    with pytest.raises(ArtifactError, match="not a complete evaluation"):
        Evaluation.load(file)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 2}', "[" * 100_000])
def test_another_file_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "evaluation.json"
    file.write_text(text)
    with pytest.raises(ArtifactError):
        Evaluation.load(file)


def test_figures_of_files_that_are_gone_are_left_out() -> None:
    found = EXAMPLE.of_files([Q8])
    assert found is not None
    assert [one.name for one in found.variants] == ["source", "pruned", Q8]
    assert found.divergence(Q8, "pruned") == EXAMPLE.divergence(Q8, "pruned")
    assert found.divergence(Q4, "pruned") is None
    assert {one.variant for one in found.tasks} == {"source", "pruned", Q8}
    assert found.speeds == ()
    assert EXAMPLE.of_files([Q4, Q8]) == EXAMPLE
    only = replace(EXAMPLE, variants=EXAMPLE.variants[2:], comparisons=(), tasks=())
    assert only.of_files(()) is None
