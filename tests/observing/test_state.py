"""Sweeps that are stopped after a layer and resume from their saved state."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from reap2gguf.checkpoint.checkpoint import Checkpoint
from reap2gguf.checkpoint.safetensors_header import read_metadata
from reap2gguf.errors import OutputError
from reap2gguf.models.table import describe
from reap2gguf.observing import budget, state, sweep_plan
from reap2gguf.observing.compute.ranks import Ranks
from reap2gguf.observing.importance import ImportanceObserver
from reap2gguf.observing.observer import LayerObserver
from reap2gguf.observing.saliency import SaliencyObserver
from reap2gguf.observing.spool import open_spool
from reap2gguf.observing.state import StateKeeper
from reap2gguf.observing.sweep import Sweep, SweepReport
from reap2gguf.options import ComputeOptions, Resume
from tests.observing.devices import DEVICES
from tests.observing.sweeps import Listener, rows_of, run_sweep
from tests.tiny import TinyQwen3Moe, TinyQwen35Moe

OBSERVERS = [SaliencyObserver, ImportanceObserver]
N_LAYERS = 4


ROWS = rows_of(40, 40, 33, 17, 64, 9)


@pytest.fixture(autouse=True)
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every layer is worth saving."""
    monkeypatch.setattr(state, "MOST_OF_TIME", 1e9)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of four layers."""
    return TinyQwen3Moe(n_layers=N_LAYERS).write(tmp_path_factory.mktemp("state") / "model")


def run(
    folder: Path, kind: type[LayerObserver], options: ComputeOptions
) -> tuple[Any, SweepReport, list[str]]:
    listener = Listener()
    with Checkpoint.open(folder) as checkpoint:
        probe = ROWS[:2] if describe(checkpoint).facts.has_mtp else ()
    observer, report = run_sweep(kind, folder, ROWS, options, probe, listener)
    return observer, report, listener.notes


def stop_before(
    layer: int, folder: Path, kind: type[LayerObserver], options: ComputeOptions
) -> None:
    """A sweep that is interrupted when a layer is about to begin; layers go one by one."""
    begin = Sweep.run_layers

    def stop(self: Sweep, layers: range, task: Any) -> None:
        if layers[0] == layer:
            raise KeyboardInterrupt
        begin(self, layers, task)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Sweep, "run_layers", stop)
        patch.setattr(budget, "MOST_LAYERS", 1)
        with pytest.raises(KeyboardInterrupt):
            run(folder, kind, options)


def same(one: Any, other: Any) -> bool:
    """Whether two observers have seen the same, bit for bit."""
    first, second = one.finished_sums(), other.finished_sums()
    return first.keys() == second.keys() and all(
        np.array_equal(first[name], second[name]) for name in first
    )


@pytest.fixture
def options(tmp_path: Path) -> ComputeOptions:
    return ComputeOptions(
        device="cpu", dtype="float32", scratch=tmp_path, resume=Resume(tmp_path / "x.state", "key")
    )


@pytest.mark.parametrize("layer", range(1, N_LAYERS))
@pytest.mark.parametrize("kind", OBSERVERS)
def test_a_stopped_sweep_ends_as_one_that_was_not(
    folder: Path, kind: type[LayerObserver], layer: int, options: ComputeOptions
) -> None:
    whole, report, _ = run(folder, kind, replace(options, resume=None))
    stop_before(layer, folder, kind, options)
    resumed, again, notes = run(folder, kind, options)
    assert f"resuming from layer {layer} of {N_LAYERS}" in notes
    assert same(resumed, whole)
    assert again == report


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("spool", ["device", "host", "disk"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_spool_can_be_saved(
    folder: Path, options: ComputeOptions, device: str, spool: str, dtype: str
) -> None:
    if device == "cpu" and spool == "host":
        spool = "device"  # they are one
    options = replace(options, device=device, dtype=dtype, spool=spool)
    whole, _, _ = run(folder, SaliencyObserver, replace(options, resume=None))
    stop_before(2, folder, SaliencyObserver, options)
    resumed, _, notes = run(folder, SaliencyObserver, options)
    assert f"resuming from layer 2 of {N_LAYERS}" in notes
    if device == "cpu":
        assert same(resumed, whole)
    for name, array in whole.finished_sums().items():
        np.testing.assert_allclose(resumed.finished_sums()[name], array, rtol=1e-6)


@pytest.mark.parametrize("kind", OBSERVERS)
def test_a_block_of_predictions_and_its_hits(
    tmp_path: Path, options: ComputeOptions, kind: type[LayerObserver]
) -> None:
    folder = TinyQwen35Moe().write(tmp_path / "model")
    whole, report, _ = run(folder, kind, replace(options, resume=None))
    with Checkpoint.open(folder) as checkpoint:
        last = describe(checkpoint).facts.mtp_layer
    assert last is not None
    stop_before(last, folder, kind, options)
    resumed, again, notes = run(folder, kind, options)
    assert f"resuming from layer {last} of {last + 1}" in notes
    assert same(resumed, whole)
    assert again == report
    assert again.mtp_tokens > 0


def test_dropped_rows_remain_dropped(
    tmp_path: Path, options: ComputeOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = TinyQwen3Moe(n_layers=N_LAYERS)
    folder = shape.write(tmp_path / "model")
    others = np.concatenate([*ROWS[:3], *ROWS[4:]])
    spoil_token(folder, shape, int(np.setdiff1d(ROWS[3], others)[0]))
    monkeypatch.setattr("reap2gguf.observing.sweep.MAX_BAD_ROWS", 0.5)
    whole, report, _ = run(folder, SaliencyObserver, replace(options, resume=None))
    assert report.n_dropped_rows == 1
    stop_before(3, folder, SaliencyObserver, options)
    resumed, again, notes = run(folder, SaliencyObserver, options)
    assert f"resuming from layer 3 of {N_LAYERS}" in notes
    assert same(resumed, whole)
    assert again == report


def spoil_token(folder: Path, shape: TinyQwen3Moe, token: int) -> None:
    """One token's embedding overflows, and with it every row that it is in."""
    from safetensors.torch import save_file

    tensors = shape.tensors()
    tensors["model.embed_tokens.weight"][token] = float("inf")
    save_file(tensors, folder / "model.safetensors")


def test_a_state_of_another_sweep_is_not_resumed(folder: Path, options: ComputeOptions) -> None:
    assert options.resume is not None
    other_key = replace(options, resume=Resume(options.resume.path, "another key"))
    for other in (other_key, replace(options, dtype="bfloat16")):
        stop_before(2, folder, SaliencyObserver, options)
        _, _, notes = run(folder, SaliencyObserver, other)
        assert not [note for note in notes if note.startswith("resuming")]


def test_a_state_of_other_versions_is_not_resumed(folder: Path, options: ComputeOptions) -> None:
    """One sweep is not computed half by one version of torch and half by another."""
    assert options.resume is not None
    made_with = {"reap2gguf": "0.1.0", "torch": "2.13.0"}
    options = replace(options, resume=replace(options.resume, made_with=made_with))
    stop_before(2, folder, SaliencyObserver, options)
    newer = {"reap2gguf": "0.2.0", "torch": "2.14.0"}
    resume = replace(options.resume, made_with=newer)
    _, _, notes = run(folder, SaliencyObserver, replace(options, resume=resume))
    assert (
        "x.state: the saved state was made with torch 2.13.0, now 2.14.0; starting from the first "
        "layer, so that one version computes all layers"
    ) in notes
    assert not [note for note in notes if note.startswith("resuming")]


def test_a_state_is_resumed_after_an_upgrade_of_this_program(
    folder: Path, options: ComputeOptions
) -> None:
    assert options.resume is not None
    older = replace(options.resume, made_with={"reap2gguf": "0.1.0", "torch": "2.13.0"})
    newer = replace(options.resume, made_with={"reap2gguf": "0.2.0", "torch": "2.13.0"})
    stop_before(2, folder, SaliencyObserver, replace(options, resume=older))
    _, _, notes = run(folder, SaliencyObserver, replace(options, resume=newer))
    assert f"resuming from layer 2 of {N_LAYERS}" in notes


def test_a_state_of_other_batches_is_not_resumed(
    folder: Path, options: ComputeOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_before(2, folder, SaliencyObserver, options)
    fit = budget.fit
    monkeypatch.setattr(sweep_plan, "fit", lambda *a: replace(fit(*a), batch_tokens=64))
    _, _, notes = run(folder, SaliencyObserver, options)
    assert not [note for note in notes if note.startswith("resuming")]


@pytest.mark.parametrize("place", [4, 0.2, 0.9])
def test_a_damaged_state_starts_from_the_first_layer(
    folder: Path, options: ComputeOptions, place: float
) -> None:
    assert options.resume is not None
    whole, _, _ = run(folder, SaliencyObserver, replace(options, resume=None))
    stop_before(2, folder, SaliencyObserver, options)
    path = options.resume.path
    data = path.read_bytes()
    path.write_bytes(data[: int(place if place > 1 else place * len(data))])
    resumed, _, notes = run(folder, SaliencyObserver, options)
    assert any("saved state is unreadable" in note for note in notes)
    assert same(resumed, whole)


@pytest.mark.parametrize("kind", OBSERVERS)
def test_a_state_without_all_its_sums_starts_from_the_first_layer(
    folder: Path, kind: type[LayerObserver], options: ComputeOptions
) -> None:
    assert options.resume is not None
    whole, _, _ = run(folder, kind, replace(options, resume=None))
    stop_before(2, folder, kind, options)
    path = options.resume.path
    arrays, metadata = load_file(path), read_metadata(path)
    del arrays[next(name for name in sorted(arrays) if name.endswith(("count", "counts")))]
    save_file(arrays, path, metadata)
    resumed, _, notes = run(folder, kind, options)
    assert any("saved state is unreadable" in note for note in notes)
    assert same(resumed, whole)


def test_what_costs_more_than_it_saves_is_not_saved(
    folder: Path, options: ComputeOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert options.resume is not None
    monkeypatch.setattr(state, "MOST_OF_TIME", 1e-9)
    run(folder, SaliencyObserver, options)
    assert not options.resume.path.exists()


def test_without_room_nothing_is_saved(
    folder: Path, options: ComputeOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert options.resume is not None
    usage = state.shutil.disk_usage("/")
    monkeypatch.setattr(state.shutil, "disk_usage", lambda path: usage._replace(free=100))
    _, _, notes = run(folder, SaliencyObserver, options)
    assert "not enough disk space to save progress between layers" in notes
    assert not options.resume.path.exists()


def test_a_disk_that_fails_meanwhile(
    folder: Path, options: ComputeOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.write", fail)
    with pytest.raises(OutputError, match=r"x\.state: cannot be written \(No space left"):
        run(folder, SaliencyObserver, options)


class WithOneElsewhere(Ranks):
    """Two processes, the other of which is on a machine that does not see the work folder."""

    def least(self, value: int) -> int:
        return min(value, 0)


def test_nothing_is_saved_in_a_folder_that_another_machine_does_not_see(tmp_path: Path) -> None:
    notes: list[str] = []
    with Checkpoint.open(TinyQwen3Moe().write(tmp_path / "model")) as checkpoint:
        observer = SaliencyObserver(describe(checkpoint))
    resume = Resume(tmp_path / "observe.state", "key")
    keeper = StateKeeper(resume, observer, WithOneElsewhere(0, 0, 2), 64, notes.append)
    assert keeper.load(8, torch.float32) is None
    assert notes == [
        (
            f"not every process sees {tmp_path}, so the progress between layers is not saved; an "
            "interrupted pass starts again"
        )
    ]
    spool = open_spool("device", (4, 8), torch.float32, torch.device("cpu"), tmp_path)
    assert not keeper.is_due([], spool)


class SavedElsewhere(Ranks):
    """Two processes, the other of which has saved the progress before some layers."""

    layers: ClassVar[list[int]] = []

    def gather(self, value: Any) -> list[Any]:
        return [value, self.layers]

    def least(self, value: int) -> int:
        return value


def write_state(path: Path, layer: int) -> None:
    metadata = {"key": "key", "batch_tokens": "64", "layer": str(layer)}
    save_file({"none": np.zeros(1, np.float32)}, path, metadata)


@pytest.mark.parametrize(
    ("own", "layers", "kept"),
    [
        ((2, 3), [3], 3),  # killed before this process renamed its state
        ((2, 3), [2, 3], 3),
        ((2, 3), [2], 2),  # killed before the other one had written its own
        ((2, None), [2, 3], 2),
        ((3, None), [2, 3], 3),
        ((None, 3), [3], 3),
    ],
)
def test_processes_keep_the_last_state_that_all_have(
    own: tuple[int | None, int | None], layers: list[int], kept: int, tmp_path: Path
) -> None:
    SavedElsewhere.layers = layers
    with Checkpoint.open(TinyQwen3Moe().write(tmp_path / "model")) as checkpoint:
        observer = SaliencyObserver(describe(checkpoint))
    notes: list[str] = []
    resume = Resume(tmp_path / "x.state", "key")
    keeper = StateKeeper(resume, observer, SavedElsewhere(1, 0, 2), 64, notes.append)
    path, following = tmp_path / "x.state.1-of-2", tmp_path / "x.state.1-of-2.next"
    for place, layer in zip((path, following), own, strict=True):
        if layer is not None:
            write_state(place, layer)
    keeper._choose()
    assert read_metadata(path)["layer"] == str(kept)
    assert not following.exists()
