from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from reap2gguf.checkpoint.safetensors_header import MAX_HEADER_BYTES, read_header
from reap2gguf.errors import CheckpointError

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8,
    "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
REUSED_FOLDER = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def encode(header: str | dict[str, Any], data: bytes = b"") -> bytes:
    text = header if isinstance(header, str) else json.dumps(header)
    raw = text.encode()
    return len(raw).to_bytes(8, "little") + raw + data


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    def plain(value: Any) -> Any:
        return list(value) if isinstance(value, tuple) else value

    return {"dtype": dtype, "shape": plain(shape), "data_offsets": plain(offsets)}


def refusal(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        read_header(path)
    return str(caught.value)


def parses_or_refuses(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    try:
        tensors = read_header(path)
    except CheckpointError:
        pass
    else:
        assert sum(tensor.n_bytes for tensor in tensors.values()) < len(content)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (5,), (3, 4), (2, 3, 4), (1, 1, 2, 1, 2)])
def test_agrees_with_the_library(tmp_path: Path, dtype: str, shape: tuple[int, ...]) -> None:
    path = tmp_path / "model.safetensors"
    tensors = {
        "b": torch.arange(7, dtype=torch.int64),
        "a": torch.ones(shape).to(DTYPES[dtype]),
        "c": torch.full((2, 2), 3.0),
    }
    save_file(tensors, path, {"format": "pt"})
    found = read_header(path)
    content = path.read_bytes()
    with safe_open(path, framework="pt") as library:
        assert set(found) == set(library.keys())
        for name, tensor in found.items():
            piece = library.get_slice(name)
            assert tensor.dtype == piece.get_dtype()
            assert list(tensor.shape) == piece.get_shape()
            stored = content[tensor.offset : tensor.offset + tensor.n_bytes]
            assert stored == tensors[name].reshape(-1).view(torch.uint8).numpy().tobytes()
    assert found["a"].n_elements == tensors["a"].numel()
    assert found["a"].item_bytes == tensors["a"].element_size()


def test_file_order(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    header = {"z": entry(offsets=(0, 8)), "a": entry(offsets=(16, 24)), "m": entry(offsets=(8, 16))}
    path.write_bytes(encode(header, bytes(24)))
    assert list(read_header(path)) == ["z", "m", "a"]


def test_a_file_without_tensors(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(encode({"__metadata__": {"format": "pt"}}))
    assert read_header(path) == {}


@pytest.mark.parametrize(
    "bad",
    [
        entry(dtype="F31"),
        entry(dtype="bf16"),
        entry(dtype=None),
        entry(dtype=7),
        entry(dtype=["F32"]),
        entry(dtype={}),
        entry(shape=(-2,)),
        entry(shape=(2**48,)),
        entry(shape=(2**64, 2**64)),
        entry(shape=(True, 2)),
        entry(shape=(2.0,)),
        entry(shape="2"),
        entry(shape=None),
        entry(shape=(1,) * 8 + (2,)),
        entry(shape=(3,)),
        entry(shape=(2**47, 2**47, 2**47)),
        entry(offsets=(0, 7)),
        entry(offsets=(8, 0)),
        entry(offsets=(-8, 0)),
        entry(offsets=(0,)),
        entry(offsets=(0, 8, 8)),
        entry(offsets=(0, True)),
        entry(offsets=(0.0, 8.0)),
        entry(offsets=(0, 2**60)),
        entry(offsets=(8, 16)),
        {"dtype": "F32", "shape": [2]},
        entry() | {"extra": 1},
        [],
        None,
        "F32",
    ],
)
def test_impossible_tensors_are_refused(tmp_path: Path, bad: Any) -> None:
    message = refusal(tmp_path / "x.safetensors", encode({"some.weight": bad}, bytes(8)))
    assert "x.safetensors" in message
    assert "'some.weight'" in message


@pytest.mark.parametrize(
    ("second", "word"), [((4, 12), "overlaps"), ((0, 8), "overlaps"), ((12, 20), "gap")]
)
def test_overlaps_and_gaps(tmp_path: Path, second: tuple[int, int], word: str) -> None:
    header = {"first": entry(), "second": entry(offsets=second)}
    message = refusal(tmp_path / "x.safetensors", encode(header, bytes(second[1])))
    assert "'second'" in message
    assert word in message


@pytest.mark.parametrize(("n_bytes", "word"), [(7, "truncated"), (0, "truncated"), (9, "unknown")])
def test_file_length_is_the_headers(tmp_path: Path, n_bytes: int, word: str) -> None:
    message = refusal(tmp_path / "x.safetensors", encode({"w": entry()}, bytes(n_bytes)))
    assert "x.safetensors" in message
    assert word in message


@pytest.mark.parametrize(
    "header",
    [
        '{"w": {"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
        '{"w": {"dtype":"F32","shape":[NaN],"data_offsets":[0,8]}}',
        '{"w": {"dtype":"F32","shape":[2],"data_offsets":[0,Infinity]}}',
        '{"w": {"dtype":"F32","shape":[' + "9" * 5000 + '],"data_offsets":[0,8]}}',
        '{"w": ' + "[" * 100_000,
        "[1, 2]",
        '"text"',
        "{}x",
        "{",
        "  ",
    ],
)
def test_headers_that_are_no_json_object(tmp_path: Path, header: str) -> None:
    assert "x.safetensors" in refusal(tmp_path / "x.safetensors", encode(header, bytes(8)))


def test_repeated_names_are_named(tmp_path: Path) -> None:
    one = '"lm_head.weight": {"dtype":"F32","shape":[2],"data_offsets":[0,8]}'
    message = refusal(tmp_path / "x.safetensors", encode(f"{{{one}, {one}}}", bytes(8)))
    assert "'lm_head.weight'" in message
    assert "twice" in message


def test_header_that_is_not_utf8(tmp_path: Path) -> None:
    raw = b'{"\xff\xfe": {}}'
    content = len(raw).to_bytes(8, "little") + raw
    assert "UTF-8" in refusal(tmp_path / "x.safetensors", content)


@pytest.mark.parametrize("length", [0, 1, 3, 1000, MAX_HEADER_BYTES + 1, 2**63, 2**64 - 1])
def test_header_lengths_that_cannot_be(tmp_path: Path, length: int) -> None:
    message = refusal(tmp_path / "x.safetensors", length.to_bytes(8, "little") + b"{}")
    assert "x.safetensors" in message
    assert f"{length:,}" in message


@pytest.mark.parametrize("n_bytes", range(8))
def test_files_shorter_than_the_length(tmp_path: Path, n_bytes: int) -> None:
    assert "too short" in refusal(tmp_path / "x.safetensors", bytes(n_bytes))


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"gone\.safetensors: cannot be read"):
        read_header(tmp_path / "gone.safetensors")


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(3), "b": torch.zeros(2, 2, dtype=torch.bfloat16)}, path)
    content = path.read_bytes()
    for length in range(len(content)):
        assert "x.safetensors" in refusal(path, content[:length])


@REUSED_FOLDER
@given(content=st.binary(max_size=200))
def test_random_bytes_never_crash(tmp_path: Path, content: bytes) -> None:
    parses_or_refuses(tmp_path / "x.safetensors", content)
    parses_or_refuses(tmp_path / "x.safetensors", len(content).to_bytes(8, "little") + content)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(sorted(DTYPES)) | JSON,
        "shape": st.lists(st.integers(-1, 5), max_size=4) | JSON,
        "data_offsets": st.lists(st.integers(-1, 64), min_size=2, max_size=2) | JSON,
    }
)


@REUSED_FOLDER
@given(header=st.dictionaries(st.text(max_size=8), ENTRIES | JSON, max_size=3), n_bytes=st.just(16))
def test_random_headers_never_crash(tmp_path: Path, header: dict[str, Any], n_bytes: int) -> None:
    parses_or_refuses(tmp_path / "x.safetensors", encode(header, bytes(n_bytes)))


@REUSED_FOLDER
@given(data=st.data())
def test_mutated_files_never_crash(tmp_path: Path, data: st.DataObject) -> None:
    header = {
        "__metadata__": {"format": "pt"},
        "a.weight": entry("BF16", (2, 3), (0, 12)),
        "b.weight": entry("F32", (1,), (12, 16)),
    }
    content = bytearray(encode(header, bytes(16)))
    for _ in range(data.draw(st.integers(1, 3))):
        position = data.draw(st.integers(0, len(content) - 1))
        content[position] = data.draw(st.integers(0, 255) | st.sampled_from(b'0129-[]{}",:'))
    parses_or_refuses(tmp_path / "x.safetensors", bytes(content))
