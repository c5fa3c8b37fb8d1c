from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter

from reap2gguf.errors import ArtifactError
from reap2gguf.gguf_files.imatrix import (
    Imatrix,
    ImatrixEntry,
    load_imatrix,
    save_dat,
    save_gguf,
)
from tests.tiny import REPOSITORY

EXCERPT = REPOSITORY / "tests" / "data" / "llama-imatrix-excerpt.json"


def entry(name: str, sums: Any, counts: list[int]) -> ImatrixEntry:
    return ImatrixEntry(name, np.array(sums, dtype=np.float32), np.array(counts, dtype=np.int64))


def sample() -> Imatrix:
    generator = np.random.default_rng(0)
    entries = [
        entry("blk.0.attn_q.weight", generator.random((1, 5)) * 900, [1000]),
        entry(
            "blk.0.ffn_up_exps.weight",
            generator.random((3, 4)) * [[500], [0], [30]],
            [512, 0, 40],
        ),
    ]
    return Imatrix({one.name: one for one in entries}, "calibration.txt", 2, 512)


def llama_cpp() -> tuple[Imatrix, dict[str, Any]]:
    """The first columns of two entries of a file that llama-imatrix wrote in both formats."""
    values = json.loads(EXCERPT.read_text())
    entries = {
        name: entry(name, np.reshape(part["in_sum2"], (len(part["counts"]), -1)), part["counts"])
        for name, part in values["entries"].items()
    }
    imatrix = Imatrix(entries, values["dataset"], values["chunk_count"], values["chunk_size"])
    return imatrix, values["entries"]


def parse_dat(raw: bytes) -> tuple[dict[str, tuple[int, Any]], int, str]:
    (n_entries,) = struct.unpack_from("<i", raw)
    position, found = 4, {}
    for _ in range(n_entries):
        (length,) = struct.unpack_from("<i", raw, position)
        name = raw[position + 4 : position + 4 + length].decode()
        position += 4 + length
        calls, size = struct.unpack_from("<ii", raw, position)
        found[name] = (calls, np.frombuffer(raw, "<f4", size, position + 8))
        position += 8 + 4 * size
    n_chunks, length = struct.unpack_from("<ii", raw, position)
    assert len(raw) == position + 8 + length
    return found, n_chunks, raw[position + 8 :].decode()


def dat(*entries: tuple[bytes, int, int, bytes], tail: bytes = b"") -> bytes:
    pieces = [
        struct.pack("<i", len(name)) + name + struct.pack("<ii", calls, size) + values
        for name, calls, size, values in entries
    ]
    return struct.pack("<i", len(entries)) + b"".join(pieces) + tail


def write_gguf(path: Path, tensors: dict[str, Any], **metadata: Any) -> None:
    writer = GGUFWriter(path, "imatrix")
    writer.add_type(metadata.pop("type", "imatrix"))
    for name, (value, kind) in metadata.items():
        if kind is GGUFValueType.ARRAY:
            writer.add_array(f"imatrix.{name}", value)
        else:
            writer.add_key_value(f"imatrix.{name}", value, kind)
    for name, value in tensors.items():
        writer.add_tensor(name, np.asarray(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def refusal(path: Path, content: bytes | None = None) -> str:
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ArtifactError) as caught:
        load_imatrix(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_gguf_round_trip(tmp_path: Path) -> None:
    before = sample()
    save_gguf(before, tmp_path / "imatrix.gguf")
    after = load_imatrix(tmp_path / "imatrix.gguf")
    assert (after.dataset, after.n_chunks, after.chunk_size) == ("calibration.txt", 2, 512)
    assert list(after.entries) == sorted(before.entries)
    for name, expected in before.entries.items():
        assert after.entries[name].name == name
        assert np.array_equal(after.entries[name].sums, expected.sums)
        assert np.array_equal(after.entries[name].counts, expected.counts)


def test_dat_round_trip(tmp_path: Path) -> None:
    before = sample()
    save_dat(before, tmp_path / "imatrix.dat")
    after = load_imatrix(tmp_path / "imatrix.dat")
    assert (after.dataset, after.n_chunks) == ("calibration.txt", 2)
    assert set(after.entries) == set(before.entries)
    for name, expected in before.entries.items():
        found = after.entries[name].importance().reshape(expected.sums.shape)
        np.testing.assert_allclose(found, expected.importance(), rtol=1e-6)


def test_a_dat_can_be_saved_again(tmp_path: Path) -> None:
    save_dat(sample(), tmp_path / "first.dat")
    first = load_imatrix(tmp_path / "first.dat")
    save_dat(first, tmp_path / "second.dat")
    second = load_imatrix(tmp_path / "second.dat")
    for name, expected in first.entries.items():
        np.testing.assert_allclose(
            second.entries[name].importance(), expected.importance(), rtol=1e-6
        )


def test_both_formats_tell_the_same(tmp_path: Path) -> None:
    save_dat(sample(), tmp_path / "imatrix.dat")
    save_gguf(sample(), tmp_path / "imatrix.gguf")
    old, new = load_imatrix(tmp_path / "imatrix.dat"), load_imatrix(tmp_path / "imatrix.gguf")
    assert set(old.entries) == set(new.entries)
    for name, one in new.entries.items():
        np.testing.assert_allclose(
            old.entries[name].importance().ravel(), one.importance().ravel(), rtol=1e-6
        )


def test_the_format_is_told_by_content(tmp_path: Path) -> None:
    save_gguf(sample(), tmp_path / "imatrix.dat")
    save_dat(sample(), tmp_path / "imatrix.gguf")
    assert load_imatrix(tmp_path / "imatrix.dat").chunk_size == 512
    assert load_imatrix(tmp_path / "imatrix.gguf").chunk_size == 0


def test_dat_equals_llama_imatrix(tmp_path: Path) -> None:
    imatrix, expected = llama_cpp()
    save_dat(imatrix, tmp_path / "imatrix.dat")
    found, n_chunks, dataset = parse_dat((tmp_path / "imatrix.dat").read_bytes())
    assert (n_chunks, dataset) == (241, "calib.txt")
    assert list(found) == list(expected)
    for name, part in expected.items():
        calls, values = found[name]
        assert calls == part["dat_calls"]
        assert values.tolist() == part["dat_values"]


def test_importance_of_llama_imatrix_in_both_formats(tmp_path: Path) -> None:
    imatrix, expected = llama_cpp()
    pieces = [
        (
            name.encode(),
            part["dat_calls"],
            len(part["dat_values"]),
            np.array(part["dat_values"], "<f4").tobytes(),
        )
        for name, part in expected.items()
    ]
    (tmp_path / "imatrix.dat").write_bytes(dat(*pieces, tail=struct.pack("<ii", 241, 1) + b"x"))
    legacy = load_imatrix(tmp_path / "imatrix.dat")
    save_gguf(imatrix, tmp_path / "imatrix.gguf")
    for name, one in load_imatrix(tmp_path / "imatrix.gguf").entries.items():
        np.testing.assert_allclose(
            one.importance().ravel(), legacy.entries[name].importance().ravel(), rtol=1e-6
        )


def test_uncovered_experts_of_llama_imatrix() -> None:
    imatrix, _ = llama_cpp()
    assert imatrix.uncovered() == {"blk.1.ffn_down_exps.weight": 1}
    unseen = imatrix.entries["blk.1.ffn_down_exps.weight"].importance()[5]
    assert unseen.tolist() == [1, 1, 1]


def test_gguf_layout_is_llama_imatrixs(tmp_path: Path) -> None:
    path = tmp_path / "imatrix.gguf"
    save_gguf(sample(), path)
    reader = GGUFReader(path)
    values = {name: field.contents() for name, field in reader.fields.items()}
    assert {k: v for k, v in values.items() if not k.startswith("GGUF.")} == {
        "general.type": "imatrix",
        "imatrix.datasets": ["calibration.txt"],
        "imatrix.chunk_count": 2,
        "imatrix.chunk_size": 512,
    }
    kinds = {name: [kind.name for kind in field.types] for name, field in reader.fields.items()}
    assert kinds["imatrix.datasets"] == ["ARRAY", "STRING"]
    assert kinds["imatrix.chunk_count"] == kinds["imatrix.chunk_size"] == ["UINT32"]
    sizes = {t.name: [*map(int, t.shape), 1, 1, 1][:4] for t in reader.tensors}
    assert sizes == {
        "blk.0.attn_q.weight.in_sum2": [5, 1, 1, 1],
        "blk.0.attn_q.weight.counts": [1, 1, 1, 1],
        "blk.0.ffn_up_exps.weight.in_sum2": [4, 3, 1, 1],
        "blk.0.ffn_up_exps.weight.counts": [1, 3, 1, 1],
    }
    assert {tensor.tensor_type for tensor in reader.tensors} == {GGMLQuantizationType.F32}


def test_importance_is_the_mean() -> None:
    one = entry("x", [[2, 4], [9, 0], [5, 5]], [2, 3, 0])
    assert one.importance().tolist() == [[1, 2], [3, 0], [1, 1]]
    assert one.importance().dtype == np.float32


@pytest.mark.parametrize("matrix", [0, 1, 2])
def test_importance_of_a_matrix_is_its_row(matrix: int) -> None:
    one = entry("x", [[2, 4], [9, 0], [5, 5]], [2, 3, 0])
    np.testing.assert_array_equal(one.importance_of(matrix, 2), one.importance()[matrix])
    # a .dat has all matrices in one row, under one count
    flat = entry("x", [[2, 4, 9, 0, 5, 5]], [4])
    np.testing.assert_array_equal(flat.importance_of(matrix, 2), one.sums[matrix] / 4)
    assert flat.importance_of(matrix, 2).dtype == np.float32


def test_an_importance_of_zeros_alone_is_none() -> None:
    """The input of an expert may always be zero; its weights are kept all the same."""
    one = entry("x", [[0, 0], [0, 4]], [8, 8])
    np.testing.assert_array_equal(one.importance_of(0, 2), [1, 1])
    np.testing.assert_array_equal(one.importance_of(1, 2), [0, 0.5])


def test_uncovered() -> None:
    assert sample().uncovered() == {"blk.0.ffn_up_exps.weight": 1}


@pytest.mark.parametrize(("count", "calls"), [(1, 1), (512, 1), (513, 2), (1024, 2)])
def test_dat_calls_are_chunks_rounded_up(tmp_path: Path, count: int, calls: int) -> None:
    imatrix = Imatrix({"x": entry("x", [[3.0]], [count])}, "", 9, 512)
    save_dat(imatrix, tmp_path / "x.dat")
    found, _, _ = parse_dat((tmp_path / "x.dat").read_bytes())
    assert found["x"][0] == calls


def test_dat_leaves_out_what_saw_nothing(tmp_path: Path) -> None:
    entries = {"x": entry("x", [[0.0]], [0]), "y": entry("y", [[1.0]], [1])}
    save_dat(Imatrix(entries, "", 1, 512), tmp_path / "x.dat")
    assert set(load_imatrix(tmp_path / "x.dat").entries) == {"y"}


def test_every_truncation_of_a_dat(tmp_path: Path) -> None:
    path = tmp_path / "x.dat"
    save_dat(sample(), path)
    content = path.read_bytes()
    end_of_entries = len(content) - 8 - len("calibration.txt")
    for length in range(len(content)):
        if length != end_of_entries:
            refusal(path, content[:length])
    path.write_bytes(content[:end_of_entries])
    assert load_imatrix(path).dataset == ""


def test_every_truncation_of_a_gguf(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    save_gguf(sample(), path)
    ends = [tensor.data_offset + tensor.n_bytes for tensor in GGUFReader(path).tensors]
    content = path.read_bytes()
    for length in range(max(ends)):
        refusal(path, content[:length])


@pytest.mark.parametrize("save", [save_dat, save_gguf])
def test_changed_bytes_never_crash(tmp_path: Path, save: Any) -> None:
    path = tmp_path / "x"
    save(sample(), path)
    content = path.read_bytes()
    for position in range(len(content)):
        for byte in (0, 1, 0x7F, 0xFF):
            path.write_bytes(content[:position] + bytes([byte]) + content[position + 1 :])
            try:
                load_imatrix(path)
            except ArtifactError:
                continue


F4 = struct.pack("<f", 1)


@pytest.mark.parametrize(
    "content",
    [
        struct.pack("<i", 0),
        struct.pack("<i", -1),
        struct.pack("<i", 2**31 - 1),
        dat((b"x", -1, 1, F4)),
        dat((b"x", 1, -1, F4)),
        dat((b"x", 1, 2**30, F4)),
        dat((b"x", 1, 2, F4)),
        dat((b"x", 1, 1, F4), (b"x", 1, 1, F4)),
        dat((b"x" * 5000, 1, 1, F4)),
        struct.pack("<ii", 1, -5) + bytes(100),
        dat((b"x", 1, 1, F4), tail=struct.pack("<ii", 1, 100)),
        dat((b"x", 1, 1, F4), tail=struct.pack("<ii", 1, -1)),
        b"not an imatrix at all",
    ],
    ids=range(13),
)
def test_impossible_dats(tmp_path: Path, content: bytes) -> None:
    refusal(tmp_path / "x.dat", content)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, -1.0])
def test_sums_that_are_no_sums_of_squares(tmp_path: Path, value: float) -> None:
    bad = Imatrix({"some.weight": entry("some.weight", [[1.0, value]], [3])}, "", 1, 512)
    save_dat(bad, tmp_path / "x.dat")
    assert "'some.weight'" in refusal(tmp_path / "x.dat")
    save_gguf(bad, tmp_path / "x.gguf")
    assert "'some.weight'" in refusal(tmp_path / "x.gguf")


ONES = np.ones((2, 3), np.float32)
COUNTS = np.ones((2, 1), np.float32)


@pytest.mark.parametrize(
    "tensors",
    [
        {"x.in_sum2": ONES},
        {"x.in_sum2": ONES, "x.counts": np.ones((4, 1), np.float32)},
        {"x.in_sum2": ONES, "x.counts": -COUNTS},
        {"x.in_sum2": ONES, "x.counts": COUNTS * np.float32(np.nan)},
        {"x.in_sum2": ONES, "x.counts": COUNTS * np.float32(np.inf)},
        {"x.in_sum2": ONES.astype(np.float16), "x.counts": COUNTS},
        {"x.in_sum2": np.ones((2, 4), np.float16), "x.counts": COUNTS},
        {"x.in_sum2": ONES.astype(np.float64), "x.counts": COUNTS},
        {"x.in_sum2": ONES.astype(np.int32), "x.counts": COUNTS},
        {"x.in_sum2": ONES, "x.counts": COUNTS.astype(np.int32)},
        {"x.in_sum2": np.ones((2, 0), np.float32), "x.counts": COUNTS},
    ],
    ids=["no counts", "4 counts", "negative counts", "NaN counts", "infinite counts",
         "odd F16 sums", "even F16 sums", "F64 sums", "I32 sums", "I32 counts", "no columns"],
)  # fmt: skip
def test_impossible_ggufs(tmp_path: Path, tensors: dict[str, Any]) -> None:
    write_gguf(tmp_path / "x.gguf", tensors)
    refusal(tmp_path / "x.gguf")


def test_gguf_of_another_type(tmp_path: Path) -> None:
    write_gguf(tmp_path / "x.gguf", {"x.in_sum2": ONES, "x.counts": COUNTS}, type="model")
    assert "general.type" in refusal(tmp_path / "x.gguf")


@pytest.mark.parametrize(
    "metadata",
    [
        {"chunk_count": ("many", GGUFValueType.STRING)},
        {"chunk_size": ([512], GGUFValueType.ARRAY)},
        {"datasets": (7, GGUFValueType.UINT32)},
    ],
    ids=["chunk_count", "chunk_size", "datasets"],
)
def test_metadata_of_the_wrong_type(tmp_path: Path, metadata: dict[str, Any]) -> None:
    write_gguf(tmp_path / "x.gguf", {"x.in_sum2": ONES, "x.counts": COUNTS}, **metadata)
    refusal(tmp_path / "x.gguf")


def test_further_tensors_are_ignored(tmp_path: Path) -> None:
    tensors = {"x.in_sum2": ONES, "x.in_sum": ONES, "x.stats": ONES, "x.counts": COUNTS}
    write_gguf(tmp_path / "x.gguf", tensors)
    assert set(load_imatrix(tmp_path / "x.gguf").entries) == {"x"}


def test_missing_file(tmp_path: Path) -> None:
    assert "cannot be read" in refusal(tmp_path / "gone.gguf")
