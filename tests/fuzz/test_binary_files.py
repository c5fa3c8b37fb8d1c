"""Binary files with fields that lie: loaded with their word kept, or refused, in bounded memory."""

from __future__ import annotations

import json
import struct
import tracemalloc
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from reap2gguf.artifacts.observations import LayerObservation, Observations
from reap2gguf.checkpoint.safetensors_header import ITEM_BYTES, read_header
from reap2gguf.errors import ArtifactError
from reap2gguf.gguf_files.imatrix import load_imatrix
from reap2gguf.gguf_files.reader import read_gguf_header
from tests.fuzz.documents import Number, Piece, as_text, changed, joined, spoiled
from tests.fuzz.targets import TARGETS, check_message, run

REUSED_FOLDER = settings(
    max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
ROOM = 2**18  # what reading allocates beside what is proportional to the file, checks included


def within_memory(name: str, path: Path) -> bool:
    """Whether the file was read; what that allocated is bounded by the file's size."""
    tracemalloc.start()
    try:
        read = run(TARGETS[name], path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak <= 48 * path.stat().st_size + ROOM
    return read


NAMES = st.text(max_size=6) | st.sampled_from(["a.weight", "__metadata", "größe", "\U0001f600"])


@st.composite
def safetensors_headers(draw: st.DrawFn) -> tuple[dict[str, Any], int]:
    """A true header, and how many bytes of data it describes."""
    header: dict[str, Any] = {}
    position = 0
    for name in draw(st.lists(NAMES, unique=True, max_size=4)):
        kind = draw(st.sampled_from(sorted(ITEM_BYTES)))
        shape = draw(st.lists(st.integers(0, 3), max_size=3))
        end = position + ITEM_BYTES[kind] * int(np.prod(shape))
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [position, end]}
        position = end
    if draw(st.booleans()):
        header["__metadata__"] = draw(st.dictionaries(NAMES, NAMES, max_size=2))
    return header, position


def write_safetensors(path: Path, text: str, n_bytes: int) -> None:
    raw = text.encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(n_bytes))


@REUSED_FOLDER
@given(made=safetensors_headers())
def test_true_safetensors_are_read(tmp_path: Path, made: tuple[dict[str, Any], int]) -> None:
    header, n_bytes = made
    path = tmp_path / "x.safetensors"
    write_safetensors(path, json.dumps(header), n_bytes)
    assert within_memory("safetensors", path)
    header.pop("__metadata__", None)
    found = read_header(path)
    assert {n: (t.dtype, list(t.shape)) for n, t in found.items()} == {
        n: (t["dtype"], t["shape"]) for n, t in header.items()
    }


@REUSED_FOLDER
@given(data=st.data())
def test_safetensors_that_lie(tmp_path: Path, data: st.DataObject) -> None:
    header, n_bytes = data.draw(safetensors_headers())
    path = tmp_path / "x.safetensors"
    write_safetensors(path, data.draw(changed(header) | st.just(as_text(header))), n_bytes)
    if within_memory("safetensors", path):
        # what is accepted here, the format's own library accepts too
        with safe_open(path, framework="np") as library:
            assert set(library.keys()) == set(read_header(path))


def text_piece(text: bytes, width: int = 8) -> list[Piece]:
    return [Number(len(text), width), text]


SCALAR_KINDS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q",
                12: "d"}  # fmt: skip


@st.composite
def gguf_values(draw: st.DrawFn) -> list[Piece]:
    """A value type and a value of it."""
    kind = draw(st.sampled_from([*SCALAR_KINDS, 8]))
    n_items = draw(st.none() | st.integers(0, 4))
    head: list[Piece] = [Number(kind, 4)]
    if n_items is not None:
        head = [Number(9, 4), Number(kind, 4), Number(n_items, 8)]
    for _ in range(1 if n_items is None else n_items):
        if kind == 8:
            head += text_piece(draw(st.text(max_size=5)).encode())
        else:
            size = struct.calcsize(SCALAR_KINDS[kind])
            head.append(draw(st.binary(min_size=size, max_size=size)))
    return head


def gguf_pieces(
    keys: dict[str, list[Piece]], tensors: dict[str, tuple[list[int], bytes]]
) -> list[Piece]:
    """A GGUF file of F32 tensors, each of its `ne` and bytes."""
    pieces: list[Piece] = [b"GGUF", Number(3, 4), Number(len(tensors), 8), Number(len(keys), 8)]
    for key, value in keys.items():
        pieces += [*text_piece(key.encode()), *value]
    position, data = 0, b""
    for name, (ne, raw) in tensors.items():
        pieces += [*text_piece(name.encode()), Number(len(ne), 4), *(Number(n, 8) for n in ne)]
        pieces += [Number(0, 4), Number(position, 8)]
        data += raw + bytes(-len(raw) % 32)
        position = len(data)
    return [*pieces, bytes(-len(joined(pieces)) % 32), data]


FLOATS = st.lists(st.floats(0, 2**40, width=32), min_size=1, max_size=4)


@st.composite
def gguf_files(draw: st.DrawFn) -> list[Piece]:
    keys = draw(st.dictionaries(st.text(max_size=5), gguf_values(), max_size=4))
    tensors = draw(st.dictionaries(st.text(max_size=5), FLOATS, max_size=3))
    stored = {n: ([len(v)], np.array(v, "<f4").tobytes()) for n, v in tensors.items()}
    return gguf_pieces(keys, stored)


@REUSED_FOLDER
@given(pieces=gguf_files())
def test_true_ggufs_are_read(tmp_path: Path, pieces: list[Piece]) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(joined(pieces))
    assert within_memory("gguf", path)
    assert len(read_gguf_header(path).metadata) == pieces[3].value  # type: ignore[union-attr]


@REUSED_FOLDER
@given(data=st.data())
def test_ggufs_that_lie(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(data.draw(spoiled(data.draw(gguf_files()))))
    within_memory("gguf", path)


@st.composite
def imatrix_ggufs(draw: st.DrawFn) -> list[Piece]:
    keys: dict[str, list[Piece]] = {
        "general.type": [Number(8, 4), *text_piece(b"imatrix")],
        "imatrix.datasets": [Number(9, 4), Number(8, 4), Number(1, 8), *text_piece(b"a.txt")],
        "imatrix.chunk_count": [Number(4, 4), Number(draw(st.integers(0, 9)), 4)],
        "imatrix.chunk_size": [Number(4, 4), Number(512, 4)],
    }
    tensors: dict[str, tuple[list[int], bytes]] = {}
    for n in range(draw(st.integers(1, 2))):
        rows, columns = draw(st.integers(1, 3)), draw(st.integers(1, 3))
        sums = draw(
            st.lists(
                st.floats(0, 2**40, width=32), min_size=rows * columns, max_size=rows * columns
            )
        )
        counts = draw(st.lists(st.integers(0, 2**20), min_size=rows, max_size=rows))
        tensors[f"{n}.weight.in_sum2"] = ([columns, rows], np.array(sums, "<f4").tobytes())
        tensors[f"{n}.weight.counts"] = ([1, rows], np.array(counts, "<f4").tobytes())
    return gguf_pieces(keys, tensors)


@st.composite
def imatrix_dats(draw: st.DrawFn) -> list[Piece]:
    entries = draw(st.lists(FLOATS, min_size=1, max_size=3))
    pieces: list[Piece] = [Number(len(entries), 4)]
    for number, values in enumerate(entries):
        pieces += [*text_piece(f"blk.{number}".encode(), 4), Number(draw(st.integers(0, 9)), 4)]
        pieces += [Number(len(values), 4), np.array(values, "<f4").tobytes()]
    return [*pieces, Number(7, 4), *text_piece(b"a.txt", 4)]


IMATRICES = {"imatrix-gguf": imatrix_ggufs(), "imatrix-dat": imatrix_dats()}


@pytest.mark.parametrize("name", IMATRICES)
@REUSED_FOLDER
@given(data=st.data())
def test_true_imatrices_are_read(tmp_path: Path, name: str, data: st.DataObject) -> None:
    path = tmp_path / "x"
    path.write_bytes(joined(data.draw(IMATRICES[name])))
    assert within_memory(name, path)
    assert load_imatrix(path).dataset == "a.txt"


@pytest.mark.parametrize("name", IMATRICES)
@REUSED_FOLDER
@given(data=st.data())
def test_imatrices_that_lie(tmp_path: Path, name: str, data: st.DataObject) -> None:
    path = tmp_path / "x"
    path.write_bytes(data.draw(spoiled(data.draw(IMATRICES[name]))))
    within_memory(name, path)


@pytest.mark.parametrize("value", [0.5, 2.0**53, float("nan"), float("inf"), -1.0])
def test_counts_that_are_no_counts(tmp_path: Path, value: float) -> None:
    kind: list[Piece] = [Number(8, 4), *text_piece(b"imatrix")]
    sums, counts = np.ones(2, "<f4").tobytes(), np.array([1, value], "<f4").tobytes()
    tensors = {"x.in_sum2": ([1, 2], sums), "x.counts": ([1, 2], counts)}
    path = tmp_path / "x.gguf"
    path.write_bytes(joined(gguf_pieces({"general.type": kind}, tensors)))
    with pytest.raises(ArtifactError, match="whole numbers"):
        load_imatrix(path)


def test_counts_for_other_rows_than_the_sums(tmp_path: Path) -> None:
    kind: list[Piece] = [Number(8, 4), *text_piece(b"imatrix")]
    ones = np.ones(6, "<f4").tobytes()
    # six sums fit three counts as they fit two, but these are two rows of three
    tensors = {"x.in_sum2": ([3, 2], ones), "x.counts": ([1, 3], ones[:12])}
    path = tmp_path / "x.gguf"
    path.write_bytes(joined(gguf_pieces({"general.type": kind}, tensors)))
    with pytest.raises(ArtifactError, match="2 rows of sums and 3 counts"):
        load_imatrix(path)


@st.composite
def observations(draw: st.DrawFn) -> Observations:
    layers = {}
    for number in draw(st.sets(st.integers(0, 99), min_size=1, max_size=2)):
        size = draw(st.integers(1, 3))
        counts = np.array(draw(st.lists(st.integers(0, 2**40), min_size=size, max_size=size)))
        layers[number] = LayerObservation(
            counts, *(counts * scale for scale in (1.0, 0.5, 2.0, 3.0))
        )
    return Observations(layers, "0123", draw(st.text(max_size=5)), "ff", 7, 70, 0)


def check_observations(path: Path) -> None:
    found = Observations.load(path)
    numbers = (found.n_rows, found.n_tokens, found.n_dropped_rows, found.n_mtp_hits)
    assert all(0 <= number < 10**18 for number in numbers)
    for number, layer in found.layers.items():
        assert 0 <= number < 10**6
        assert layer.count.dtype == np.int64
        for part in ("reap_sum", "gate_sum", "norm_sum", "norm_max"):
            values = getattr(layer, part)
            assert values.dtype == np.float64
            assert values.shape == layer.count.shape
            assert values.ndim == 1
            assert np.isfinite(values).all()
            assert (values >= 0).all()


@REUSED_FOLDER
@given(data=st.data())
def test_observations_that_lie(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "x.safetensors"
    data.draw(observations()).save(path)
    check_observations(path)
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header, values = content[8 : 8 + length], bytearray(content[8 + length :])
    if data.draw(st.booleans()):
        header = data.draw(changed(json.loads(header))).encode()
    else:
        place = data.draw(st.integers(0, len(values) // 8 - 1)) * 8
        odd = data.draw(st.sampled_from([np.nan, np.inf, -1.0, 1e308]) | st.floats())
        values[place : place + 8] = struct.pack("<d", odd)
    path.write_bytes(len(header).to_bytes(8, "little") + header + values)
    try:
        check_observations(path)
    except ArtifactError as error:
        check_message(str(error), path)


@pytest.mark.parametrize("kind", ["F8_E4M3", "U8", "BF16", "F16", "F32", "I32", "F64"])
def test_counts_of_another_type(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x.safetensors"
    Observations({}, "", "", "", 1, 1, 0).save(path)
    content = path.read_bytes()
    header = json.loads(content[8:])
    position = 0
    for part in (field.name for field in fields(LayerObservation)):
        dtype = kind if part == "count" else "F64"
        end = position + ITEM_BYTES[dtype]
        entry = {"dtype": dtype, "shape": [1], "data_offsets": [position, end]}
        header[f"layers.0.{part}"], position = entry, end
    write_safetensors(path, json.dumps(header), position)
    with pytest.raises(
        ArtifactError, match="layer 0 has arrays of different sizes or of the wrong type"
    ):
        Observations.load(path)
