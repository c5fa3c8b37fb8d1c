"""Weights read in the background are those that are stored."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from reap2gguf.checkpoint.checkpoint import Checkpoint
from reap2gguf.errors import CheckpointError
from reap2gguf.models.table import describe
from reap2gguf.observing import loader as loader_module
from reap2gguf.observing.loader import ByteRun, WeightLoader, _buffer_sized
from reap2gguf.observing.targets import layer_targets, whole
from tests.observing.devices import DEVICES
from tests.tiny import TinyQwen3Moe


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer(
    device: str, fused: bool, stored: torch.dtype, dtype: torch.dtype, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(loader_module, "_BUFFER_BYTES", 1 << 12)  # so that tensors are cut
    folder = TinyQwen3Moe(fused=fused, dtype=stored).write(tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    with Checkpoint.open(folder) as checkpoint:
        model = describe(checkpoint)
        loader = WeightLoader(checkpoint, torch.device(device), 3)
        for index in range(model.facts.n_layers):
            loader.ask(f"{index}", layer_targets(checkpoint, model, index, dtype, True))
        for index in range(model.facts.n_layers):
            found = {name: tensor.cpu() for name, tensor in loader.take(f"{index}").items()}
            for name, expected in layer_by_hand(weights, index, fused).items():
                assert torch.equal(found.pop(name), expected.to(dtype)), name
            assert not found
        loader.close()
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
        loader = WeightLoader(checkpoint, torch.device("cpu"), 2)
        loader.ask("q", {"q": whole(checkpoint, name, torch.float32)})
        with pytest.raises(CheckpointError, match=r"ends inside tensor .*q_proj.weight': 10 of"):
            loader.take("q")
        loader.close()


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

    before = loader_module._BUFFER_BYTES
    loader_module._BUFFER_BYTES = buffer_bytes
    try:
        small = list(_buffer_sized(reversed(chosen)))
    finally:
        loader_module._BUFFER_BYTES = before
    assert cells(small) == cells(chosen)
    assert all(run.n_values * 2 <= buffer_bytes for run in small)
