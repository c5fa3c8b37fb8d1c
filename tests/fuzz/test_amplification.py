"""Small files that would be large in memory: what a reader allocates stays below its bound."""

from __future__ import annotations

import json
import os
import struct
import tracemalloc
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from reap2gguf.checkpoint.safetensors_header import read_header
from reap2gguf.errors import CheckpointError
from reap2gguf.gguf_files.imatrix import load_imatrix
from reap2gguf.gguf_files.reader import read_gguf_header
from tests.fuzz.targets import TARGETS, run

ROOM = 2**16  # beside what is proportional to the file
N_BYTES = 2**17


def peak(work: Callable[[], object]) -> int:
    """Bytes that were allocated at most while `work` ran."""
    work()  # what is imported or cached once is not the file's doing
    tracemalloc.start()
    work()
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return most


def safetensors(header: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header


def filled(first: bytes, piece: bytes, last: bytes) -> bytes:
    return first + piece * (N_BYTES // len(piece)) + last


def tensor_entries() -> bytes:
    entry = {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}
    return json.dumps({f"{n}": entry for n in range(N_BYTES // 60)}).encode()


HEADERS = {
    "lists": filled(b'{"a":[', b"[],", b"[]]}"),
    "objects": filled(b'{"a":[', b"{},", b"{}]}"),
    "lists that hold a list": filled(b'{"a":[', b"[[]],", b"[]]}"),
    "objects that hold one": filled(b'{"a":[', b'{"":{}},', b"{}]}"),
    "floats": filled(b'{"a":[', b"0.5,", b"0.5]}"),
    "integers": filled(b'{"a":[', b"999,", b"9]}"),
    "short texts": filled(b'{"a":[', b'"aa",', b'"a"]}'),
    "wide texts": filled(b'{"a":[', '"\u0100",'.encode(), b'"a"]}'),
    "wide text": filled('{"\U0001f600'.encode(), b"a", b'":1}'),
    "a long name": filled(b'{"', b"a", b'":1}'),
    "no JSON": filled(b"{", b"\0", b"}"),
    "no UTF-8": filled(b"{", b"a", b"\xff}"),
    "deep": filled(b'{"a":', b"[", b"}"),
    "metadata": json.dumps({"__metadata__": {f"{n}": "" for n in range(N_BYTES // 12)}}).encode(),
    "tensors": tensor_entries(),
}


@pytest.mark.parametrize("name", HEADERS)
def test_safetensors_headers(tmp_path: Path, name: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(safetensors(HEADERS[name]))

    def read() -> None:
        with suppress(CheckpointError):
            read_header(path)

    most = peak(read)
    assert most <= 40 * path.stat().st_size + ROOM


def string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def gguf(keys: list[bytes] | None = None, infos: list[bytes] | None = None) -> bytes:
    keys, infos = keys or [], infos or []
    head = struct.pack("<4sIQQ", b"GGUF", 3, len(infos), len(keys))
    return head + b"".join(keys) + b"".join(infos)


def array(kind: int, item: bytes) -> bytes:
    count = N_BYTES // len(item)
    return string(b"k") + struct.pack("<IIQ", 9, kind, count) + item * count


def text(value: str) -> bytes:
    return string(b"k") + struct.pack("<I", 8) + string(value.encode())


def many_tensors() -> bytes:
    """I8 tensors of one value each, without padding."""
    count = N_BYTES // 50
    alignment = string(b"general.alignment") + struct.pack("<II", 4, 1)
    infos = [string(f"{n}".encode()) + struct.pack("<IQIQ", 1, 1, 24, n) for n in range(count)]
    return gguf([alignment], infos) + bytes(count)


GGUFS = {
    "int8": gguf([array(1, b"\x80")]),
    "uint8": gguf([array(0, b"\xfe")]),
    "bool": gguf([array(7, b"\x01")]),
    "int16": gguf([array(3, b"\x00\x80")]),
    "int32": gguf([array(5, b"\x00\x00\x80\x80")]),
    "float32": gguf([array(6, b"\x00\x00\x80\x40")]),
    "float64": gguf([array(12, b"\x00" * 6 + b"\x80\x40")]),
    "uint64": gguf([array(10, b"\xff" * 8)]),
    "empty strings": gguf([array(8, string(b""))]),
    "short strings": gguf([array(8, string(b"ab"))]),
    "wide strings": gguf([array(8, string("\u0100".encode()))]),
    "a wide string": gguf([text("\U0001f600" + "a" * N_BYTES)]),
    "keys": gguf([string(f"{n}".encode()) + b"\0\0\0\0\xfe" for n in range(6000)]),
    "tensors": many_tensors(),
}


@pytest.mark.parametrize("name", GGUFS)
def test_gguf_headers(tmp_path: Path, name: str) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(GGUFS[name])
    assert run(TARGETS["gguf"], path)
    most = peak(lambda: read_gguf_header(path))
    assert most <= 48 * path.stat().st_size + ROOM


def dat(n_entries: int, n_values: int) -> bytes:
    entries = (
        struct.pack("<i5sii", 5, f"{n:05}".encode(), 1, n_values) + bytes(4 * n_values)
        for n in range(n_entries)
    )
    return struct.pack("<i", n_entries) + b"".join(entries)


def imatrix_gguf(n_entries: int, n_values: int) -> bytes:
    kind = string(b"general.type") + struct.pack("<I", 8) + string(b"imatrix")
    infos, position, data = [], 0, []
    for n in range(n_entries):
        for part, size in (("in_sum2", n_values), ("counts", 1)):
            place = struct.pack("<IQIQ", 1, size, 0, position)
            infos.append(string(f"{n}.{part}".encode()) + place)
            data.append(bytes(-(-4 * size // 32) * 32))
            position += len(data[-1])
    head = gguf([kind], infos)
    return head + bytes(-len(head) % 32) + b"".join(data)


IMATRICES = {
    "dat, values": (dat(1, 2**17), 1),
    "dat, entries": (dat(2000, 1), 2000),
    "gguf, values": (imatrix_gguf(1, 2**17), 1),
    "gguf, entries": (imatrix_gguf(500, 1), 500),
}


@pytest.mark.parametrize("name", IMATRICES)
def test_imatrices(tmp_path: Path, name: str) -> None:
    content, n_entries = IMATRICES[name]
    target = TARGETS[f"imatrix-{name.partition(',')[0]}"]
    path = tmp_path / "x"
    path.write_bytes(content)
    assert run(target, path)
    most = peak(lambda: load_imatrix(path))
    assert most <= 2.5 * path.stat().st_size + 1024 * n_entries + ROOM


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("first", [b"", b"GGUF\x03\0\0\0", b"\1\0\0\0\1\0\0\0x", b"\xff" * 8])
def test_a_terabyte_of_zeros_is_not_read(tmp_path: Path, name: str, first: bytes) -> None:
    path = tmp_path / "x"
    path.write_bytes(first)
    os.truncate(path, 2**40)
    most = peak(lambda: run(TARGETS[name], path))
    assert most <= ROOM
