from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from reap2gguf.errors import ArtifactError
from reap2gguf.gguf_files import reader
from reap2gguf.gguf_files.reader import read_gguf_header
from reap2gguf.gguf_files.tensor_types import row_bytes

U32, U64, STRING, ARRAY = 4, 10, 8, 9
REUSED_FOLDER = settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
SCALARS = {
    GGUFValueType.UINT8: 200, GGUFValueType.INT8: -100, GGUFValueType.UINT16: 60_000,
    GGUFValueType.INT16: -30_000, GGUFValueType.UINT32: 4 * 10**9, GGUFValueType.INT32: -2 * 10**9,
    GGUFValueType.FLOAT32: 0.15625, GGUFValueType.BOOL: True, GGUFValueType.STRING: "größe ☃",
    GGUFValueType.UINT64: 2**63 + 1, GGUFValueType.INT64: -(2**62), GGUFValueType.FLOAT64: 1e-300,
}  # fmt: skip


def string(text: str | bytes) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw


def key(name: str | bytes, kind: int, value: bytes) -> bytes:
    return string(name) + struct.pack("<I", kind) + value


def info(name: str, ne: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    sizes = struct.pack(f"<I{len(ne)}Q", len(ne), *ne)
    return string(name) + sizes + struct.pack("<IQ", kind, offset)


def encode(
    keys: tuple[bytes, ...] = (),
    infos: tuple[bytes, ...] = (),
    n_bytes: int = 0,
    alignment: int = 32,
    magic: bytes = b"GGUF",
    version: int = 3,
    counts: tuple[int, int] | None = None,
) -> bytes:
    n_tensors, n_keys = counts or (len(infos), len(keys))
    head = magic + struct.pack("<IQQ", version, n_tensors, n_keys) + b"".join(keys + infos)
    return head + bytes(-len(head) % alignment) + bytes(n_bytes)


def refusal(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    with pytest.raises(ArtifactError) as caught:
        read_gguf_header(path)
    message = str(caught.value)
    assert message.startswith(str(path))
    return message


def parses_or_refuses(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    try:
        header = read_gguf_header(path)
        for name in header.tensors:
            assert header.read(name).nbytes == header.tensors[name].n_bytes
    except ArtifactError:
        pass


def write_everything(path: Path) -> None:
    writer = GGUFWriter(path, "qwen3moe")
    for kind, value in SCALARS.items():
        writer.add_key_value(f"one.{kind.name}", value, kind)
        writer.add_key_value(f"many.{kind.name}", [value] * 3, GGUFValueType.ARRAY, kind)
    for kind in GGMLQuantizationType:
        block, size = gguf.GGML_QUANT_SIZES[kind]
        raw = np.arange(3 * 2 * size, dtype=np.uint8).reshape(3, 2 * size)
        writer.add_tensor(f"blk.{kind.name}", raw, raw_shape=raw.shape, raw_dtype=kind)
        assert block
    writer.add_tensor("vector", np.arange(5, dtype=np.float32))
    writer.add_tensor("cube", np.arange(24, dtype=np.float16).reshape(2, 3, 4))
    writer.add_tensor("four", np.arange(16, dtype=np.int32).reshape(2, 2, 2, 2))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_agrees_with_the_library(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    write_everything(path)
    header = read_gguf_header(path)
    library = GGUFReader(path)
    theirs = {
        name: field.contents()
        for name, field in library.fields.items()
        if not name.startswith("GGUF.")
    }
    assert header.metadata == theirs
    assert {name: header.metadata[f"one.{name.name}"] for name in SCALARS} == SCALARS
    assert [tensor.name for tensor in library.tensors] == list(header.tensors)
    for tensor in library.tensors:
        found = header.tensors[tensor.name]
        assert found.tensor_type is tensor.tensor_type
        assert found.shape == tuple(int(size) for size in reversed(tensor.shape))
        assert (found.offset, found.n_bytes) == (tensor.data_offset, tensor.n_bytes)
        assert header.read(tensor.name).tobytes() == tensor.data.tobytes()
        assert header.read(tensor.name).shape[1] == found.row_bytes


@pytest.mark.parametrize("alignment", [8, 64, 256])
def test_alignment_of_the_file(tmp_path: Path, alignment: int) -> None:
    path = tmp_path / "x.gguf"
    writer = GGUFWriter(path, "x")
    writer.add_custom_alignment(alignment)
    for number in range(3):
        writer.add_tensor(f"t{number}", np.full(3, number, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    header = read_gguf_header(path)
    for number, tensor in enumerate(GGUFReader(path).tensors):
        assert header.tensors[tensor.name].offset == tensor.data_offset
        assert header.read(tensor.name).view("<f4").tolist() == [[number] * 3]


@pytest.mark.parametrize("kind", GGMLQuantizationType)
def test_row_bytes(kind: GGMLQuantizationType) -> None:
    block, _ = gguf.GGML_QUANT_SIZES[kind]
    (expected,) = gguf.quant_shape_to_byte_shape((block * 4,), kind)
    assert row_bytes(kind, block * 4) == expected


@pytest.mark.parametrize("version", [2, 3])
def test_smallest_files(tmp_path: Path, version: int) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(encode(version=version))
    header = read_gguf_header(path)
    assert header.metadata == {}
    assert header.tensors == {}
    path.write_bytes(encode(infos=(info("t", (4,)),), n_bytes=16, version=version))
    assert read_gguf_header(path).tensors["t"].n_bytes == 16


def test_empty_arrays_and_strings(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    empty = struct.pack("<IQ", U32, 0)
    words = struct.pack("<IQ", STRING, 0)
    keys = (key("a", ARRAY, empty), key("b", ARRAY, words), key("c", STRING, string("")))
    path.write_bytes(encode(keys))
    assert read_gguf_header(path).metadata == {"a": [], "b": [], "c": ""}


TENSOR = info("t", (4,))
BAD_FILES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "empty"),
    "magic": (encode(magic=b"GGML"), "b'GGML'"),
    "version 1": (encode(version=1), "version 1"),
    "version 4": (encode(version=4), "version 4"),
    "big endian": (encode(version=3 << 24), "expected GGUF version 2 or 3"),
    "2^64 tensors": (encode(counts=(2**64 - 1, 0)), "tensors, expected at most"),
    "2^64 keys": (encode(counts=(0, 2**64 - 1)), "keys, expected at most"),
    "more tensors than bytes": (encode(counts=(10**5, 0)), "truncated"),
    "more keys than bytes": (encode(counts=(0, 60_000)), "truncated"),
    "long key": (encode((struct.pack("<Q", 2**60),)), "bytes in a string"),
    "long string": (encode((key("k", STRING, struct.pack("<Q", 2**20)),)), "truncated"),
    "key not UTF-8": (encode((key(b"\xff", U32, bytes(4)),)), "not UTF-8"),
    "value not UTF-8": (encode((key("k", STRING, string(b"\xc3")),)), "not UTF-8"),
    "value type": (encode((key("k", 13, bytes(64)),)), "unknown value type 13"),
    "item type": (encode((key("k", ARRAY, struct.pack("<IQ", 99, 1)),)), "value type 99"),
    "nested": (encode((key("k", ARRAY, struct.pack("<IQ", ARRAY, 1)),)), "array of arrays"),
    "long array": (encode((key("k", ARRAY, struct.pack("<IQ", U32, 2**40)),)), "array items"),
    "array of 2^64": (encode((key("k", ARRAY, struct.pack("<IQ", 0, 2**64 - 1)),)), "array items"),
    "long words": (encode((key("k", ARRAY, struct.pack("<IQ", STRING, 99) + bytes(64)),)), "array"),
    "key twice": (encode((key("k.x", U32, bytes(4)),) * 2), "'k.x' occurs twice"),
    "tensor twice": (encode((), (info("t.x", (4,)), info("t.x", (4,), 0, 32)), 64), "twice"),
    "no dimensions": (encode((), (info("t.x", ()),), 32), "'t.x' has 0 dimensions"),
    "5 dimensions": (encode((), (info("t.x", (1,) * 5),), 32), "'t.x' has 5 dimensions"),
    "2^32 dimensions": (
        encode((), (string("t.x") + struct.pack("<I", 2**32 - 1),), 32),
        "4294967295 dimensions",
    ),
    "huge axis": (encode((), (info("t.x", (2**63,)),), 32), "values along an axis of 't.x'"),
    "huge product": (encode((), (info("t.x", (2**40,) * 4),), 32), "truncated"),
    "type": (encode((), (info("t.x", (4,), 999),), 32), "'t.x' has the unknown type 999"),
    "block": (encode((), (info("t.x", (33,), 8),), 64), "not a multiple of Q8_0's block of 32"),
    "misaligned": (encode((), (info("t.x", (4,), 0, 4),), 64), "'t.x': misplaced"),
    "overlap": (encode((), (info("t", (16,)), info("t.x", (4,), 0, 32)), 96), "'t.x': misplaced"),
    "same place": (encode((), (TENSOR, info("t.x", (4,))), 64), "misplaced"),
    "no data": (encode((), (info("t.x", (4,)),), 15), "'t.x': ends at byte"),
    "far offset": (encode((), (info("t.x", (4,), 0, 2**64 - 32),), 16), "'t.x': ends at byte"),
    "alignment 0": (encode((key("general.alignment", U32, bytes(4)),), (TENSOR,), 64), "is 0"),
    "alignment 2^40": (
        encode((key("general.alignment", U64, struct.pack("<Q", 2**40)),), (TENSOR,), 64),
        "general.alignment is",
    ),
    "alignment text": (
        encode((key("general.alignment", STRING, string("32")),), (TENSOR,), 64),
        "general.alignment is '32'",
    ),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_impossible_files_are_refused(tmp_path: Path, name: str) -> None:
    content, words = BAD_FILES[name]
    assert words in refusal(tmp_path / "x.gguf", content)


def test_tensors_may_be_listed_in_any_order(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(encode((), (info("b", (4,), 0, 32), info("a", (4,), 0, 0)), 48))
    header = read_gguf_header(path)
    assert list(header.tensors) == ["b", "a"]
    assert header.tensors["b"].offset == header.tensors["a"].offset + 32


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"gone\.gguf: cannot be read"):
        read_gguf_header(tmp_path / "gone.gguf")
    with pytest.raises(ArtifactError, match="cannot be read"):
        read_gguf_header(tmp_path)


def test_a_file_cut_after_its_header_was_read(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    content = encode((), (info("some.weight", (8,)),), 32)
    path.write_bytes(content)
    header = read_gguf_header(path)
    path.write_bytes(content[:-1])
    with pytest.raises(ArtifactError, match=r"ends inside tensor 'some\.weight'"):
        header.read("some.weight")


@pytest.mark.parametrize("ne", [(0,), (0, 3), (3, 0), (4, 0, 2)])
def test_tensors_without_values(tmp_path: Path, ne: tuple[int, ...]) -> None:
    parses_or_refuses(tmp_path / "x.gguf", encode((), (info("t", ne),), 32))


SMALL = encode(
    (
        key("general.alignment", U32, struct.pack("<I", 32)),
        key("general.name", STRING, string("näme")),
        key("an.array", ARRAY, struct.pack("<IQ3i", 5, 3, 1, -2, 3)),
        key("words", ARRAY, struct.pack("<IQ", STRING, 2) + string("a") + string("bc")),
        key("flag", 7, b"\x01"),
    ),
    (info("first.weight", (32, 2), 8), info("second", (3,), 0, 96)),
    96 + 12,
)


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(SMALL)
    assert len(read_gguf_header(path).tensors) == 2
    for length in range(len(SMALL)):
        refusal(path, SMALL[:length])


@REUSED_FOLDER
@given(position=st.integers(0, len(SMALL) - 1), byte=st.integers(0, 255))
def test_one_changed_byte_never_crashes(tmp_path: Path, position: int, byte: int) -> None:
    parses_or_refuses(tmp_path / "x.gguf", SMALL[:position] + bytes([byte]) + SMALL[position + 1 :])


@pytest.mark.parametrize("byte", [0x00, 0x01, 0x09, 0x7F, 0x80, 0xFF])
def test_no_byte_can_be_changed_into_a_crash(tmp_path: Path, byte: int) -> None:
    for position in range(len(SMALL)):
        changed = SMALL[:position] + bytes([byte]) + SMALL[position + 1 :]
        parses_or_refuses(tmp_path / "x.gguf", changed)


@REUSED_FOLDER
@given(
    position=st.integers(4, len(SMALL)),
    replaced=st.integers(0, 16),
    piece=st.binary(max_size=16),
)
def test_spliced_bytes_never_crash(
    tmp_path: Path, position: int, replaced: int, piece: bytes
) -> None:
    parses_or_refuses(tmp_path / "x.gguf", SMALL[:position] + piece + SMALL[position + replaced :])


@REUSED_FOLDER
@given(content=st.binary(max_size=100))
def test_random_bytes_never_crash(tmp_path: Path, content: bytes) -> None:
    parses_or_refuses(tmp_path / "x.gguf", content)
    parses_or_refuses(tmp_path / "x.gguf", SMALL[:24] + content)


@pytest.mark.parametrize("counts", [(2**20, 0), (0, 2**16), (2**20, 2**16)])
def test_large_counts_allocate_nothing(tmp_path: Path, counts: tuple[int, int]) -> None:
    import tracemalloc

    path = tmp_path / "x.gguf"
    path.write_bytes(encode(counts=counts))
    tracemalloc.start()
    with pytest.raises(ArtifactError):
        read_gguf_header(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**20


def test_metadata_values_are_plain_python(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    write_everything(path)
    allowed: tuple[Any, ...] = (int, float, str, bool)
    for value in read_gguf_header(path).metadata.values():
        items = value if isinstance(value, list) else [value]
        assert all(type(item) in allowed for item in items)


@settings(max_examples=60)
@given(
    texts=st.lists(st.text(max_size=12) | st.sampled_from(["", "x" * 63, "ü" * 40]), max_size=40),
    piece=st.integers(0, 70),
    cut=st.integers(1, 60),
)
def test_strings_are_read_in_pieces_of_any_size(
    texts: list[str], piece: int, cut: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Strings lie anywhere in the pieces, over their ends, and some are longer than a piece."""
    path = tmp_path_factory.mktemp("pieces") / "a.gguf"
    kinds = struct.pack("<IQ", GGUFValueType.STRING, len(texts))
    array = key("a", GGUFValueType.ARRAY, kinds + b"".join(map(string, texts)))
    after = key("b", GGUFValueType.UINT32, struct.pack("<I", 7))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reader, "_PIECE_BYTES", piece)
        path.write_bytes(encode((array, after)))
        assert read_gguf_header(path).metadata == {"a": texts, "b": 7}
        head = encode((array, after), alignment=1)
        path.write_bytes(head[: max(24, len(head) - cut)])
        with pytest.raises(ArtifactError, match=r"truncated|array items"):
            read_gguf_header(path)


@pytest.mark.parametrize("piece", [0, 9, 30, 2**16])
def test_a_string_in_an_array_that_is_no_text(
    piece: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "_PIECE_BYTES", piece)
    kinds = struct.pack("<IQ", GGUFValueType.STRING, 3)
    array = kinds + string("one") + string(b"\xff\xfe") + string("three")
    found = refusal(tmp_path / "a.gguf", encode((key("a", GGUFValueType.ARRAY, array),)))
    assert "a string is not UTF-8" in found
