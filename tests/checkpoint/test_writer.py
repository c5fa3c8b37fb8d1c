from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from reap2gguf.checkpoint.checkpoint import Checkpoint
from reap2gguf.checkpoint.index import INDEX_NAME
from reap2gguf.checkpoint.safetensors_header import StoredTensor
from reap2gguf.checkpoint.writer import (
    plan_shards,
    shard_names,
    write_checkpoint,
)

TENSORS = {
    "z.weight": torch.arange(12, dtype=torch.float32).reshape(3, 4),
    "a.weight": torch.randn(5, 2, 3).to(torch.bfloat16),
    "h": torch.randn(7).to(torch.float16),
    "bytes": torch.arange(3, dtype=torch.uint8),
    "m.none": torch.zeros(0, 4),
    "scalar": torch.tensor(1.5),
    'ü "quoted"': torch.ones(2, dtype=torch.int64),
}
NAMES = {
    torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.uint8: "U8",
    torch.int64: "I64",
}  # fmt: skip
PLAN = [StoredTensor(name, NAMES[t.dtype], tuple(t.shape)) for name, t in TENSORS.items()]


def contents(planned: StoredTensor) -> Iterator[memoryview]:
    raw = TENSORS[planned.name].reshape(-1).view(torch.uint8).numpy().tobytes()
    for start in range(0, len(raw), 5):
        yield memoryview(raw)[start : start + 5]


@pytest.mark.parametrize("limit", [1, 48, 100, 10**9])
def test_the_library_reads_what_is_written(tmp_path: Path, limit: int) -> None:
    write_checkpoint(tmp_path, PLAN, contents, limit)
    found: dict[str, torch.Tensor] = {}
    for path in sorted(tmp_path.glob("*.safetensors")):
        with safe_open(path, framework="pt") as library:
            assert library.metadata() == {"format": "pt"}
        found |= load_file(path)
    assert set(found) == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def test_tensor_data_is_aligned(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, PLAN, contents)
    raw = (tmp_path / "model.safetensors").read_bytes()
    assert int.from_bytes(raw[:8], "little") % 8 == 0
    assert raw[8:9] == b"{"


def test_one_shard_has_no_index(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, PLAN, contents)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_index(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, PLAN, contents, 60)
    index = json.loads((tmp_path / INDEX_NAME).read_text(encoding="utf-8"))
    assert index["metadata"] == {
        "total_parameters": sum(tensor.numel() for tensor in TENSORS.values()),
        "total_size": sum(t.numel() * t.element_size() for t in TENSORS.values()),
    }
    assert list(index["weight_map"]) == sorted(TENSORS)
    for name, file_name in index["weight_map"].items():
        assert name in load_file(tmp_path / file_name)


def test_written_shards_open_again(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    write_checkpoint(tmp_path, PLAN, contents, 48)
    with Checkpoint.open(tmp_path) as checkpoint:
        assert set(checkpoint.tensors) == set(TENSORS)
        assert len(checkpoint.shards) > 2


def test_pieces_are_counted(tmp_path: Path) -> None:
    seen: list[int] = []
    write_checkpoint(tmp_path, PLAN, contents, 48, seen.append)
    assert max(seen) == 5
    assert sum(seen) == sum(planned.n_bytes for planned in PLAN)


@pytest.mark.parametrize(
    ("sizes", "limit", "expected"),
    [
        ([4, 4, 4], 12, [[4, 4, 4]]),
        ([4, 4, 4], 11, [[4, 4], [4]]),
        ([20, 4, 4], 8, [[20], [4, 4]]),
        ([4, 20, 4], 8, [[4], [20], [4]]),
        ([8, 8], 8, [[8], [8]]),
        ([], 8, []),
    ],
)
def test_shards_are_cut_in_order(sizes: list[int], limit: int, expected: list[list[int]]) -> None:
    planned = [StoredTensor(str(i), "U8", (size,)) for i, size in enumerate(sizes)]
    shards = plan_shards(planned, limit)
    assert [[tensor.n_bytes for tensor in shard] for shard in shards] == expected
    assert [tensor for shard in shards for tensor in shard] == planned


def test_names_are_those_of_transformers() -> None:
    assert shard_names(1) == ["model.safetensors"]
    assert shard_names(2) == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]
    assert shard_names(12)[11] == "model-00012-of-00012.safetensors"


def test_hub_library_cuts_and_names_alike() -> None:
    from huggingface_hub import split_torch_state_dict_into_shards

    state = {f"w{i:02d}": torch.zeros(size) for i, size in enumerate([10, 10, 10, 50, 1, 30, 3])}
    theirs = split_torch_state_dict_into_shards(state, max_shard_size=120)
    planned = [StoredTensor(name, "F32", tuple(t.shape)) for name, t in state.items()]
    ours = plan_shards(planned, 120)
    names = shard_names(len(ours))
    assert sorted(theirs.filename_to_tensors) == names
