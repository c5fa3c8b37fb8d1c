"""What a sweep does besides summing: batches, rows that are dropped, memory that runs out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from reap2gguf.artifacts.observations import LayerObservation
from reap2gguf.errors import CheckpointError, ObservationError, UsageError
from reap2gguf.observing import budget
from reap2gguf.observing.decoder import StreamedDecoder
from reap2gguf.observing.loader import WeightLoader
from reap2gguf.observing.saliency import SaliencyObserver
from reap2gguf.observing.spool import DeviceSpool, FileSpool, Span
from reap2gguf.observing.sweep_plan import SweepPlan
from tests.families.glm import GLM45
from tests.observing.sweeps import CPU, Listener, rows_of, run_sweep
from tests.tiny import TinyQwen3Moe

ROWS = rows_of(20, 20, 20, 20, 13, 5)
Layers = dict[int, LayerObservation]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of two layers, which no test changes."""
    return TinyQwen3Moe().write(tmp_path_factory.mktemp("sweep") / "model")


@pytest.fixture(scope="module")
def expected(folder: Path) -> Layers:
    """The sums over ROWS, of one batch in memory."""
    observer, _ = run_sweep(SaliencyObserver, folder, ROWS)
    return observer.layers


def assert_close(found: Layers, expected: Layers) -> None:
    """The same sums, as far as rounding allows."""
    assert found.keys() == expected.keys()
    for layer, sums in expected.items():
        np.testing.assert_array_equal(found[layer].count, sums.count)
        np.testing.assert_allclose(found[layer].reap_sum, sums.reap_sum, rtol=1e-5)


def test_batching_changes_nothing(
    folder: Path, expected: Layers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(budget.MOST_TOKENS, "cpu", 1)
    apart, _ = run_sweep(SaliencyObserver, folder, ROWS)
    assert_close(apart.layers, expected)


def test_a_spool_on_disk_changes_nothing(folder: Path, expected: Layers, tmp_path: Path) -> None:
    options = replace(CPU, spool="disk", scratch=tmp_path)
    there, _ = run_sweep(SaliencyObserver, folder, ROWS, options)
    for layer, sums in expected.items():
        np.testing.assert_array_equal(there.layers[layer].reap_sum, sums.reap_sum)


@pytest.fixture
def turning(monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes go through the batches as on a GPU whose hidden states wait on a disk."""
    way = SweepPlan.way
    monkeypatch.setattr(SweepPlan, "way", lambda plan, at, _: way(plan, at, torch.device("cuda")))


@pytest.mark.usefixtures("turning")
def test_passes_may_turn_at_the_last_batch(
    folder: Path, expected: Layers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[int] = []
    load = FileSpool.load

    def loaded(spool: FileSpool, span: Span, following: Span | None = None) -> torch.Tensor:
        begun.append(span[0])
        return load(spool, span, following)

    monkeypatch.setattr(FileSpool, "load", loaded)
    monkeypatch.setitem(budget.MOST_TOKENS, "cpu", 18)
    options = replace(CPU, spool="disk", scratch=tmp_path)
    observer, _ = run_sweep(SaliencyObserver, folder, ROWS, options)
    assert_close(observer.layers, expected)
    first, second = begun[: len(begun) // 2], begun[len(begun) // 2 :]
    assert len(first) > 2
    assert first == sorted(first, reverse=True)
    assert second == sorted(first)


def test_bfloat16_stays_near_float32(folder: Path, expected: Layers) -> None:
    half, _ = run_sweep(SaliencyObserver, folder, ROWS, replace(CPU, dtype="bfloat16"))
    for layer, sums in expected.items():
        total = sums.reap_sum.sum()
        assert half.layers[layer].reap_sum.sum() == pytest.approx(total, rel=0.05)


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in which the embedding of token 5 is not a number."""
    spec = TinyQwen3Moe()
    folder = spec.write(tmp_path_factory.mktemp("poisoned") / "model")
    tensors = spec.tensors()
    tensors["model.embed_tokens.weight"][5, 3] = float("nan")
    save_file(tensors, folder / "model.safetensors")
    return folder


FINITE = [row + 10 for row in rows_of(*[6] * 120)]


@pytest.fixture(scope="module")
def finite(poisoned: Path) -> Layers:
    """The sums over FINITE, which are free of token 5."""
    observer, _ = run_sweep(SaliencyObserver, poisoned, FINITE)
    return observer.layers


@pytest.mark.parametrize(("batch_tokens", "spool"), [(8192, "device"), (18, "disk"), (1, "device")])
def test_a_row_that_is_not_finite_counts_nowhere(
    batch_tokens: int,
    spool: str,
    poisoned: Path,
    finite: Layers,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    """Among all others, among a few, and alone in its batch."""
    monkeypatch.setitem(budget.MOST_TOKENS, "cpu", batch_tokens)
    bad = FINITE[17].copy()
    bad[2] = 5
    if spool == "disk":
        request.getfixturevalue("turning")
    options = replace(CPU, spool=spool, scratch=tmp_path)
    rows = [*FINITE[:17], bad, *FINITE[17:]]
    observer, report = run_sweep(SaliencyObserver, poisoned, rows, options)
    assert report.n_dropped_rows == 1
    assert_close(observer.layers, finite)


def test_too_many_rows_that_are_not_finite_stop_the_sweep(poisoned: Path) -> None:
    rows = [row + 10 for row in rows_of(8, 8, 8)]
    rows[1][0] = 5
    with pytest.raises(
        ObservationError,
        match=r"layer 0: 1 of 3 rows are NaN .* 'model\.embed_tokens\.weight' of .* holds NaN",
    ):
        run_sweep(SaliencyObserver, poisoned, rows)


@pytest.mark.parametrize(
    ("name", "fused"),
    [
        ("model.layers.1.self_attn.o_proj.weight", False),
        ("model.layers.1.mlp.gate.weight", False),
        ("model.layers.1.mlp.experts.3.up_proj.weight", False),
        ("model.layers.1.mlp.experts.gate_up_proj", True),
        ("model.layers.1.input_layernorm.weight", False),
    ],
)
def test_the_weight_that_is_not_finite_is_named(name: str, fused: bool, tmp_path: Path) -> None:
    folder = TinyQwen3Moe(fused=fused, top_k=8).write(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors[name].view(-1)[-1] = float("nan")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ObservationError, match=f"layer 1: .* '{name}' of {folder} holds NaN"):
        run_sweep(SaliencyObserver, folder, rows_of(8, 8))


def test_the_norm_before_an_mtp_block_is_named_where_it_is_not_finite(tmp_path: Path) -> None:
    folder = GLM45.write(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][0] = float("inf")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    match = r"layer 3: .* 'model\.norm\.weight' of .* holds NaN"
    with pytest.raises(ObservationError, match=match):
        run_sweep(SaliencyObserver, folder, rows_of(8, 8))


def test_values_that_overflow_are_told_from_damaged_weights(tmp_path: Path) -> None:
    folder = TinyQwen3Moe().write(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    for name in tensors:
        if "layers.0.mlp.experts" in name:
            tensors[name].fill_(1e30)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        ObservationError,
        match=r"layer 0: .*all weights .* finite, so values overflow",
    ):
        run_sweep(SaliencyObserver, folder, rows_of(8, 8))


def test_a_layer_that_does_not_fit_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    take = WeightLoader.take

    def take_less(self: WeightLoader, key: str) -> dict[str, torch.Tensor]:
        tensors = take(self, key)
        if key == "layer 1":
            tensors["self_attn.q_proj.weight"] = tensors["self_attn.q_proj.weight"][1:]
        return tensors

    monkeypatch.setattr(WeightLoader, "take", take_less)
    with pytest.raises(CheckpointError, match=r"layer 1 does not fit .*q_proj"):
        run_sweep(SaliencyObserver, folder, rows_of(8))


@pytest.mark.parametrize("where", ["computing", "loading", "storing"])
def test_a_batch_that_does_not_fit_is_halved(
    where: str, folder: Path, expected: Layers, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers_begun = 0
    run_layer, load, store = StreamedDecoder.run_layer, DeviceSpool.load, DeviceSpool.store

    def check(n_positions: int, here: str) -> None:
        if here == where and layers_begun and n_positions > 40:
            raise torch.OutOfMemoryError("no more")

    def narrow_run(self: StreamedDecoder, index: int, hidden: torch.Tensor) -> torch.Tensor:
        output = run_layer(self, index, hidden)
        check(output[..., 0].numel(), "computing")
        return output

    def narrow_load(self: DeviceSpool, span: Any, following: Any = None) -> torch.Tensor:
        check(span[1] - span[0], "loading")
        return load(self, span, following)

    def narrow_store(self: DeviceSpool, span: Any, hidden: torch.Tensor) -> None:
        check(len(hidden), "storing")
        store(self, span, hidden)

    class Counting(SaliencyObserver):
        def attach(self, index: int, layer: torch.nn.Module) -> None:
            nonlocal layers_begun
            layers_begun += 1
            super().attach(index, layer)

    monkeypatch.setattr(StreamedDecoder, "run_layer", narrow_run)
    monkeypatch.setattr(DeviceSpool, "load", narrow_load)
    monkeypatch.setattr(DeviceSpool, "store", narrow_store)
    listener = Listener()
    halved, report = run_sweep(Counting, folder, ROWS, listener=listener)
    assert report.n_dropped_rows == 0
    n_halved = sum("splitting it in half" in note for note in listener.notes)
    assert n_halved == 3, "120 positions become 2 x 30 and 2 x 30, in the first layer only"
    assert_close(halved.layers, expected)


def test_one_row_that_does_not_fit_is_an_error(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(self: StreamedDecoder, index: int, hidden: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("no more")

    monkeypatch.setattr(StreamedDecoder, "run_layer", never)
    with pytest.raises(ObservationError, match="not enough GPU memory for one row of 20 tokens"):
        run_sweep(SaliencyObserver, folder, rows_of(20, 20, 20))


def test_weights_that_cannot_be_prefetched_are_read_when_needed(
    folder: Path, expected: Layers, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask, tries = StreamedDecoder.ask_layer, []

    def fail_once(self: StreamedDecoder, index: int) -> None:
        tries.append(index)
        if len(tries) == 1:
            raise torch.OutOfMemoryError("no more")
        ask(self, index)

    monkeypatch.setattr(StreamedDecoder, "ask_layer", fail_once)
    listener = Listener()
    observer, _ = run_sweep(SaliencyObserver, folder, ROWS, listener=listener)
    assert "not enough GPU memory to prefetch weights" in listener.notes
    assert tries == [0, 0, 1], "one try to prefetch, then each layer when it is needed"
    assert_close(observer.layers, expected)


def test_memory_that_runs_out_elsewhere_is_an_error(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(self: StreamedDecoder) -> None:
        raise torch.OutOfMemoryError("no more")

    monkeypatch.setattr(StreamedDecoder, "load_embedding", never)
    with pytest.raises(ObservationError, match="not enough GPU memory for the layers and activ"):
        run_sweep(SaliencyObserver, folder, rows_of(8))


def test_a_limit_that_is_too_small_is_an_error(folder: Path) -> None:
    with pytest.raises(UsageError, match=r"--memory 8 bytes is too small; .* at least [0-9.]+ GiB"):
        run_sweep(SaliencyObserver, folder, ROWS, replace(CPU, memory=8))
