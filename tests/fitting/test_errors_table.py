"""Errors of sampled rows, compared with gguf-py's reading of whole tensors."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from gguf import quants

from reap2gguf.checkpoint.checkpoint import Checkpoint
from reap2gguf.exporting import device_blocks
from reap2gguf.exporting.row_ranges import BlockMaker
from reap2gguf.fitting.errors_table import TYPES, Cache, Where, measure, sampled_rows, types_for
from reap2gguf.fitting.fitted import free_tensors
from reap2gguf.gguf_files.rows import read_rows, rows_per_matrix
from reap2gguf.models.description import GgufTensor, Slab
from reap2gguf.models.table import describe
from reap2gguf.progress import Silent
from reap2gguf.quantizing.quantizer import Quantizer, load_quantizer
from tests.exporting.files import random_imatrix
from tests.exporting.test_device_blocks import FakeGpu, with_kernels
from tests.tiny import TinyQwen3Moe

ONE = Where("cpu", 1)
SOME = (Type.Q8_0, Type.Q4_K, Type.IQ3_XXS, Type.IQ4_NL)


@pytest.fixture(scope="module")
def maker(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[BlockMaker, list[GgufTensor]]]:
    folder = tmp_path_factory.mktemp("model")
    TinyQwen3Moe(hidden=256, width=256, head_dim=64).write(folder)
    with Checkpoint.open(folder) as checkpoint:
        tensors = free_tensors(describe(checkpoint).gguf_tensors(checkpoint.tensors))
        entries = random_imatrix(tensors).entries
        yield BlockMaker(checkpoint, load_quantizer(), entries), tensors


def test_errors_are_those_of_the_products(maker: tuple[BlockMaker, list[GgufTensor]]) -> None:
    blocks, tensors = maker
    found = measure(blocks, tensors, SOME, Where("cpu", 2), Silent(), {})
    assert {*found} == {tensor.name for tensor in tensors}
    for tensor in tensors:
        entry = blocks.importance.get(tensor.name)
        lost, whole = dict.fromkeys(found[tensor.name], 0.0), 0.0
        for matrix, slab in enumerate(tensor.slabs):
            rows = read_rows(blocks.weights, tensor, slab, 0, rows_per_matrix(tensor))
            weights = np.ones(tensor.n_columns, np.float32)
            if entry is not None:
                weights = entry.importance_of(matrix, tensor.n_columns)
            seen = 1 if entry is None else int(entry.counts[matrix])
            whole += seen * float((rows.astype(np.float64) ** 2 @ weights).sum())
            for name in lost:
                given = None if entry is None else weights
                raw = blocks.quantizer.ggml.quantize(rows, Type[name], given)
                away = quants.dequantize(raw, Type[name]).astype(np.float64) - rows
                lost[name] += seen * float((away**2 @ weights).sum())
        for name, amount in lost.items():
            # the rows of a large tensor are a sample
            assert found[tensor.name][name] == pytest.approx(amount / whole, rel=0.1), tensor.name


@pytest.mark.parametrize("odd", [0, 3])
def test_a_gpu_makes_the_same_table(
    maker: tuple[BlockMaker, list[GgufTensor]], odd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in quantizes: libggml behind the interface of a GPU; odd rows it leaves to others."""
    blocks, tensors = maker
    monkeypatch.setattr(Quantizer, "is_reference", True)
    blocks = replace(blocks, quantizer=with_kernels(0))
    wanted = measure(blocks, tensors, SOME, ONE, Silent(), {})
    monkeypatch.setattr(device_blocks, "load_gpu", lambda: gpu)
    gpu = FakeGpu(odd)
    found = measure(blocks, tensors, SOME, Where("cuda", 2), Silent(), {})
    assert found == wanted
    assert {one for one, _ in gpu.prepared} == {*SOME}
    # the runs of a tensor are one batch, or as many as have one type of values
    assert len(gpu.batch_rows) == len(tensors)
    assert gpu.is_closed


def test_what_is_known_is_not_measured(maker: tuple[BlockMaker, list[GgufTensor]]) -> None:
    blocks, tensors = maker
    known = measure(blocks, tensors[:2], SOME[:1], ONE, Silent(), {})
    broken = replace(blocks, quantizer=None)  # type: ignore[arg-type]
    assert measure(broken, tensors[:2], SOME[:1], ONE, Silent(), known) == known
    with pytest.raises(AttributeError):
        measure(broken, tensors[:2], SOME[:2], ONE, Silent(), known)


def test_types_that_a_tensor_cannot_have() -> None:
    narrow = GgufTensor("blk.0.attn_q.weight", (64, 96), (Slab("q"),))
    assert {one.name for one in types_for(narrow, True, TYPES)} == {
        "BF16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0", "IQ4_NL",
    }  # fmt: skip
    wide = replace(narrow, shape=(64, 512))
    assert types_for(wide, True, TYPES) == list(TYPES)
    left_out = {*TYPES} - {*types_for(wide, False, TYPES)}
    assert {one.name for one in left_out} == {"IQ3_XXS", "IQ2_S", "IQ2_XS", "IQ2_XXS"}


@pytest.mark.parametrize(
    ("shape", "n_slabs"),
    [((100, 256), 1), ((128, 768, 2048), 128), ((3, 7, 64), 3), ((5000, 64), 1)],
)
def test_rows_are_spread_and_few(shape: tuple[int, ...], n_slabs: int) -> None:
    slabs = tuple(Slab("x", index) for index in range(n_slabs))
    tensor = GgufTensor("blk.0.ffn_up_exps.weight", shape, slabs)
    runs = list(sampled_rows(tensor))
    total = rows_per_matrix(tensor)
    rows = [one.matrix * total + row for one in runs for row in range(one.first, one.last)]
    assert len(rows) == len({*rows})
    assert all(0 <= one.first < one.last <= total for one in runs)
    assert len(rows) * shape[-1] <= 2**18
    n_all = n_slabs * total
    assert len(rows) >= min(n_all - 16, 0.9 * 2**18 / shape[-1])
    # as many in the first half as in the second
    assert abs(sum(row < n_all / 2 for row in rows) - len(rows) / 2) <= len(rows) / 8 + 1


def test_a_cache_of_something_else_is_not_used(tmp_path: Path) -> None:
    notes: list[str] = []
    cache = Cache(tmp_path / "m.json", "key")
    assert cache.load(notes.append) == {}
    assert not notes
    errors = {"output.weight": {"Q8_0": 1e-5, "Q4_K": float("inf")}}
    cache.save(errors)
    assert cache.load(notes.append) == errors
    assert not notes
    assert replace(cache, key="other").load(notes.append) == {}
    assert "of another model, imatrix or libggml; measuring again" in notes[-1]


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{", '{"key": "key"}', '{"key": "key", "errors": [1]}',
     '{"key": "key", "errors": {"a": {"Q8_0": "x"}}}',
     '{"key": "key", "errors": {"a": {"Q8_0": NaN}}}',
     '{"key": "key", "errors": {"a": {"Q8_0": -1}}}'],
)  # fmt: skip
def test_a_broken_cache_is_measured_again(text: str, tmp_path: Path) -> None:
    notes: list[str] = []
    cache = Cache(tmp_path / "m.json", "key")
    cache.path.write_text(text)
    assert cache.load(notes.append) == {}
    assert "measuring again" in notes[0]
    cache.save({"a": {"Q8_0": 0.5}})
    assert json.loads(cache.path.read_text())["errors"] == {"a": {"Q8_0": 0.5}}
