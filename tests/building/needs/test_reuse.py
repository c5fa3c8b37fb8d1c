"""Which stages are done, on folders that are damaged, foreign or begun from scratch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from reap2gguf.building import text_stage
from reap2gguf.building.needs.estimate import ALL, KnownCoverage
from reap2gguf.building.needs.reuse import find_reused
from reap2gguf.building.plan import make_plan
from reap2gguf.gguf_files.imatrix import load_imatrix, save_both
from reap2gguf.gguf_files.imatrix_coverage import layer_hits
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
    assert set(ALL) - set(find_reused(plan).stages) == {"fit"}, "no size was asked for"
    with monkeypatch.context() as patch:
        refuse_at(patch, text_stage, "read_texts")
        with pytest.raises(KeyboardInterrupt):
            build(tiny, out, fresh=True)
    assert find_reused(plan).stages == ()


def test_the_tokens_of_experts_are_known_from_what_is_there(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    assert find_reused(make_plan(options(tiny, out))).coverage == KnownCoverage()
    stop_before_export(tiny, out, monkeypatch)
    found = find_reused(make_plan(options(tiny, out, recipes=("bf16",)))).coverage
    result = build(tiny, out)
    pruning, calibration = result.manifest.pruning, result.manifest.calibration
    assert found.observed is not None
    assert found.observed == pruning.coverage
    assert found.importance == calibration.imatrix_coverage
    assert found.observed_lines[0].startswith("experts: fewest tokens ")
    assert found.importance is not None
    matrix = load_imatrix(result.gguf_folder / "imatrix.gguf")
    assert found.importance.tokens == layer_hits(matrix)
    # of a finished bundle
    again = find_reused(make_plan(options(tiny, out, recipes=("q8_0", "bf16")))).coverage
    assert (again.observed, again.importance) == (found.observed, found.importance)
    (line,) = again.observed_lines
    assert line.startswith(found.observed_lines[0].split(",")[0].split(" (")[0])
    assert f"; of those that stay, {found.observed.n_thin_kept} saw fewer than 100" in line
    # of given files, whatever the output has
    save_both(matrix, tmp_path / "given.gguf")
    (observations,) = (out / ".work" / "observations").iterdir()
    given = {"imatrix": tmp_path / "given.gguf", "observations": observations}
    theirs = find_reused(make_plan(options(tiny, tmp_path / "new", **given))).coverage
    assert theirs == found
