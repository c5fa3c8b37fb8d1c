"""What a GPU would compile before the first batch, run on the CPU: it changes no result."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from reap2gguf.checkpoint.checkpoint import Checkpoint
from reap2gguf.models.table import describe
from reap2gguf.observing import sweep as sweep_module
from reap2gguf.observing import warm_up as module
from reap2gguf.observing.batches import group, padded_batches
from reap2gguf.observing.decoder import StreamedDecoder
from reap2gguf.observing.importance import ImportanceObserver
from reap2gguf.observing.observer import LayerObserver
from reap2gguf.observing.saliency import SaliencyObserver
from reap2gguf.observing.warm_up import warm_up
from reap2gguf.options import ComputeOptions
from reap2gguf.progress import COMPILING
from tests.observing.devices import GPU
from tests.observing.sweeps import Listener, rows_of, run_sweep
from tests.tiny import TinyQwen35Moe

ROWS = rows_of(64, 64, 40)


@pytest.fixture
def qwen35(tmp_path: Path) -> Path:
    return TinyQwen35Moe().write(tmp_path / "model")


@contextmanager
def decoder_of(folder: Path) -> Iterator[StreamedDecoder]:
    with Checkpoint.open(folder) as checkpoint:
        model = describe(checkpoint)
        decoder = StreamedDecoder(checkpoint, model, torch.float32, torch.device("cpu"))
        with closing(decoder):
            yield decoder


def ready(decoder: StreamedDecoder) -> list[Any]:
    """Batches whose arguments are recorded, as they are before the first layer."""
    batches = padded_batches(group(ROWS, 128), observed=True)
    decoder.load_embedding()
    for batch in batches:
        decoder.record(batch.tokens)
    decoder.drop_embedding()
    return batches


def test_one_layer_of_each_kind(qwen35: Path, example: Path) -> None:
    with decoder_of(qwen35) as decoder:
        kinds = decoder.first_of_each_kind(range(decoder.model.facts.n_blocks))
        assert len(kinds) == 2, "linear attention and full attention; the MTP block is neither"
        assert kinds[0] == 0
        assert decoder.first_of_each_kind(range(1, 2)) == [1]
    with decoder_of(example) as decoder:
        assert decoder.first_of_each_kind(range(decoder.model.facts.n_blocks)) == [0]


@pytest.mark.parametrize("kind", [SaliencyObserver, ImportanceObserver])
def test_each_kind_runs_once_and_leaves_nothing(
    kind: type[LayerObserver], qwen35: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listener = Listener()
    with decoder_of(qwen35) as decoder:
        batches, ran = ready(decoder), []
        run = decoder.run_layer

        def recorded(index: int, hidden: torch.Tensor) -> torch.Tensor:
            ran.append((index, tuple(hidden.shape)))
            return run(index, hidden)

        monkeypatch.setattr(decoder, "run_layer", recorded)
        observer = kind(decoder.model)
        blocks = range(decoder.model.facts.n_blocks)
        kinds = decoder.first_of_each_kind(blocks)
        warm_up(decoder, observer, blocks, batches, listener)
        shape = (*batches[0].tokens.shape, decoder.model.facts.hidden_size)
        assert ran == [(index, shape) for index in kinds]
        assert listener.notes == []
        assert not observer.finished_sums(), "it has seen nothing"
        for index in kinds:
            layer = decoder._layers[index]
            assert {value.device.type for value in layer.parameters()} == {"meta"}
            assert not any(part._forward_pre_hooks for part in layer.modules())


def test_results_are_the_same(example: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without, _ = run_sweep(ImportanceObserver, example, ROWS)
    calls = []

    def counted(*arguments: Any) -> None:
        calls.append(arguments)
        warm_up(*arguments)

    monkeypatch.setattr(sweep_module, "warm_up", counted)
    monkeypatch.setattr(sweep_module, "has_triton", lambda device: True)
    having, _ = run_sweep(ImportanceObserver, example, ROWS)
    assert len(calls) == 1
    assert having.entries.keys() == without.entries.keys()
    for name, entry in without.entries.items():
        np.testing.assert_array_equal(having.entries[name].sums, entry.sums)
        np.testing.assert_array_equal(having.entries[name].counts, entry.counts)


def test_a_cpu_compiles_nothing(example: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*arguments: Any) -> None:
        raise AssertionError("nothing is compiled for a CPU")

    monkeypatch.setattr(sweep_module, "warm_up", never)
    run_sweep(SaliencyObserver, example, ROWS)


def test_too_little_memory_is_a_note(example: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(index: int, hidden: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\n  More")

    listener = Listener()
    with decoder_of(example) as decoder:
        batches = ready(decoder)
        monkeypatch.setattr(decoder, "run_layer", full)
        observer = ImportanceObserver(decoder.model)
        warm_up(decoder, observer, range(2), batches, listener)
        layer = decoder._layers[0]
        assert not any(part._forward_pre_hooks for part in layer.modules())
    assert listener.notes == [
        "kernels could not be compiled before the first batch: CUDA out of memory"
    ]


def test_a_process_without_rows_compiles_nothing(example: Path) -> None:
    with decoder_of(example) as decoder:
        warm_up(decoder, SaliencyObserver(decoder.model), range(2), [], Listener())
        assert not decoder.loader.has("layer 0")


def test_it_says_so_where_it_takes_long(example: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    titles: list[str] = []

    @contextmanager
    def announced(progress: Any, title: str) -> Iterator[None]:
        titles.append(title)
        yield

    monkeypatch.setattr(module, "working_if_long", announced)
    with decoder_of(example) as decoder:
        batches = ready(decoder)
        warm_up(decoder, SaliencyObserver(decoder.model), range(2), batches, Listener())
    assert titles == [COMPILING]


@pytest.mark.gpu
@GPU[1]
def test_the_first_batch_compiles_nothing(
    qwen35: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every kernel that the sweep runs has been run before it."""
    triton = pytest.importorskip("triton")
    compiled: list[str] = []
    monkeypatch.setattr(
        triton.knobs.runtime,
        "jit_post_compile_hook",
        lambda **facts: compiled.append(facts["fn"].name),
    )
    seen: list[list[str]] = []

    def counted(*arguments: Any) -> None:
        warm_up(*arguments)
        seen.append(list(compiled))
        compiled.clear()

    monkeypatch.setattr(sweep_module, "warm_up", counted)
    run_sweep(SaliencyObserver, qwen35, rows_of(512, 512), ComputeOptions("cuda"))
    assert seen
    assert not {name for name in compiled if name.startswith("_")}, "kernels of ours"
