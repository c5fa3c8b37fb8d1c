"""What a bundle is called."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.utils import validate_repo_id

from reap2gguf.building.naming import bundle_name
from reap2gguf.errors import UsageError
from reap2gguf.hub.source import Source
from reap2gguf.options import BuildOptions
from reap2gguf.pruning.select import Target

PRUNED, WHOLE = Target(16, 12), Target(16, 16)


def named(
    source: str, target: Target = PRUNED, folder: Path = Path("source"), **options: Any
) -> tuple[str, list[str]]:
    """The bundle's name, and what was said about it."""
    notes: list[str] = []
    given = BuildOptions(recipes=("q4km",), **options)
    return bundle_name(given, Source(source, folder), target, notes.append), notes


@pytest.mark.parametrize(
    ("options", "expected"),
    [({}, "Model-REAP-0.25"), ({"compression": 0.26}, "Model-REAP-0.26"),
     ({"keep_experts": 12}, "Model-REAP-0.25"), ({"name": "x"}, "x"), ({"name": "a-b_"}, "a-b_"),
     ({"name": "a" * 91}, "a" * 91), ({"method": "msan"}, "Model-REAP-0.25"),
     ({"method": "aimer"}, "Model-pruned-0.25"), ({"method": "ream"}, "Model-REAM-0.25"),
     ({"method": "hc_smoe"}, "Model-HC-SMoE-0.25")],
)  # fmt: skip
def test_a_good_name_is_kept(options: dict[str, Any], expected: str) -> None:
    assert named("Model", **options) == (expected, [])
    assert named("owner/Model", **options) == (expected, [])


def test_a_model_that_is_not_pruned_is_not_called_so() -> None:
    assert named("owner/Model", WHOLE) == ("Model", [])
    assert named("owner/Model", WHOLE, compression=0.0) == ("Model", [])
    assert named("Model", Target(1000, 997))[0] == "Model-REAP-0.003"


@pytest.mark.parametrize("target", [PRUNED, WHOLE], ids=["pruned", "whole"])
@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("My Model (v2)", "My-Model-v2"),
        ("模型-キュー", "model"),
        ("x'y", "x-y"),
        ("--lead", "lead"),
        ("Qwen3.5-35B-A3B.", "Qwen3.5-35B-A3B"),
        ("Modèle naïf", "Modele-naif"),
        ("a..b", "a-b"),
        ("a--b", "a-b"),
        ("x.git", "x"),
        ("..hidden", "hidden"),
        ("é", "e"),
        ("\n\x1b[2J", "2J"),
        ("", "model"),
        ("...", "model"),
        ("a" * 200, ""),
        ("texts", "model"),
        ("x-GGUF", "x"),
        ("x-GGUF-GGUF", "x"),
        ("-GGUF", "GGUF"),
    ],
)
def test_a_name_that_the_hub_refuses_is_changed_and_reported(
    source: str, expected: str, target: Target
) -> None:
    name, notes = named(source, target)
    ending = "-REAP-0.25" if target is PRUNED else ""
    if expected:
        assert name == expected + ending
    assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name)
    assert len(f"{name}-GGUF") <= 96
    validate_repo_id(name)
    validate_repo_id(f"{name}-GGUF")
    (note,) = notes
    assert name in note
    assert "--name" in note


def test_a_name_that_is_only_too_long_is_refused_for_its_length() -> None:
    with pytest.raises(UsageError, match="it has 92 letters, expected at most 91"):
        named("Model", name="a" * 92)


@pytest.mark.parametrize(
    "name",
    ["a b", "", "é", "-x", "texts", "x-GGUF", "a/b", "a\n", "n-", "n.", "x.git", "a--b", "a..b"],
)  # fmt: skip
def test_a_given_name_is_not_changed(name: str) -> None:
    with pytest.raises(UsageError, match="is not allowed"):
        named("Model", name=name)


@pytest.mark.parametrize("place", ["out/Model", "out/Model-GGUF"])
def test_the_source_is_not_replaced(tmp_path: Path, place: str) -> None:
    with pytest.raises(UsageError, match="the result would replace the source; pass another"):
        named("Model", PRUNED, tmp_path / place, output=tmp_path / "out", name="Model")


def test_gguf_files_alone_may_lie_beside_the_source(tmp_path: Path) -> None:
    assert named("Model", WHOLE, tmp_path / "Model", output=tmp_path) == ("Model", [])
    with pytest.raises(UsageError, match="the result would replace the source; pass another"):
        named("Model", WHOLE, tmp_path / "Model-GGUF", output=tmp_path)
