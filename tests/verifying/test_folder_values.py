"""Values that threads compare: order of violations, blocks, types, and files that end early."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from reap2gguf.checkpoint.checkpoint import Checkpoint
from reap2gguf.checkpoint.safetensors_header import StoredTensor
from reap2gguf.errors import CheckpointError
from reap2gguf.models.table import describe
from reap2gguf.verifying import folder_values
from reap2gguf.verifying.folder_values import Values
from tests.tiny import TinyQwen3Moe


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_values, "_PART_BYTES", 4096)
    monkeypatch.setattr(folder_values, "_BLOCK_BYTES", 1024)


def violations(source: Path, copy: Path, n_threads: int) -> tuple[list[str], float]:
    """What differs between two folders, and how many bytes were reported."""
    read = 0.0

    def advance(amount: float) -> None:
        nonlocal read
        read += amount

    with Checkpoint.open(copy) as found, Checkpoint.open(source) as expected:
        values = Values(found, describe(found), expected)
        return list(values.check(found.tensors.values(), n_threads, advance)), read


@pytest.mark.parametrize("n_threads", [1, 8])
def test_every_byte_is_compared(n_threads: int, tmp_path: Path) -> None:
    source = TinyQwen3Moe().write(tmp_path / "source")
    copy = TinyQwen3Moe().write(tmp_path / "copy")
    path = copy / "model.safetensors"
    whole = path.read_bytes()
    with Checkpoint.open(copy) as checkpoint:
        tensors = list(checkpoint.tensors.values())
        n_bytes = checkpoint.n_bytes
    assert violations(source, copy, n_threads) == ([], n_bytes)
    for stored in (tensors[0], tensors[3], tensors[-1]):
        for byte in (0, 1, 1023, 1024, stored.n_bytes // 2, stored.n_bytes - 1):
            if byte >= stored.n_bytes:
                continue
            changed = bytearray(whole)
            changed[stored.offset + byte] ^= 1
            path.write_bytes(changed)
            (line,), _ = violations(source, copy, n_threads)
            entry = byte // (stored.n_bytes // stored.shape[0])
            assert line == (
                f"copy: {stored.name}: entry {entry} differs from entry {entry} of the source's "
                f"{stored.name}"
            )


def test_one_violation_for_each_tensor_in_the_order_of_the_file(tmp_path: Path) -> None:
    source = TinyQwen3Moe().write(tmp_path / "source")
    copy = TinyQwen3Moe().write(tmp_path / "copy")
    tensors = load_file(copy / "model.safetensors")
    save_file({n: t + 1 for n, t in tensors.items()}, copy / "model.safetensors", {"format": "pt"})
    with Checkpoint.open(copy) as checkpoint:
        names = list(checkpoint.tensors)
    for n_threads in (1, 8):
        found, _ = violations(source, copy, n_threads)
        assert [line.split(": ")[1] for line in found] == names


@pytest.mark.parametrize("n_threads", [1, 8])
def test_a_file_that_is_cut_while_it_is_compared(n_threads: int, tmp_path: Path) -> None:
    source = TinyQwen3Moe().write(tmp_path / "source")
    copy = TinyQwen3Moe().write(tmp_path / "copy")
    with Checkpoint.open(copy) as found, Checkpoint.open(source) as expected:
        values = Values(found, describe(found), expected)
        os.truncate(copy / "model.safetensors", 100_000)
        with pytest.raises(CheckpointError, match="the file was cut while it was in use"):
            list(values.check(found.tensors.values(), n_threads, lambda _: None))


def test_whoever_stops_listening_stops_the_threads(tmp_path: Path) -> None:
    source = TinyQwen3Moe().write(tmp_path / "source")
    copy = TinyQwen3Moe(seed=9).write(tmp_path / "copy")
    with Checkpoint.open(copy) as found, Checkpoint.open(source) as expected:
        listening = Values(found, describe(found), expected).check(
            found.tensors.values(), 4, lambda _: None
        )
        assert next(listening)
        listening.close()


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_every_value_that_is_not_finite_is_found(dtype: str, bad: float) -> None:
    torch_type = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[dtype]
    largest = torch.finfo(torch_type).max
    values = torch.tensor([0.0, -0.0, largest, -largest, torch.finfo(torch_type).tiny, 1e-7])
    for place in (None, 0, 3, 5):
        stored_values = values.to(torch_type)
        if place is not None:
            stored_values[place] = bad
        raw = stored_values.view(torch.uint8).numpy()
        stored = StoredTensor("x", dtype, (6,))
        assert folder_values._is_finite(stored, raw, np.empty_like(raw)) is (place is None)


def test_integers_are_finite() -> None:
    raw = np.full(16, 255, dtype=np.uint8)
    assert folder_values._is_finite(StoredTensor("x", "U16", (8,)), raw, np.empty_like(raw))
