"""The marks of stages that overlap, and their changes by several threads."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from reap2gguf.building.marks import StageMarks


def test_a_stage_is_under_way_until_it_is_finished(tmp_path: Path) -> None:
    marks = StageMarks(tmp_path / "stages.json")
    assert not marks.is_under_way("one", "key")
    marks.begin("one", "key", ["one", "two"])
    assert marks.is_under_way("one", "key")
    assert not marks.is_under_way("one", "other")
    marks.finish("one", "key", {"n": 1}, {}, {})
    assert not marks.is_under_way("one", "key")
    assert marks.is_done("one", "key")


def test_threads_lose_no_mark_of_one_another(tmp_path: Path) -> None:
    path = tmp_path / "stages.json"
    marks = StageMarks(path)
    names = [f"stage {number}" for number in range(24)]

    def do(name: str) -> None:
        marks.begin(name, "key", [name])
        marks.finish(name, "key", {"name": name}, {}, {})

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(do, names))
    again = StageMarks(path)
    for name in names:
        assert again.is_done(name, "key")
        assert again.facts(name) == {"name": name}
