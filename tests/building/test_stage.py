"""How a stage is reused, resumed and counted, with stages that write one small file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from reap2gguf.atomic import write_whole
from reap2gguf.building.marks import StageMarks
from reap2gguf.building.stage import Run, Stage
from reap2gguf.building.workdir import Workdir
from reap2gguf.progress import Silent

IDENTITY = {"source": "model", "fingerprint": "0123456789abcdef"}


class Note(Stage[str]):
    """A stage that writes its key into a file."""

    def __init__(self, run: Run, key: str = "key") -> None:
        super().__init__(run)
        self.wanted = key
        self.fails = False

    def make_key(self) -> str:
        return self.wanted

    @property
    def path(self) -> Path:
        return self.run.work.root / f"{self.name}.txt"

    @property
    def outputs(self) -> Sequence[Path]:
        return (self.path,)

    def clear(self) -> None:
        self.path.unlink(missing_ok=True)

    def compute(self) -> Mapping[str, Any]:
        before = self.path.read_text() if self.path.is_file() else ""
        self.path.write_text(before + self.key)
        if self.fails:
            raise KeyboardInterrupt
        return {"length": len(self.key)}

    def load(self) -> str:
        return self.path.read_text()


class First(Note):
    name = "first"


class Second(Note):
    name = "second"


class Third(Note):
    name = "third"


class Shared(Note):
    name = "shared"
    is_shared = True

    @property
    def path(self) -> Path:
        return self.run.work.shared_file("texts", self.wanted)


ORDER: Sequence[type[Stage[Any]]] = (Shared, First, Second, Third)


def started(folder: Path, fresh: bool = False, name: str = "name") -> Run:
    """A run as a new process would start it."""
    work = Workdir(folder, name)
    work.prepare(IDENTITY, fresh)
    plan: Any = SimpleNamespace()
    return Run(plan, work, Silent(), ORDER)


def reused(run: Run) -> dict[str, bool]:
    return {cost.name: cost.reused for cost in run.costs}


def test_a_stage_is_reused_with_the_same_key_only(tmp_path: Path) -> None:
    for key, is_reused in (("key", False), ("key", True), ("other", False), ("key", False)):
        run = started(tmp_path)
        stage = run.do(First(run, key))
        assert reused(run) == {"first": is_reused}
        assert stage.result == key
        assert stage.facts == {"length": len(key)}


def test_a_stage_whose_file_is_gone_is_done_again(tmp_path: Path) -> None:
    run = started(tmp_path)
    run.do(First(run)).path.unlink()
    again = started(tmp_path)
    again.do(First(again))
    assert reused(again) == {"first": False}


def test_an_interrupted_stage_resumes_with_the_same_key_only(tmp_path: Path) -> None:
    for key, left in (("key", "keykey"), ("other", "other")):
        run = started(tmp_path, fresh=True)
        stage = First(run, "key")
        stage.fails = True
        with pytest.raises(KeyboardInterrupt):
            run.do(stage)
        again = started(tmp_path)
        assert again.do(First(again, key)).result == left


def test_a_stage_that_is_done_again_undoes_those_after_it(tmp_path: Path) -> None:
    run = started(tmp_path)
    for kind in (First, Second, Third):
        run.do(kind(run))
    run = started(tmp_path)
    run.do(Second(run, "other"))
    marks = StageMarks(run.work.root / "stages.json")
    assert marks.is_done("first", "key")
    assert marks.is_done("second", "other")
    assert not marks.is_done("third", "key")


def test_a_shared_stage_serves_every_build_and_undoes_nothing(tmp_path: Path) -> None:
    one = started(tmp_path, name="one")
    one.do(First(one))
    one.do(Shared(one))
    assert StageMarks(one.work.root / "stages.json").is_done("first", "key")
    other = started(tmp_path, name="other")
    assert other.do(Shared(other)).result == "key"
    assert reused(other) == {"shared": True}


def test_a_fresh_start_does_a_shared_stage_again_once(tmp_path: Path) -> None:
    run = started(tmp_path)
    run.do(Shared(run))
    for fresh, is_reused in ((True, False), (False, True), (True, False)):
        again = started(tmp_path, fresh)
        again.do(Shared(again))
        assert reused(again) == {"shared": is_reused}


def test_saved_progress_goes_when_the_result_is_there(tmp_path: Path) -> None:
    run = started(tmp_path)
    (run.work.root / "first.state").write_text("")
    run.do(First(run))
    assert not list(run.work.root.glob("*.state"))


def test_the_first_process_decides_alone_where_there_is_no_other(tmp_path: Path) -> None:
    assert started(tmp_path).agree(lambda: 7) == 7


@pytest.mark.parametrize("text", ['{"pru', "[]", '{"first": 3}', '{"first": {"kee": 1}}', "\0"])
def test_damaged_marks_are_none(tmp_path: Path, text: str) -> None:
    run = started(tmp_path)
    run.do(First(run))
    (run.work.root / "stages.json").write_text(text)
    assert not StageMarks(run.work.root / "stages.json").is_done("first", "key")


def test_a_shared_file_that_is_a_link_is_replaced(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("theirs")
    run = started(tmp_path / "out")
    path = Shared(run).path
    path.symlink_to(victim)
    stage = Shared(run)
    stage.compute = lambda: run.work.share(lambda own: write_whole(own, "own"), path) or {}  # type: ignore[method-assign, func-returns-value]
    run.do(stage)
    assert reused(run) == {"shared": False}
    assert stage.result == "own"
    assert victim.read_text() == "theirs"
