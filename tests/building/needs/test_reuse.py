"""Which stages are done, on folders that are damaged, foreign or begun from scratch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from reap2gguf.building import text_stage
from reap2gguf.building.needs.estimate import ALL
from reap2gguf.building.needs.reuse import find_reused
from reap2gguf.building.plan import make_plan
from tests.building.builds import build, options, refuse_at, stop_before_export


def test_an_empty_output(tiny: Path, tmp_path: Path) -> None:
    found = find_reused(make_plan(options(tiny, tmp_path / "out")))
    assert found.stages == ()
    assert found.texts is not None
    assert not (tmp_path / "out").exists()  # a plan writes nothing


def test_another_recipe(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop_before_export(tiny, tmp_path / "out", monkeypatch)
    plan = make_plan(options(tiny, tmp_path / "out", recipes=("bf16",)))
    assert find_reused(plan).stages == ("texts", "observe", "prune", "imatrix")


def test_outputs_that_are_gone(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    stop_before_export(tiny, out, monkeypatch)
    plan = make_plan(options(tiny, out))
    (file,) = (out / ".work" / "observations").iterdir()
    file.rename(tmp_path / file.name)
    assert find_reused(plan).stages == ("texts",)
    (tmp_path / file.name).rename(file)
    assert "observe" in find_reused(plan).stages
    file.write_bytes(b"damaged")
    assert find_reused(plan).stages == ("texts",)


def test_marks_that_are_damaged(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    stop_before_export(tiny, out, monkeypatch)
    plan = make_plan(options(tiny, out))
    (marks,) = out.glob(".work/*/stages.json")
    values = json.loads(marks.read_text())
    values["prune"]["key"] = "another"
    marks.write_text(json.dumps(values))
    assert find_reused(plan).stages == ("texts", "observe", "imatrix")
    marks.write_text("{")
    assert find_reused(plan).stages == ("texts", "observe")


def test_a_build_that_starts_from_scratch(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    build(tiny, out)
    plan = make_plan(options(tiny, out))
    assert find_reused(plan).stages == ALL
    with monkeypatch.context() as patch:
        refuse_at(patch, text_stage, "read_texts")
        with pytest.raises(KeyboardInterrupt):
            build(tiny, out, fresh=True)
    assert find_reused(plan).stages == ()
