"""Sweeps whose batches go through several layers at once: the same sums as one by one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from reap2gguf.checkpoint.checkpoint import Checkpoint
from reap2gguf.errors import ObservationError
from reap2gguf.models.table import describe
from reap2gguf.observing import budget, state
from reap2gguf.observing.decoder import StreamedDecoder
from reap2gguf.observing.importance import ImportanceObserver
from reap2gguf.observing.layer_group import LayerGroup, groups_of_layers
from reap2gguf.observing.observer import LayerObserver
from reap2gguf.observing.saliency import SaliencyObserver
from reap2gguf.observing.state import StateKeeper
from reap2gguf.observing.sweep import SweepReport, sweep
from reap2gguf.options import Resume
from tests.observing.sweeps import CPU, Listener, rows_of, run_sweep
from tests.tiny import TinyQwen3Moe, TinyQwen35Moe

OBSERVERS = [SaliencyObserver, ImportanceObserver]
ROWS = rows_of(40, 40, 33, 17, 64, 9)
MARKED = 5  # a token whose rows stop being finite after some layers


def set_depth(monkeypatch: pytest.MonkeyPatch, depth: int) -> None:
    monkeypatch.setattr(budget, "_depth", lambda *_: depth)


@pytest.fixture(scope="module")
def trunk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of five layers; a row with the marked token can be told in every layer."""
    spec = TinyQwen3Moe(n_layers=5)
    folder = spec.write(tmp_path_factory.mktemp("group") / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"][MARKED, 3] = 1e5
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def with_mtp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Linear and full attention, and an MTP block."""
    return TinyQwen35Moe().write(tmp_path_factory.mktemp("mtp") / "model")


def found(
    folder: Path, kind: type[LayerObserver], rows: Any = ROWS, **more: Any
) -> tuple[dict[str, np.ndarray], SweepReport]:
    with Checkpoint.open(folder) as checkpoint:
        probe = ROWS[:2] if describe(checkpoint).facts.has_mtp else ()
    observer, report = run_sweep(kind, folder, rows, replace(CPU, **more), probe)
    return {name: np.array(sums) for name, sums in observer.finished_sums().items()}, report


def assert_same(one: dict[str, np.ndarray], other: dict[str, np.ndarray], **more: float) -> None:
    assert one.keys() == other.keys()
    assert one
    for name, sums in one.items():
        np.testing.assert_allclose(other[name], sums, err_msg=name, **{"rtol": 0.0, **more})


@pytest.mark.parametrize("kind", OBSERVERS)
@pytest.mark.parametrize("model", ["trunk", "with_mtp"])
@pytest.mark.parametrize("depth", [2, 3, 8])
def test_the_sums_are_those_of_layers_one_by_one(
    kind: type[LayerObserver],
    model: str,
    depth: int,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Bit for bit, from a disk, in several batches of rows of several lengths."""
    monkeypatch.setitem(budget.MOST_TOKENS, "cpu", 80)
    folder = request.getfixturevalue(model)
    expected = found(folder, kind)
    set_depth(monkeypatch, depth)
    assert_same(found(folder, kind, spool="disk", scratch=tmp_path)[0], expected[0])
    assert found(folder, kind)[1] == expected[1]


def test_every_layer_is_in_one_group() -> None:
    assert list(groups_of_layers(0, 6, 4, None)) == [range(4), range(4, 6)]
    assert list(groups_of_layers(0, 5, 8, 4)) == [range(4), range(4, 5)]
    assert list(groups_of_layers(4, 5, 8, 4)) == [range(4, 5)], "resumed before an MTP block"
    assert list(groups_of_layers(2, 4, 1, None)) == [range(2, 3), range(3, 4)]


@pytest.fixture
def bad_from(monkeypatch: pytest.MonkeyPatch) -> dict[int, float]:
    """Layer -> the size of what marks a row that it makes NaN."""
    run_layer, marks = StreamedDecoder.run_layer, dict[int, float]()

    def run(self: StreamedDecoder, index: int, hidden: torch.Tensor) -> torch.Tensor:
        output = run_layer(self, index, hidden)
        if index in marks:
            is_marked = (hidden[..., 3].abs() > marks[index]).any(-1)
            output[is_marked] = torch.nan
        return output

    monkeypatch.setattr(StreamedDecoder, "run_layer", run)
    return marks


@pytest.mark.slow
@pytest.mark.parametrize("kind", OBSERVERS)
@pytest.mark.parametrize("batch_tokens", [8192, 18, 1])
def test_a_row_counts_up_to_the_layer_that_makes_it_not_finite(
    kind: type[LayerObserver],
    batch_tokens: int,
    trunk: Path,
    bad_from: dict[int, float],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In the middle of a group: those before count it, and those after do not."""
    monkeypatch.setitem(budget.MOST_TOKENS, "cpu", batch_tokens)
    rows = [row + 10 for row in rows_of(*[6] * 220)]
    rows[17][2] = rows[100][4] = MARKED
    rows[100][1] = MARKED
    bad_from |= {1: 1.5e5, 3: 5e4}  # nothing is bad in layer 1
    expected, report = found(trunk, kind, rows)
    assert report.n_dropped_rows == 2
    set_depth(monkeypatch, 5)
    together, again = found(trunk, kind, rows)
    assert again == report
    assert_same(together, expected, rtol=1e-6, atol=1e-9)
    names = sorted(name for name in together if name.endswith(("count", "counts")))
    counts = {name: int(together[name].sum()) for name in names}
    assert len(set(counts.values())) > 1, "two layers counted two rows more"


def test_rows_that_end_at_different_layers(
    trunk: Path, bad_from: dict[int, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [row + 10 for row in rows_of(*[6] * 220)]
    for number in (3, 150):
        rows[number][2] = MARKED
    bad_from |= {2: 5e4}
    run_layer = StreamedDecoder.run_layer

    def earlier(self: StreamedDecoder, index: int, hidden: torch.Tensor) -> torch.Tensor:
        output = run_layer(self, index, hidden)
        if index == 1:  # the first marked row of a batch only
            marked = (hidden[..., 3].abs() > 5e4).any(-1).nonzero().flatten()
            if len(marked) > 1:
                output[marked[0]] = torch.nan
        return output

    monkeypatch.setattr(StreamedDecoder, "run_layer", earlier)
    expected, report = found(trunk, SaliencyObserver, rows)
    assert report.n_dropped_rows == 2
    set_depth(monkeypatch, 4)
    together, again = found(trunk, SaliencyObserver, rows)
    assert again == report
    assert_same(together, expected, rtol=1e-6, atol=1e-9)


def test_the_layer_that_loses_too_many_rows_is_named(
    trunk: Path, bad_from: dict[int, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    set_depth(monkeypatch, 4)
    rows = [row + 10 for row in rows_of(8, 8, 8)]
    rows[1][0] = MARKED
    bad_from[2] = 5e4
    with pytest.raises(ObservationError, match="layer 2: 1 of 3 rows are NaN"):
        run_sweep(SaliencyObserver, trunk, rows)


def test_a_batch_that_does_not_fit_counts_once(
    trunk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its first layers have run when the memory ends."""
    expected, _ = found(trunk, SaliencyObserver)
    set_depth(monkeypatch, 5)
    run_layer = StreamedDecoder.run_layer

    def narrow(self: StreamedDecoder, index: int, hidden: torch.Tensor) -> torch.Tensor:
        if index == 2 and hidden[..., 0].numel() > 100:
            raise torch.OutOfMemoryError("no more")
        return run_layer(self, index, hidden)

    monkeypatch.setattr(StreamedDecoder, "run_layer", narrow)
    together, _ = found(trunk, SaliencyObserver)
    assert_same(together, expected, rtol=1e-6)


class _Stopped(Exception):
    """A kill between two groups."""


@pytest.mark.parametrize("kind", OBSERVERS)
def test_it_resumes_between_groups(
    kind: type[LayerObserver], trunk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(state, "MOST_OF_TIME", 1e9)
    set_depth(monkeypatch, 2)
    expected, _ = found(trunk, kind)
    run, save = LayerGroup.run, StateKeeper.save
    saved: list[int] = []

    def stop(self: LayerGroup, *arguments: Any) -> Any:
        if self.layers[0] == 4:
            raise _Stopped
        return run(self, *arguments)

    def note(self: StateKeeper, layer: int, *arguments: Any) -> None:
        saved.append(layer)
        save(self, layer, *arguments)

    resume = Resume(tmp_path / "state", "key", {})
    with monkeypatch.context() as patch:
        patch.setattr(LayerGroup, "run", stop)
        patch.setattr(StateKeeper, "save", note)
        with pytest.raises(_Stopped):
            found(trunk, kind, resume=resume)
    assert saved == [2, 4]
    listener = Listener()
    observer, _ = run_sweep(kind, trunk, ROWS, replace(CPU, resume=resume), listener=listener)
    assert "resuming from layer 4 of 5" in listener.notes
    assert_same(dict(observer.finished_sums()), expected)


def test_every_entry_of_an_importance_matrix_is_published_once(
    trunk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of restored layers too, before the first group."""
    monkeypatch.setattr(state, "MOST_OF_TIME", 1e9)
    set_depth(monkeypatch, 2)
    resume = Resume(tmp_path / "state", "key", {})
    run = LayerGroup.run

    def stop(self: LayerGroup, *arguments: Any) -> Any:
        if self.layers[0] == 2:
            raise _Stopped
        return run(self, *arguments)

    def publish_all() -> list[str]:
        names: list[str] = []
        with Checkpoint.open(trunk) as checkpoint:
            model = describe(checkpoint)
            observer = ImportanceObserver(model, lambda entry: names.append(entry.name))
            options = replace(CPU, resume=resume)
            sweep(checkpoint, model, ROWS, observer, options, "test", Listener())
        assert sorted(names) == sorted(model.weighted_matrices())
        return names

    with monkeypatch.context() as patch:
        patch.setattr(LayerGroup, "run", stop)
        with pytest.raises(_Stopped):
            publish_all()
    names = publish_all()
    assert names[0].startswith("blk.0.")
