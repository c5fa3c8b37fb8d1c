"""Every read of the pruned view is the same read of the folder that is written from it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reap2gguf.checkpoint.checkpoint import Checkpoint
from reap2gguf.errors import CheckpointError, UsageError
from reap2gguf.models.contract import MoeModel
from reap2gguf.models.description import ModelFacts
from reap2gguf.models.table import describe
from reap2gguf.progress import Silent
from reap2gguf.pruning.select import Kept
from reap2gguf.pruning.view import PrunedView
from reap2gguf.pruning.write import write_pruned
from tests.tiny import TinyQwen3Moe, TinyQwen35Moe

SMALL = {"hidden": 16, "width": 8, "vocab": 64}
SPECS: dict[str, tuple[TinyQwen3Moe | TinyQwen35Moe, bool]] = {
    "qwen3-2d": (TinyQwen3Moe(**SMALL, n_shards=2), True),
    "qwen3-3d": (TinyQwen3Moe(**SMALL, fused=True, dtype=torch.float32), True),
    "qwen3-dense-layer": (TinyQwen3Moe(**SMALL, n_layers=3, dense_layers=(1,)), True),
    "qwen3.5-mtp": (TinyQwen35Moe(**SMALL, layers="lf"), True),
    "qwen3.5-mtp-3d": (TinyQwen35Moe(**SMALL, layers="lf", fused_mtp=True), True),
    "qwen3.5-mtp-dropped": (TinyQwen35Moe(**SMALL, layers="lf"), False),
    "qwen3.5-flat-2d": (TinyQwen35Moe(**SMALL, layers="lf", fused=False, nested=False), True),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Model]]:
    """The source of every layout, opened once."""
    with ExitStack() as stack:
        found = {}
        for which, (spec, keep_mtp) in SPECS.items():
            folder = spec.write(tmp_path_factory.mktemp("source") / which)
            source = stack.enter_context(Checkpoint.open(folder))
            found[which] = Model(source, describe(source, keep_mtp=keep_mtp))
        yield found


@dataclass(frozen=True)
class Model:
    source: Checkpoint
    described: MoeModel

    def view(self, kept: Kept | None = None) -> PrunedView:
        """By default, every layer keeps the same five experts, with gaps and neighbours."""
        ids = dict.fromkeys(self.described.facts.moe_layers, (0, 1, 4, 6, 7))
        return PrunedView(self.source, self.described, ids if kept is None else kept)


@dataclass(frozen=True)
class Pair:
    view: PrunedView
    written: Checkpoint


@contextmanager
def written(view: PrunedView, max_shard_bytes: int = 10**9) -> Iterator[Pair]:
    with tempfile.TemporaryDirectory() as name:
        write_pruned(view, Path(name), Silent(), max_shard_bytes)
        with Checkpoint.open(Path(name)) as checkpoint:
            yield Pair(view, checkpoint)


@st.composite
def kept_maps(draw: st.DrawFn, facts: ModelFacts) -> dict[int, tuple[int, ...]]:
    count = draw(st.integers(facts.experts_per_token, facts.n_experts))
    ids = st.permutations(range(facts.n_experts)).map(lambda order: tuple(sorted(order[:count])))
    return {layer: draw(ids) for layer in facts.moe_layers}


@pytest.mark.slow
@settings(max_examples=15)
@pytest.mark.parametrize("which", SPECS)
@given(data=st.data())
def test_every_read_is_that_of_the_written_folder(
    models: dict[str, Model], which: str, data: Any
) -> None:
    model = models[which]
    with written(model.view(data.draw(kept_maps(model.described.facts)))) as pair:
        view, folder = pair.view, pair.written
        assert view.config == folder.config
        assert list(view.tensors) == list(folder.tensors)
        assert (view.n_bytes, view.n_parameters) == (folder.n_bytes, folder.n_parameters)
        assert view.model.facts == describe(folder).facts
        assert view.model.config_at_odds() is None
        for name, stored in folder.tensors.items():
            seen = view.tensors[name]
            assert (seen.name, seen.dtype, seen.shape) == (name, stored.dtype, stored.shape)
            np.testing.assert_array_equal(view.read(name), folder.read(name))
            check_parts(pair, name, data)


def check_parts(pair: Pair, name: str, data: Any) -> None:
    """Some rows, some rows of an entry, and some bytes of a tensor."""
    view, folder = pair.view, pair.written
    shape, n_bytes = folder.tensors[name].shape, folder.tensors[name].n_bytes
    first = data.draw(st.integers(0, shape[0]))
    last = data.draw(st.integers(first, shape[0]))
    index = data.draw(st.integers(0, shape[0] - 1))
    reads: list[tuple[int, int | None, int | None]] = [(first, last, None), (0, None, index)]
    if len(shape) > 1:
        begin = data.draw(st.integers(0, shape[1]))
        reads.append((begin, data.draw(st.integers(begin, shape[1])), index))
    for read in reads:
        view.expect(name, *read)
        np.testing.assert_array_equal(view.read(name, *read), folder.read(name, *read))
        np.testing.assert_array_equal(
            view.read_float32(name, *read), folder.read_float32(name, *read)
        )
    first_byte = data.draw(st.integers(0, n_bytes))
    size = data.draw(st.integers(0, n_bytes - first_byte))
    found, wanted = np.empty(size, np.uint8), np.empty(size, np.uint8)
    view.read_bytes(name, first_byte, found)
    folder.read_bytes(name, first_byte, wanted)
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("which", ["qwen3-2d", "qwen3.5-mtp"])
def test_shards_do_not_change_what_is_read(models: dict[str, Model], which: str) -> None:
    with written(models[which].view(), max_shard_bytes=3000) as pair:
        assert len(pair.written.shards) > 2
        assert list(pair.view.tensors) == list(pair.written.tensors)
        for name in pair.view.tensors:
            np.testing.assert_array_equal(pair.view.read(name), pair.written.read(name))


def test_gguf_tensors_are_those_of_the_written_folder(models: dict[str, Model]) -> None:
    with written(models["qwen3.5-mtp"].view()) as pair:
        model, again = pair.view.model, describe(pair.written)
        assert [t.name for t in model.gguf_tensors(pair.view.tensors)] == [
            t.name for t in again.gguf_tensors(pair.written.tensors)
        ]
        (side,) = model.side_files(pair.view.folder, pair.view.tensors)
        (side_again,) = again.side_files(pair.written.folder, pair.written.tensors)
        assert [t.name for t in side.tensors] == [t.name for t in side_again.tensors]
        assert side.values == side_again.values


def test_neighbours_in_the_source_are_one_read(models: dict[str, Model]) -> None:
    view = models["qwen3-3d"].view()
    name = "model.layers.0.mlp.experts.down_proj"
    entry = view.tensors[name].n_bytes // 5
    assert list(view._source_runs(name, 0, 5 * entry)) == [
        (0, 2 * entry),
        (4 * entry, entry),
        (6 * entry, 2 * entry),
    ]
    assert list(view._source_runs(name, entry + 8, 2 * entry)) == [
        (entry + 8, entry - 8),
        (4 * entry, entry),
        (6 * entry, 8),
    ]


def test_where_tensors_come_from(models: dict[str, Model]) -> None:
    view = models["qwen3-2d"].view()
    base = "model.layers.1.mlp."
    assert view.origin(f"{base}experts.3.up_proj.weight", 2) == (
        f"{base}experts.6.up_proj.weight",
        2,
    )
    assert view.origin(f"{base}gate.weight", 3) == (f"{base}gate.weight", 6)
    assert view.origin("model.norm.weight") == ("model.norm.weight", 0)


def test_a_view_of_a_view(models: dict[str, Model]) -> None:
    once = models["qwen3-3d"].view()
    twice = PrunedView(once, once.model, dict.fromkeys((0, 1), (1, 2, 4)))
    name = "model.layers.1.mlp.experts.gate_up_proj"
    wanted = models["qwen3-3d"].source.read(name)[[1, 4, 7]]
    np.testing.assert_array_equal(twice.read(name), wanted)
    assert twice.origin(name, 1) == (name, 4)


def test_a_dropped_block_is_not_there(models: dict[str, Model]) -> None:
    view = models["qwen3.5-mtp-dropped"].view()
    assert not view.model.facts.has_mtp
    assert not any(name.startswith("mtp.") for name in view.tensors)
    assert view.config["text_config"]["mtp_num_hidden_layers"] == 0


def test_threads_share_a_view(models: dict[str, Model]) -> None:
    with written(models["qwen3-3d"].view()) as pair, ThreadPoolExecutor(8) as pool:
        names = list(pair.view.tensors) * 20
        for name, found in zip(names, pool.map(pair.view.read, names), strict=True):
            np.testing.assert_array_equal(found, pair.written.read(name))


def test_what_is_not_there_is_not_read(models: dict[str, Model]) -> None:
    view = models["qwen3-2d"].view()
    with pytest.raises(CheckpointError, match="no tensor 'gone'"):
        view.read("gone")
    with pytest.raises(CheckpointError, match=r"'model\.norm\.weight' has 32 bytes, not 34"):
        view.read("model.norm.weight", 0, 17)
    with pytest.raises(CheckpointError, match=r"gate\.weight' has 160 bytes, not 192"):
        view.expect("model.layers.0.mlp.gate.weight", 5, 6)


@pytest.mark.parametrize(
    ("kept", "problem"),
    [
        ({0: (0, 1)}, r"of layers \[0\], expected the model's MoE layers \[0, 1\]"),
        ({0: (0, 1), 1: (0, 1, 2)}, "layer 1 keeps 3 experts, expected 2"),
        ({0: (), 1: ()}, "layer 0 keeps 0 experts"),
        ({0: (0, 1), 1: (1, 0)}, r"layer 1 keeps the experts \[1, 0\], expected ascending"),
        ({0: (0, 1), 1: (1, 8)}, "from 0 to 7"),
        ({0: (0, 1), 1: (2, 2)}, r"layer 1 keeps the experts \[2, 2\]"),
    ],
)
def test_a_map_that_does_not_fit(models: dict[str, Model], kept: Kept, problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        models["qwen3-2d"].view(kept)
