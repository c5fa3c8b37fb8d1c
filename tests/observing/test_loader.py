"""Weights read in the background are those that are stored."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from reap2gguf.checkpoint.checkpoint import Checkpoint
from reap2gguf.errors import CheckpointError
from reap2gguf.models.table import describe
from reap2gguf.observing import loader as loader_module
from reap2gguf.observing.loader import ByteRun, Columns, WeightLoader, _buffer_sized, _within
from reap2gguf.observing.readers import Readers
from reap2gguf.observing.targets import layer_targets, whole
from tests.observing.devices import DEVICES
from tests.tiny import TinyQwen3Moe, TinyQwen35Moe


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer(
    device: str, fused: bool, stored: torch.dtype, dtype: torch.dtype, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(loader_module, "BUFFER_BYTES", 1 << 12)  # so that tensors are cut
    folder = TinyQwen3Moe(fused=fused, dtype=stored).write(tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    with Checkpoint.open(folder) as checkpoint:
        model = describe(checkpoint)
        readers = Readers(torch.device(device), 3)
        loader = WeightLoader(checkpoint, torch.device(device), readers)
        for index in range(model.facts.n_layers):
            loader.ask(f"{index}", layer_targets(checkpoint, model, index, dtype, True))
        for index in range(model.facts.n_layers):
            found = {name: tensor.cpu() for name, tensor in loader.take(f"{index}").items()}
            for name, expected in layer_by_hand(weights, index, fused).items():
                assert torch.equal(found.pop(name), expected.to(dtype)), name
            assert not found
        loader.close()
        readers.close()
    assert loader.seconds_waited > 0


def layer_by_hand(
    weights: dict[str, torch.Tensor], index: int, fused: bool
) -> dict[str, torch.Tensor]:
    prefix = f"model.layers.{index}."
    own = {n.removeprefix(prefix): w for n, w in weights.items() if n.startswith(prefix)}
    if fused:
        return own
    plain = {name: w for name, w in own.items() if ".experts." not in name}
    parts = {
        kind: torch.stack([own[f"mlp.experts.{e}.{kind}_proj.weight"] for e in range(8)])
        for kind in ("gate", "up", "down")
    }
    plain["mlp.experts.gate_up_proj"] = torch.cat((parts["gate"], parts["up"]), dim=1)
    plain["mlp.experts.down_proj"] = parts["down"]
    return plain


def test_experts_that_are_not_widened_keep_their_type(tiny: Path) -> None:
    with Checkpoint.open(tiny) as checkpoint:
        targets = layer_targets(checkpoint, describe(checkpoint), 0, torch.float32, False)
    assert targets["mlp.experts.down_proj"].dtype == torch.bfloat16
    assert targets["mlp.gate.weight"].dtype == torch.float32


def test_a_file_that_was_cut_is_said_by_whoever_takes(tiny: Path) -> None:
    with Checkpoint.open(tiny) as checkpoint:
        name = "model.layers.1.self_attn.q_proj.weight"
        with (tiny / "model.safetensors").open("r+b") as file:
            file.truncate(checkpoint.tensors[name].offset + 10)
        readers = Readers(torch.device("cpu"), 2)
        loader = WeightLoader(checkpoint, torch.device("cpu"), readers)
        loader.ask("q", {"q": whole(checkpoint, name, torch.float32)})
        with pytest.raises(CheckpointError, match=r"ends inside tensor .*q_proj.weight': 10 of"):
            loader.take("q")
        loader.close()
        readers.close()


@given(
    st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 3), st.integers(1, 40)), max_size=30),
    st.integers(2, 64),
)
def test_cut_and_joined_runs_cover_the_same_bytes(
    runs: list[tuple[str, int, int]], buffer_bytes: int
) -> None:
    chosen, start, byte = [], 0, {"a": 0, "b": 0}
    for stored, gap, n_values in runs:
        byte[stored] += 2 * gap
        chosen.append(ByteRun(stored, torch.bfloat16, byte[stored], n_values, start))
        byte[stored] += 2 * n_values
        start += n_values

    def cells(runs: list[ByteRun]) -> list[tuple[int, str, int]]:
        return sorted(
            (run.target_start + i, run.stored, run.first_byte + 2 * i)
            for run in runs
            for i in range(run.n_values)
        )

    before = loader_module.BUFFER_BYTES
    loader_module.BUFFER_BYTES = buffer_bytes
    try:
        small = list(_buffer_sized(reversed(chosen)))
    finally:
        loader_module.BUFFER_BYTES = before
    assert cells(small) == cells(chosen)
    assert all(run.n_values * 2 <= buffer_bytes for run in small)


class Pair:
    """The other process of two: its part of what is exchanged is already there."""

    count = 2

    def __init__(self, number: int) -> None:
        self.number = number
        self.others: Pair | None = None
        self.whole: torch.Tensor | None = None

    def exchange(self, whole: torch.Tensor) -> Pair:
        self.whole = whole
        return self

    def wait(self) -> None:
        """Take the other's part."""
        assert self.others is not None
        assert self.whole is not None
        assert self.others.whole is not None
        part = len(self.whole) // 2
        theirs = slice(self.others.number * part, (self.others.number + 1) * part)
        self.whole[theirs] = self.others.whole[theirs]


def counting(read: Any, counted: list[int], run: ByteRun, values: torch.Tensor) -> None:
    counted.append(values.numel())
    read(run, values)


@pytest.mark.parametrize("spec", [TinyQwen3Moe(), TinyQwen35Moe()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_processes_share_the_reading(
    spec: TinyQwen3Moe | TinyQwen35Moe, dtype: torch.dtype, tmp_path: Path
) -> None:
    """Each reads about half of the bytes, and both get all of them."""
    with Checkpoint.open(spec.write(tmp_path / "model")) as checkpoint:
        model = describe(checkpoint)
        targets = layer_targets(checkpoint, model, 1, dtype, True)
        cpu = torch.device("cpu")
        pairs = Pair(0), Pair(1)
        pairs[0].others, pairs[1].others = pairs[1], pairs[0]
        readers = Readers(cpu, 2)  # of all of them
        loaders = [WeightLoader(checkpoint, cpu, readers, pair) for pair in pairs]
        n_read = []
        for loader in loaders:
            counted: list[int] = []
            loader._read = partial(counting, loader._read, counted)  # type: ignore[method-assign]
            loader.ask("layer", targets, shared=True)
            loader.complete("layer")
            n_read.append(counted)
        taken = [loader.take("layer") for loader in loaders]
        alone = WeightLoader(checkpoint, cpu, readers)
        alone.ask("layer", targets)
        expected = alone.take("layer")
        for found in taken:
            assert found.keys() == expected.keys()
            for name, tensor in expected.items():
                assert torch.equal(found[name], tensor), name
        total = sum(tensor.numel() for tensor in expected.values())
        assert sum(map(sum, n_read)) == total
        assert 0.4 * total < sum(n_read[0]) < 0.6 * total
        for loader in (*loaders, alone):
            loader.close()
        readers.close()


def test_runs_are_cut_to_a_part() -> None:
    f32 = torch.float32
    plain = ByteRun("a", f32, 100, 10, 5)
    (cut,) = _within([plain], 8, 12)
    assert cut == ByteRun("a", f32, 112, 4, 8)
    assert not list(_within([plain], 15, 20))
    assert not list(_within([plain], 0, 5))
    # two of three values of each of four stored rows: a target of two rows, four columns wide
    turned = ByteRun("a", f32, 0, 12, 20, Columns(3, (0, 2, 1), 4))
    assert list(_within([turned], 27, 40)) == [turned]
    assert not list(_within([turned], 28, 40))
