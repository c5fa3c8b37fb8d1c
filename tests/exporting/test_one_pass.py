"""Several files in one pass: nothing is read or quantized twice, and threads change no byte."""

from __future__ import annotations

import errno
import os
from collections import Counter
from math import prod
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader
from safetensors.torch import load_file, save_file

from reap2gguf.checkpoint.checkpoint import Checkpoint
from reap2gguf.errors import CheckpointError
from reap2gguf.gguf_files.imatrix import Imatrix
from reap2gguf.models.table import describe
from reap2gguf.progress import Silent
from reap2gguf.pruning.view import PrunedView
from reap2gguf.pruning.write import write_pruned
from reap2gguf.quantizing.quantizer import Quantizer
from reap2gguf.quantizing.stored_rows import StoredRows
from tests.exporting.files import (
    export_files,
    export_weights,
    gguf_tensors,
    left,
    plain,
    random_imatrix,
)
from tests.tiny import TinyQwen3Moe, TinyQwen35Moe

MIXED = ("Q4_K_M", "IQ4_XS", "Q8_0", "BF16", "F32")


@pytest.fixture(scope="module")
def imatrix(wide: Path) -> Imatrix:
    return random_imatrix(gguf_tensors(wide))


def test_files_of_one_pass_are_those_of_single_passes(
    wide: Path, imatrix: Imatrix, tmp_path: Path
) -> None:
    together = export_files(wide, tmp_path, map(plain, MIXED), imatrix)
    (tmp_path / "alone").mkdir()
    for name in MIXED:
        alone = export_files(wide, tmp_path / "alone", [plain(name)], imatrix)[name]
        assert alone.read_bytes() == together[name].read_bytes()


def test_one_thread_and_three_write_the_same(
    wide: Path, imatrix: Imatrix, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # small ranges, so that threads take turns within one matrix
    monkeypatch.setattr("reap2gguf.gguf_files.rows.MAX_VALUES", 20_000)
    files = {}
    for n_threads in (1, 3):
        folder = tmp_path / str(n_threads)
        folder.mkdir()
        files[n_threads] = export_files(wide, folder, map(plain, MIXED), imatrix, n_threads)
    monkeypatch.undo()
    (tmp_path / "whole").mkdir()
    whole = export_files(wide, tmp_path / "whole", map(plain, MIXED), imatrix)
    for name in MIXED:
        expected = whole[name].read_bytes()
        assert files[1][name].read_bytes() == expected
        assert files[3][name].read_bytes() == expected


@pytest.mark.parametrize(
    "shape",
    [TinyQwen3Moe(), TinyQwen3Moe(fused=True, dense_layers=(0,)), TinyQwen35Moe(vision=False)],
    ids=["2d", "3d", "qwen3.5"],
)
def test_every_byte_is_read_once_for_all_files(
    shape: TinyQwen3Moe | TinyQwen35Moe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shape.write(tmp_path / "model")
    monkeypatch.setattr("reap2gguf.gguf_files.rows.MAX_VALUES", 1000)
    reads: list[tuple[int, int]] = []
    preadv = os.preadv

    def recorded(descriptor: int, buffers: list[memoryview], position: int) -> int:
        count = preadv(descriptor, buffers, position)
        reads.append((position, position + count))
        return count

    monkeypatch.setattr(os, "preadv", recorded)
    export_files(folder, tmp_path, map(plain, MIXED))
    reads.sort()
    with Checkpoint.open(folder) as checkpoint:
        first = min(tensor.offset for tensor in checkpoint.tensors.values())
        last = max(tensor.offset + tensor.n_bytes for tensor in checkpoint.tensors.values())
    # no gap and no overlap from the first tensor to the last
    assert (reads[0][0], reads[-1][1]) == (first, last)
    assert [end for _, end in reads[:-1]] == [begin for begin, _ in reads[1:]]


@pytest.mark.parametrize(
    "shape",
    [TinyQwen3Moe(), TinyQwen3Moe(fused=True, dtype=torch.float32), TinyQwen35Moe()],
    ids=["2d", "3d", "qwen3.5"],
)
def test_a_pruned_view_is_exported_as_the_written_folder(
    shape: TinyQwen3Moe | TinyQwen35Moe, tmp_path: Path
) -> None:
    with Checkpoint.open(shape.write(tmp_path / "model")) as source:
        model = describe(source)
        view = PrunedView(source, model, dict.fromkeys(model.facts.moe_layers, (0, 2, 3, 7)))
        for name in ("pruned", "view"):
            (tmp_path / name).mkdir()
        found = export_weights(view, view.model, tmp_path / "view", map(plain, MIXED))
        write_pruned(view, tmp_path / "pruned", Silent())
    expected = export_files(tmp_path / "pruned", tmp_path, map(plain, MIXED))
    for name in MIXED:
        assert found[name].read_bytes() == expected[name].read_bytes()


def test_values_that_are_not_finite_are_named_as_in_the_source(tmp_path: Path) -> None:
    folder = TinyQwen3Moe().write(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    tensors[name][4, 5] = torch.inf
    save_file(tensors, folder / "model.safetensors")
    with Checkpoint.open(folder) as source:
        view = PrunedView(source, describe(source), {0: (0, 2, 3, 7), 1: (0, 1, 3, 7)})
        with pytest.raises(CheckpointError, match=f"{name}' holds NaN or infinite values"):
            export_weights(view, view.model, tmp_path, [plain("Q8_0")])


def test_a_tensor_is_quantized_once_for_each_type(
    wide: Path, imatrix: Imatrix, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantized: Counter[str] = Counter()
    quantize = Quantizer.quantize

    def counted(
        self: Quantizer, rows: StoredRows, kind: GGMLQuantizationType, weights: np.ndarray | None
    ) -> np.ndarray:
        quantized[kind.name] += prod(rows.shape)
        return quantize(self, rows, kind, weights)

    monkeypatch.setattr(Quantizer, "quantize", counted)
    recipes = map(plain, ("Q4_K_M", "Q4_K_S", "Q5_K_M", "BF16"))
    paths = export_files(wide, tmp_path, recipes, imatrix, n_threads=1)
    pairs = {
        (tensor.name, tensor.tensor_type.name): int(tensor.n_elements)
        for path in paths.values()
        for tensor in GGUFReader(path).tensors
    }
    expected: Counter[str] = Counter()
    for (_, kind), n_elements in pairs.items():
        expected[kind] += n_elements
    assert quantized == expected
    assert len(pairs) < sum(len(GGUFReader(path).tensors) for path in paths.values())


def test_only_what_will_be_read_is_fetched_ahead(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not hasattr(os, "posix_fadvise"):
        pytest.skip("this system takes no advice on files")
    advised, read = set(), set()
    preadv = os.preadv

    def refused(descriptor: int, position: int, length: int, advice: int) -> None:
        advised.add((position, length))
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    def recorded(descriptor: int, buffers: list[memoryview], position: int) -> int:
        assert (position, len(buffers[0])) in advised
        read.add((position, len(buffers[0])))
        return preadv(descriptor, buffers, position)

    expected = export_files(tiny, tmp_path, [plain("Q8_0")])["Q8_0"].read_bytes()
    monkeypatch.setattr("reap2gguf.files._is_in_memory", lambda *place: False)
    monkeypatch.setattr(os, "posix_fadvise", refused)
    monkeypatch.setattr("reap2gguf.files._ADVICE_BYTES", 2**30)
    monkeypatch.setattr(os, "preadv", recorded)
    assert export_files(tiny, tmp_path, [plain("Q8_0")])["Q8_0"].read_bytes() == expected
    assert read == advised


def test_a_system_that_takes_no_advice_serves(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = export_files(tiny, tmp_path, [plain("Q8_0")])["Q8_0"].read_bytes()
    monkeypatch.delattr(os, "posix_fadvise", raising=False)
    assert export_files(tiny, tmp_path, [plain("Q8_0")])["Q8_0"].read_bytes() == expected


def test_after_a_failure_no_thread_takes_another_range(
    wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = []

    def failing(*_: object) -> np.ndarray:
        begun.append(1)
        raise ValueError("no")

    monkeypatch.setattr(Quantizer, "quantize", failing)
    with pytest.raises(CheckpointError, match=r"as token_embd\.weight: no"):
        export_files(wide, tmp_path, [plain("Q8_0")], n_threads=1)
    assert len(begun) == 1
    assert left(tmp_path) == []
