"""Stages that overlap: how they start, wait for one another, fail and stop."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from reap2gguf.building import pipeline, stages, verify_stage
from reap2gguf.building.needs import room
from reap2gguf.building.needs.disk import DiskNeeds
from reap2gguf.building.stage import Run, Stage
from reap2gguf.building.stages import Importance
from reap2gguf.building.together import do_together
from reap2gguf.building.workdir import Room, Workdir
from reap2gguf.errors import OutputError, Reap2ggufError
from reap2gguf.exporting import gguf_export
from reap2gguf.gguf_files.growing import GrowingEntries
from reap2gguf.options import ComputeOptions
from reap2gguf.progress import CallbackProgress, ProgressEvent, Silent
from tests.building.builds import build, contents, stages_reused
from tests.tiny import TinyQwen3Moe, TinyQwen35Moe

MOST_SECONDS = 60  # only a test that hangs reaches it
CPU = ComputeOptions(device="cpu", threads=2)


class Small(Stage[None]):
    """A stage that writes a file, after what a test lets it do."""

    held = 0

    def __init__(self, run: Run, work: Callable[[Small], None] = lambda stage: None) -> None:
        super().__init__(run)
        self.work = work

    def make_key(self) -> str:
        return "key"

    @property
    def path(self) -> Path:
        return self.run.work.root / f"{self.name}.txt"

    @property
    def outputs(self) -> Sequence[Path]:
        return (self.path,)

    @property
    def held_bytes(self) -> int:
        return self.held

    def compute(self) -> Mapping[str, Any]:
        self.work(self)
        self.path.write_text(self.name)
        return {}

    def load(self) -> None:
        """Nothing."""


class Writer(Small):
    name = "writer"
    undoes = False
    held = 100


class Sweep(Small):
    name = "sweep"


class Reader(Small):
    name = "reader"
    held = 50


class Checker(Small):
    name = "checker"
    checks: Stage[Any] | None = None

    @property
    def after(self) -> Sequence[Stage[Any]]:
        return () if self.checks is None else (self.checks,)


ORDER: Sequence[type[Stage[Any]]] = (Writer, Sweep, Reader, Checker)


def started(folder: Path, n_threads: int = 2) -> Run:
    work = Workdir(folder, "name")
    work.prepare({"source": "model", "fingerprint": "0123456789abcdef"}, False)
    plan: Any = SimpleNamespace(
        options=SimpleNamespace(compute=ComputeOptions(threads=n_threads)),
        checkpoint=SimpleNamespace(without_fetching=nullcontext),
    )
    return Run(plan, work, Silent(), ORDER)


def reused(run: Run) -> dict[str, bool]:
    return {cost.name: cost.reused for cost in run.costs}


def wait_for(event: threading.Event) -> None:
    assert event.wait(MOST_SECONDS)


def test_stages_run_at_the_same_time_and_wait_for_what_they_need(tmp_path: Path) -> None:
    run = started(tmp_path)
    is_writing, is_sweeping = threading.Event(), threading.Event()
    order: list[str] = []

    def write(stage: Small) -> None:
        is_writing.set()
        wait_for(is_sweeping)
        order.append(stage.name)

    def sweep(stage: Small) -> None:
        stage.beside(lambda n_bytes: True)
        wait_for(is_writing)  # so both run at the same time
        is_sweeping.set()

    writer = Writer(run, write)
    checker = Checker(run, lambda stage: order.append(stage.name))
    checker.checks = writer
    do_together(run, Sweep(run, sweep), writer, Reader(run), checker)
    assert order == ["writer", "checker"]
    assert reused(run) == dict.fromkeys(("writer", "sweep", "reader", "checker"), False)
    assert [cost.name for cost in run.costs] == ["writer", "sweep", "reader", "checker"]
    again = started(tmp_path)
    do_together(again, Sweep(again), Writer(again), Reader(again), Checker(again))
    assert all(reused(again).values())


class Slow(str):
    """A stage's name; while it is compared, another stage ends."""

    __slots__ = ()
    is_sorting, has_ended = threading.Event(), threading.Event()

    def __eq__(self, other: object) -> bool:
        self.is_sorting.set()
        self.has_ended.wait(0.2)
        return str(self) == other

    __hash__ = str.__hash__


def test_two_stages_that_end_at_the_same_time(tmp_path: Path) -> None:
    run = started(tmp_path)
    first, second = Writer(run), Sweep(run)
    first.name = Slow("writer")  # type: ignore[misc]
    errors: list[BaseException] = []

    def end() -> None:
        try:
            run._end(first, 0.0)
        except ValueError as error:
            errors.append(error)

    thread = threading.Thread(target=end)
    thread.start()
    wait_for(Slow.is_sorting)
    run._end(second, 0.0)
    Slow.has_ended.set()
    thread.join()
    assert not errors
    assert [cost.name for cost in run.costs] == ["writer", "sweep"]


def test_a_thread_that_cannot_be_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system's error is raised, and not one about a thread that never ran."""
    run = started(tmp_path)

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        do_together(run, Sweep(run), Writer(run))


@pytest.mark.parametrize(
    ("n_free", "beside"), [(99, []), (149, ["writer"]), (150, ["writer", "reader"])]
)
def test_only_what_fits_into_memory_runs_beside_a_sweep(
    n_free: int, beside: list[str], tmp_path: Path
) -> None:
    run = started(tmp_path)
    has_swept = threading.Event()
    early: list[str] = []

    def look(stage: Small) -> None:
        if not has_swept.is_set():
            early.append(stage.name)

    def sweep(stage: Small) -> None:
        stage.beside(lambda n_bytes: n_bytes <= n_free)
        run.joint.wait(beside)
        has_swept.set()

    do_together(run, Sweep(run, sweep), Writer(run, look), Reader(run, look))
    assert early == beside
    assert not any(reused(run).values())


@pytest.mark.parametrize(("n_threads", "has_disk"), [(1, True), (2, False)])
def test_one_thread_or_little_disk_does_one_stage_after_the_other(
    n_threads: int, has_disk: bool, tmp_path: Path
) -> None:
    run = started(tmp_path, n_threads)
    run.room = Room(overlaps=has_disk)
    seen: list[tuple[str, int]] = []

    def look(stage: Small) -> None:
        seen.append((stage.name, threading.get_ident()))

    kinds = (Sweep, Checker, Writer, Reader)
    do_together(run, *(kind(run, look) for kind in kinds))
    assert [name for name, _ in seen] == ["writer", "sweep", "reader", "checker"]
    assert {thread for _, thread in seen} == {threading.get_ident()}


class Broken(Exception):
    """What a stage fails with."""


@pytest.mark.parametrize("failing", ["writer", "reader", "checker"])
def test_the_first_error_stops_all_and_is_raised(failing: str, tmp_path: Path) -> None:
    run = started(tmp_path)
    n_threads = threading.active_count()

    def work(stage: Small) -> None:
        if stage.name == failing:
            raise Broken(stage.name)
        with run.progress.task("Work", MOST_SECONDS * 100, "steps") as task:
            for _ in range(MOST_SECONDS * 100):
                threading.Event().wait(0.01)
                task.advance()  # where the stop arrives
        raise AssertionError

    def sweep(stage: Small) -> None:
        stage.beside(lambda n_bytes: True)
        work(stage)

    with pytest.raises(Broken, match=failing):
        do_together(
            run, Sweep(run, sweep), Writer(run, work), Reader(run, work), Checker(run, work)
        )
    assert threading.active_count() == n_threads
    assert run.costs == []
    again = started(tmp_path)
    do_together(again, Sweep(again), Writer(again), Reader(again), Checker(again))
    assert not any(reused(again).values())


def test_an_interrupt_of_the_sweep_stops_those_that_wait(tmp_path: Path) -> None:
    run = started(tmp_path)
    n_threads = threading.active_count()

    def interrupt(stage: Small) -> None:
        stage.beside(lambda n_bytes: True)
        raise KeyboardInterrupt

    sweep = Sweep(run, interrupt)
    reader = Reader(run, lambda stage: stage.wait_for(sweep))
    checker = Checker(run)
    checker.checks = reader
    with pytest.raises(KeyboardInterrupt):
        do_together(run, sweep, reader, checker)
    assert threading.active_count() == n_threads


def test_what_was_finished_is_kept_when_another_stage_is_resumed(tmp_path: Path) -> None:
    """A stage that was under way must not undo those that were begun beside it."""
    run = started(tmp_path)

    def sweep(stage: Small) -> None:
        stage.beside(lambda n_bytes: True)
        run.joint.wait(["reader"])

    def fail(stage: Small) -> None:
        run.joint.wait(["sweep"])
        raise Broken

    with pytest.raises(Broken):
        do_together(run, Sweep(run, sweep), Writer(run, fail), Reader(run))
    again = started(tmp_path)
    do_together(again, Sweep(again), Writer(again), Reader(again))
    assert reused(again) == {"writer": False, "sweep": True, "reader": True}
    marks = json.loads((run.work.root / "stages.json").read_text())
    assert all(mark["is_done"] for mark in marks.values())


# Whole builds


@pytest.fixture(scope="module", params=["qwen3", "qwen3.5"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec = TinyQwen3Moe() if request.param == "qwen3" else TinyQwen35Moe()
    return spec.write(tmp_path_factory.mktemp("model") / "tiny")


RECIPES = ("q4km", "q8_0")


@pytest.fixture(scope="module")
def alone(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The bundle of a build whose stages run one after the other."""
    compute = replace(CPU, threads=1)
    output = tmp_path_factory.mktemp("alone")
    return contents(build(model, output, recipes=RECIPES, name="name", compute=compute))


def overlapped(model: Path, output: Path, progress: Any = None) -> pipeline.BuildResult:
    return build(model, output, progress, recipes=RECIPES, name="name", compute=CPU)


def test_the_same_bytes_as_one_after_the_other(
    model: Path, alone: dict[str, bytes], tmp_path: Path
) -> None:
    events: list[ProgressEvent] = []
    result = overlapped(model, tmp_path, CallbackProgress(events.append))
    assert contents(result) == alone
    began = {cost.name: cost.began for cost in result.stages}
    assert began["imatrix"] <= began["export"] <= began["imatrix"] + result.stages[3].seconds
    titles = [event.title for event in events if event.kind == "begin"]
    assert "Stage 4/7: imatrix" in titles
    assert any(title.startswith("Stage 5/7: export, beside") for title in titles)
    for title in ("Writing safetensors", "Importance matrix"):
        task = [event for event in events if event.title == title]
        assert [task[0].kind, task[-1].kind] == ["begin", "end"]
        done = [event.done for event in task]
        assert done == sorted(done)


def test_layers_are_written_while_later_ones_are_computed(
    model: Path, alone: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each layer waits until the export has written what the layers before allow."""
    publish, run = GrowingEntries.publish, gguf_export._Job.run
    written = threading.Condition()
    names: list[str] = []
    found: list[str] = []

    def watched(self: Any, batch: Any) -> None:
        run(self, batch)
        with written:
            names.append(batch[0].tensor.name)
            written.notify_all()

    def after(self: GrowingEntries, entry: Any) -> None:
        if entry.name.startswith("blk.1.") and not found:
            with written:
                is_there = written.wait_for(lambda: wanted <= set(names), MOST_SECONDS)
            found.append("first" if is_there else "nothing")
        publish(self, entry)

    wanted = {"token_embd.weight", "output_norm.weight", "blk.0.ffn_down_exps.weight"}
    monkeypatch.setattr(gguf_export._Job, "run", watched)
    monkeypatch.setattr(GrowingEntries, "publish", after)
    assert contents(overlapped(model, tmp_path)) == alone
    assert found == ["first"]


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (stages, "write_pruned"), (stages, "export_model"), (verify_stage, "check_pruned"),
        (verify_stage, "check_ggufs"),
    ],
)  # fmt: skip
def test_a_stage_that_fails_ends_the_build_with_its_error(
    module: Any, name: str, model: Path, alone: dict[str, bytes], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    n_threads = threading.active_count()

    def fail(*arguments: Any, **named: Any) -> Any:
        raise OutputError("disk: full")

    with monkeypatch.context() as patch:
        patch.setattr(module, name, fail)
        with pytest.raises(Reap2ggufError, match="disk: full"):
            overlapped(model, tmp_path)
    assert threading.active_count() == n_threads
    assert [path.name for path in tmp_path.iterdir()] == [".work"]
    result = overlapped(model, tmp_path)
    assert contents(result) == alone
    assert stages_reused(result)["observe"]


def test_what_other_importance_has_made_is_written_again(
    model: Path, alone: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sweep that starts again may end in other last bits than the one before the kill."""
    publish, published = GrowingEntries.publish, list[str]()

    def other(self: GrowingEntries, entry: Any) -> None:
        published.append(entry.name)
        publish(self, replace(entry, sums=entry.sums * 1.5 + entry.sums.max()))

    with monkeypatch.context() as patch:
        patch.setattr(GrowingEntries, "publish", other)
        patch.setattr(stages, "save_both", lambda *given: stop_after_export(tmp_path))
        with pytest.raises(KeyboardInterrupt):
            overlapped(model, tmp_path)
    assert published
    journal = json.loads((tmp_path / ".work" / "name" / "export.json").read_text())
    assert len(journal["done"]) > len(published), "all tensors were written"
    result = overlapped(model, tmp_path)
    assert contents(result) == alone
    assert not stages_reused(result)["export"]


def stop_after_export(output: Path) -> None:
    """Interrupt the sweep's stage when every GGUF file has its name."""
    folder = output / ".work" / "name" / "name-GGUF"
    pause = threading.Event()
    for _ in range(MOST_SECONDS * 100):
        if len(list(folder.glob("name-*.gguf"))) == len(RECIPES):
            raise KeyboardInterrupt
        pause.wait(0.01)
    raise AssertionError


@pytest.mark.parametrize("keeps_beside", [True, False])
def test_a_pass_saves_nothing_where_the_files_beside_it_need_the_space(
    keeps_beside: bool, tmp_path: Path
) -> None:
    run = started(tmp_path, 2)
    sweep = Importance(run, None, None)  # type: ignore[arg-type]
    run.room = Room(keeps_states_beside=keeps_beside)
    assert (sweep.compute_options.resume is not None) is keeps_beside
    run.room = Room(overlaps=False, keeps_states_beside=keeps_beside)
    assert sweep.compute_options.resume is not None


@pytest.mark.parametrize(
    ("free", "device", "expected"),
    [
        (100, "cpu", (True, True)),
        (80, "cuda", (True, False)),
        (80, "cpu", (False, False)),
        (64, "cuda", (False, False)),
    ],
)
def test_a_gpu_overlaps_stages_where_only_saved_states_have_no_space(
    free: int, device: str, expected: tuple[bool, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    notes: list[str] = []
    progress = SimpleNamespace(note=notes.append)
    needs = DiskNeeds(hf=30, gguf=35, shared=0, spool=0, state=10)
    monkeypatch.setattr(room, "room_needs", lambda plan: needs)
    compute = SimpleNamespace(likely_device=device)
    plan: Any = SimpleNamespace(options=SimpleNamespace(check_space=False, compute=compute))
    work: Any = SimpleNamespace(free_bytes=lambda: free, written_bytes=lambda: 0)
    found = room.check_room(plan, work, progress)  # type: ignore[arg-type]
    assert (found.overlaps, found.keeps_states_beside) == expected
    assert any("saves no progress" in note for note in notes) is (free == 80 and device == "cuda")
