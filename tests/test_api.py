"""The public API, used as a notebook would use it."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

import reap2gguf
from reap2gguf import (
    BuildOptions,
    CalibrationOptions,
    CheckQuants,
    ComputeOptions,
    ProgressEvent,
    PruneResult,
    QuantizeResult,
    Selection,
)
from reap2gguf.building.keys import BuildKeys
from reap2gguf.building.plan import make_plan
from reap2gguf.errors import ArtifactError, CheckpointError, OutputError, UsageError
from reap2gguf.gguf_files.imatrix_coverage import hits_line, layer_hits
from reap2gguf.options import AddOptions
from tests.tiny import EXAMPLE, TinyQwen3Moe, child_environment

CPU = ComputeOptions(device="cpu", threads=1)
TEXT = "".join(f"Line {i} says that {i} times {i} is {i * i}, and no more.\n" for i in range(60))


@dataclass
class Steps:
    """Every stage on its own, and the events that were seen meanwhile."""

    folder: Path
    model: str
    events: list[ProgressEvent] = field(default_factory=list)

    def run(self) -> Steps:
        text = self.folder / "text.txt"
        text.write_text(TEXT)
        listen: Callable[[ProgressEvent], None] = self.events.append
        self.seen = reap2gguf.observe(
            self.model,
            self.folder / "observations.safetensors",
            calibration=CalibrationOptions(str(text), samples=4, max_length=64),
            compute=CPU,
            progress=listen,
        )
        self.selection: Selection = reap2gguf.select(self.model, self.seen, keep_experts=6)
        self.pruned: PruneResult = reap2gguf.prune(
            self.model, self.seen, self.folder / "pruned", keep_experts=6, progress=listen
        )
        smaller = str(self.pruned.folder)
        self.imatrix = reap2gguf.imatrix(
            smaller, text, self.folder / "imatrix.gguf", chunk=64, compute=CPU, progress=listen
        )
        self.quantized: QuantizeResult = reap2gguf.quantize(
            smaller,
            "q8_0",
            self.folder / "model.gguf",
            imatrix=self.imatrix,
            threads=1,
            progress=listen,
        )
        self.report = reap2gguf.verify(smaller, self.quantized.path, threads=1, progress=listen)
        return self


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> Steps:
    folder = tmp_path_factory.mktemp("steps")
    return Steps(folder, str(TinyQwen3Moe().write(folder / "model"))).run()


def test_every_stage_on_its_own(steps: Steps) -> None:
    assert (steps.selection.n_experts, steps.selection.n_kept) == (8, 6)
    assert all(len(ids) == 6 for ids in steps.selection.kept.values())
    assert steps.pruned.selection == steps.selection
    assert (steps.pruned.folder / "config.json").is_file()
    assert steps.imatrix.n_chunks > 0
    assert steps.quantized.n_bytes == steps.quantized.path.stat().st_size
    assert steps.quantized.tensor_types["blk.0.attn_q.weight"] == "Q8_0"
    assert steps.report.violations == ()
    left = {path.name for path in steps.folder.iterdir()}
    assert left == {
        "model", "text.txt", "observations.safetensors", "pruned", "imatrix.gguf", "imatrix.dat",
        "model.gguf",
    }  # fmt: skip


def test_progress_is_a_function_of_events(steps: Steps) -> None:
    assert all(isinstance(event, ProgressEvent) for event in steps.events)
    titles = {event.title for event in steps.events if event.kind == "begin"}
    assert {"Observing experts", "Importance matrix", "Writing GGUF"} <= titles


def test_the_tokens_of_experts_are_told(steps: Steps) -> None:
    hits = layer_hits(steps.imatrix)
    notes = [event.text for event in steps.events if event.kind == "note"]
    assert f"imatrix: {hits_line(hits)}" in notes
    assert {len(tokens) for tokens in hits.values()} == {6}


def test_observations_may_be_a_file(steps: Steps) -> None:
    from_file = reap2gguf.select(
        steps.model, steps.folder / "observations.safetensors", keep_experts=6
    )
    assert from_file == steps.selection


def test_observations_may_be_a_link(steps: Steps, tmp_path: Path) -> None:
    """The user names this file; links inside folders are another matter."""
    (tmp_path / "link").symlink_to(steps.folder / "observations.safetensors")
    selection = reap2gguf.select(steps.model, tmp_path / "link", keep_experts=6)
    assert selection == steps.selection


@pytest.mark.parametrize("mask", [0o077, 0o027, 0o022])
def test_a_pruned_folder_obeys_the_umask(steps: Steps, tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        folder = reap2gguf.prune(
            steps.model, steps.seen, tmp_path / "pruned", keep_experts=6
        ).folder
    finally:
        os.umask(before)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o777 & ~mask
    for file in folder.iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o666 & ~mask


def test_weights_may_be_links_where_that_is_asked_for(steps: Steps, tmp_path: Path) -> None:
    model, disk = tmp_path / "model", tmp_path / "disk"
    shutil.copytree(steps.model, model)
    disk.mkdir()
    for shard in model.glob("*.safetensors"):
        shard.rename(disk / shard.name)
        shard.symlink_to(disk / shard.name)
    with pytest.raises(CheckpointError, match="pass --follow-links"):
        reap2gguf.select(model, steps.seen, keep_experts=6)
    selection = reap2gguf.select(model, steps.seen, keep_experts=6, follow_links=True)
    assert selection == steps.selection
    pruned = reap2gguf.prune(
        model, steps.seen, tmp_path / "pruned", keep_experts=6, follow_links=True
    )
    assert not [file for file in pruned.folder.iterdir() if file.is_symlink()]
    with pytest.raises(CheckpointError, match="pass --follow-links"):
        reap2gguf.quantize(model, "q8_0", tmp_path / "x.gguf", threads=1)
    reap2gguf.quantize(model, "q8_0", tmp_path / "x.gguf", threads=1, follow_links=True)
    plan = BuildOptions(
        recipes=("q8_0",), model=str(model), output=tmp_path / "out", follow_links=True
    )
    assert reap2gguf.plan(plan).target.n_kept == 6


def test_what_cannot_be_selected(steps: Steps, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="method is 'best', expected one of reap"):
        reap2gguf.select(steps.model, steps.seen, method="best")
    with pytest.raises(UsageError, match="keep-experts 9"):
        reap2gguf.select(steps.model, steps.seen, keep_experts=9)
    other = TinyQwen3Moe(seed=5).write(tmp_path / "other")
    with pytest.raises(ArtifactError, match="are of another checkpoint"):
        reap2gguf.select(str(other), steps.seen)


def test_outputs_are_refused_before_the_work(steps: Steps, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="does not exist; create it first"):
        reap2gguf.observe(steps.model, tmp_path / "no" / "file")
    with pytest.raises(OutputError, match="exists already"):
        reap2gguf.prune(steps.model, steps.seen, steps.pruned.folder)
    with pytest.raises(UsageError, match=r"name the \.gguf file"):
        reap2gguf.imatrix(steps.model, tmp_path / "text.txt", tmp_path / "imatrix.dat")


def test_a_plan_is_built(steps: Steps, tmp_path: Path) -> None:
    options = BuildOptions(
        recipes=("bf16",),
        model=steps.model,
        keep_experts=6,
        output=tmp_path,
        name="small",
        calibration=CalibrationOptions(str(steps.folder / "text.txt"), samples=4, max_length=64),
        chunk=64,
        compute=CPU,
    )
    plan = reap2gguf.plan(options)
    assert (plan.name, plan.target.n_kept) == ("small", 6)
    result = reap2gguf.build(plan)
    assert result is not None
    assert result.manifest.pruning.kept == steps.selection.kept
    assert [stage.reused for stage in result.stages] == [False] * 6
    again = reap2gguf.build(options)
    assert again is not None
    assert not again.stages


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BuildOptions(recipes=()), "recipes is empty"),
        (lambda: BuildOptions(("q8_0",), method="best"), "method is 'best', expected one of reap"),
        (lambda: BuildOptions(("q8_0",), mtp="Prune"), "mtp is 'Prune', expected one of prune"),
        (
            lambda: BuildOptions(("q8_0",), keep_experts=1.5),
            "keep_experts is 1.5, expected a whole",
        ),  # type: ignore
        (lambda: BuildOptions(("q8_0",), chunk=0), "chunk is 0, expected a whole number from 8"),
        (lambda: BuildOptions(("q8_0",), output=3), "output is 3, expected a path"),  # type: ignore
        (lambda: CalibrationOptions(samples=0), "samples is 0, expected a whole number from 1"),
        (lambda: CalibrationOptions(max_length=1), "max_length is 1, expected a whole number"),
        (lambda: ComputeOptions(device="gpu"), "device is 'gpu', expected one of auto, cpu"),
        (lambda: ComputeOptions(dtype="fp16"), "dtype is 'fp16', expected one of auto, float32"),
        (lambda: ComputeOptions(spool="ram"), "spool is 'ram', expected one of auto, device"),
        (
            lambda: ComputeOptions(check_quants="few"),  # type: ignore[arg-type]
            "check_quants is 'few', expected one of all, sample, none",
        ),
        (
            lambda: reap2gguf.add("b", recipes="q8_0", check_quants=None),  # type: ignore[arg-type]
            "check_quants is None, expected one of all, sample, none",
        ),
        (
            lambda: reap2gguf.add("b", recipes="q8_0", device="gpu"),
            "device is 'gpu', expected one of auto, cpu, cuda",
        ),
        (
            lambda: reap2gguf.quantize("model", "q8_0", "b", device="gpu"),
            "device is 'gpu', expected one of auto, cpu, cuda",
        ),
        (
            lambda: AddOptions(Path("b"), ("q8_0",), compute="cpu"),  # type: ignore[arg-type]
            "compute is 'cpu', expected a value of ComputeOptions",
        ),
        (lambda: ComputeOptions(threads=0), "threads is 0, expected a whole number from 1"),
    ],
)
def test_options_are_refused_where_they_are_made(make: Callable[[], object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make()


def test_options_take_text_for_paths() -> None:
    options = BuildOptions("q8_0", model=Path("model"), output="out", imatrix_text="text.txt")  # type: ignore[arg-type]
    assert options.recipes == ("q8_0",)
    assert options.model == "model"
    assert (options.output, options.imatrix_text) == (Path("out"), Path("text.txt"))


def test_what_is_checked_is_no_part_of_a_key() -> None:
    """How much is compared changes no byte, so a build with another choice reuses everything."""
    assert ComputeOptions(check_quants="none").check_quants is CheckQuants.NONE  # type: ignore[arg-type]
    assert [one.share for one in CheckQuants] == [1.0, 0.001, 0.0]

    def keys_of(choice: CheckQuants) -> BuildKeys:
        compute = ComputeOptions(check_quants=choice)
        return BuildKeys(make_plan(BuildOptions(("q8_0",), str(EXAMPLE), compute=compute)))

    keys = [keys_of(choice) for choice in CheckQuants]
    assert len({one.texts for one in keys}) == 1
    assert len({repr(one.inputs) for one in keys}) == 1


def test_every_public_name_is_there_and_documented() -> None:
    for name in reap2gguf.__all__:
        assert (getattr(reap2gguf, name).__doc__ or "").strip(), name
    assert set(reap2gguf.__all__) <= set(dir(reap2gguf))
    with pytest.raises(AttributeError, match="no attribute 'bild'"):
        reap2gguf.bild  # noqa: B018


def test_importing_the_library_loads_no_torch() -> None:
    script = (
        "import sys, reap2gguf; reap2gguf.BuildOptions; reap2gguf.build\n"
        "print([name for name in ('torch', 'transformers', 'gguf') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True, text=True, check=True, env=child_environment({}),
    )  # fmt: skip
    assert done.stdout == "[]\n"
