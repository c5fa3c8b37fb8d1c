"""Parts of GGUF files, compared with gguf-split, gguf-py's reader and llama.cpp."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import struct
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter

from reap2gguf.bundle.manifest import Manifest
from reap2gguf.errors import ArtifactError, OutputError, UsageError
from reap2gguf.gguf_files.part_names import PartName, parse_part_name, part_name
from reap2gguf.gguf_files.reader import read_gguf_header
from reap2gguf.gguf_files.split import (
    first_parts,
    plan_split,
    read_whole_header,
    write_part,
)
from reap2gguf.progress import Silent
from reap2gguf.verifying.bundle import verify_paths
from reap2gguf.verifying.gguf_file import check_experts
from tests.conftest import Bundle
from tests.tiny import ONE_THREAD

# SHA-256 of what llama.cpp's `gguf-split --split-max-tensors 2` makes of the file of `written`
OF_GGUF_SPLIT = {
    "model-00001-of-00003.gguf": "b677b553eb9446c94d7994ab2c4dce5760482d55ba5a1fa7e1fdb2b1bcbf7bde",
    "model-00002-of-00003.gguf": "48871dc7141178af69f101d2686e59aecd4a508cfced590c190f71902910b127",
    "model-00003-of-00003.gguf": "d39f7b46687f7128ae1a3b1ba9e39365c3ed9693bdf1a7f1500dbfd2294370dd",
}


class Counted:
    def __init__(self) -> None:
        self.amount = 0.0

    def advance(self, amount: float = 1) -> None:
        self.amount += amount


def written(path: Path, n_tensors: int = 5, n_values: int = 1000, alignment: int = 32) -> Path:
    """A GGUF file of known bytes: keys of several types and a few tensors."""
    writer = GGUFWriter(path, "test")
    if alignment != 32:
        writer.add_custom_alignment(alignment)
    writer.add_name("name")
    writer.add_array("test.words", ["one", "two"])
    writer.add_array("test.numbers", [1, 2, 3])
    writer.add_float32("test.float", 0.5)
    for number in range(n_tensors):
        values = np.arange(n_values, dtype=np.float32) + number
        writer.add_tensor(f"tensor.{number}.weight", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def cut(path: Path, max_bytes: int, folder: Path) -> list[Path]:
    folder.mkdir(exist_ok=True)
    plan = plan_split(path, max_bytes)
    task = Counted()
    written = [write_part(plan, part, folder, task) for part in plan.parts]
    found = [path for path, _ in written]
    assert task.amount == sum(part.n_bytes for part in plan.parts)
    for path, sha256 in written:
        assert sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    sizes = [part.stat().st_size for part in found]
    assert sizes == [part.n_bytes for part in plan.parts]
    assert max(sizes) <= max_bytes
    return found


def test_the_parts_are_those_of_gguf_split(tmp_path: Path) -> None:
    parts = cut(written(tmp_path / "model.gguf"), 10_000, tmp_path / "parts")
    hashes = {part.name: hashlib.sha256(part.read_bytes()).hexdigest() for part in parts}
    assert hashes == OF_GGUF_SPLIT


@pytest.fixture(scope="module")
def whole(built: Bundle) -> Path:
    return built.gguf / "example-IQ4_K_M.gguf"


@pytest.fixture(scope="module")
def parts(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return cut(whole, 3_000_000, tmp_path_factory.mktemp("parts"))


def test_gguf_py_reads_every_tensor_once(whole: Path, parts: list[Path]) -> None:
    expected = {t.name: t for t in GGUFReader(whole).tensors}
    found = [tensor for part in parts for tensor in GGUFReader(part).tensors]
    assert [tensor.name for tensor in found] == list(expected)
    for tensor in found:
        other = expected[tensor.name]
        assert tensor.tensor_type == other.tensor_type
        assert tensor.shape.tolist() == other.shape.tolist()
        assert tensor.data.tobytes() == other.data.tobytes()


def test_the_first_part_has_all_keys_and_the_others_none(whole: Path, parts: list[Path]) -> None:
    marks = ["split.no", "split.tensors.count", "split.count"]
    keys = {key: field for key, field in GGUFReader(whole).fields.items() if key[:5] != "GGUF."}
    for number, part in enumerate(parts):
        fields = {key: f for key, f in GGUFReader(part).fields.items() if key[:5] != "GGUF."}
        assert list(fields) == ([*keys, *marks] if number == 0 else marks)
        for key in keys.keys() & fields.keys():
            assert fields[key].types == keys[key].types
            assert fields[key].contents() == keys[key].contents()
        assert [fields[m].types[0].name for m in marks] == ["UINT16", "INT32", "UINT16"]
        assert [fields[m].contents() for m in marks] == [number, 50, len(parts)]


def test_llama_cpp_computes_the_same_with_the_parts(whole: Path, parts: list[Path]) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")

    def logits(path: Path) -> np.ndarray:
        model = llama_cpp.Llama(str(path), n_ctx=64, logits_all=True, verbose=False, **ONE_THREAD)
        model.eval([1, 2, 3, 4, 5, 6, 7, 8])
        found = np.array(model.scores[:8])
        model.close()
        return found

    assert len(parts) == 3
    assert np.array_equal(logits(parts[0]), logits(whole))


def test_the_names_are_llama_cpps() -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    for number, count in ((0, 3), (2, 3), (99_998, 99_999)):
        path = ctypes.create_string_buffer(200)
        llama_cpp.llama_split_path(path, 200, b"a/model-Q4", number, count)
        assert path.value.decode() == f"a/{part_name('model-Q4', number, count)}"
        assert parse_part_name(part_name("model-Q4", number, count)) == PartName(
            "model-Q4", number, count
        )
    assert parse_part_name("model-Q4.gguf") is None


def test_the_parts_read_as_the_whole(whole: Path, parts: list[Path]) -> None:
    one, other = read_gguf_header(whole), read_whole_header(parts[0])
    assert other.metadata == one.metadata
    assert list(other.tensors) == list(one.tensors)
    for name in one.tensors:
        assert np.array_equal(other.read(name), one.read(name))
    assert read_whole_header(whole) == one


def test_a_part_may_be_as_large_as_the_bound(tmp_path: Path) -> None:
    path = written(tmp_path / "model.gguf")
    largest = max(part.stat().st_size for part in cut(path, 10_000, tmp_path / "a"))
    assert len(cut(path, largest + 64, tmp_path / "b")) == 3


def test_a_tensor_above_the_bound_is_named(tmp_path: Path) -> None:
    path = written(tmp_path / "model.gguf")
    with pytest.raises(UsageError, match=r"tensor\.0\.weight.* has 4,000 bytes and does not fit"):
        plan_split(path, 4_000)


def test_an_alignment_of_its_own_is_kept(tmp_path: Path) -> None:
    path = written(tmp_path / "model.gguf", alignment=256)
    parts = cut(path, 10_000, tmp_path / "parts")
    one, other = read_gguf_header(path), read_whole_header(parts[0])
    assert all(np.array_equal(one.read(name), other.read(name)) for name in one.tensors)
    assert len([tensor for part in parts for tensor in GGUFReader(part).tensors]) == 5


def test_parts_that_are_there_are_not_written_again(tmp_path: Path) -> None:
    path = written(tmp_path / "model.gguf")
    first, second, third = cut(path, 10_000, tmp_path / "parts")
    stamp = first.stat().st_mtime_ns
    os.truncate(second, 100)  # not whole, and so not of this program
    third.unlink()
    assert cut(path, 10_000, tmp_path / "parts") == [first, second, third]
    assert first.stat().st_mtime_ns == stamp
    assert read_whole_header(first).tensors.keys() == read_gguf_header(path).tensors.keys()


def test_a_part_that_fails_leaves_nothing(tmp_path: Path) -> None:
    plan = plan_split(written(tmp_path / "model.gguf"), 10_000)
    with pytest.raises(OutputError):
        write_part(plan, plan.parts[0], tmp_path / "missing", Counted())
    os.truncate(tmp_path / "model.gguf", 8_000)
    folder = tmp_path / "parts"
    folder.mkdir()
    with pytest.raises(ArtifactError, match="was truncated while it was read"):
        write_part(plan, plan.parts[1], folder, Counted())
    assert list(folder.iterdir()) == []


def test_memory_is_bounded(tmp_path: Path) -> None:
    path = written(tmp_path / "model.gguf", n_tensors=2, n_values=2**23)  # 32 MiB each
    plan = plan_split(path, 40_000_000)
    tracemalloc.start()
    for part in plan.parts:
        write_part(plan, part, tmp_path, Counted())
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 5 * 2**20


def test_the_first_part_stands_for_all(parts: list[Path]) -> None:
    other = parts[0].with_name("other.gguf")
    assert first_parts([*parts, other]) == [parts[0], other]
    assert first_parts(parts[1:]) == parts[1:]


def _set_mark(path: Path, key: str, value: int) -> None:
    raw = bytearray(path.read_bytes())
    at = raw.index(key.encode()) + len(key) + 4
    layout = "<i" if key == "split.tensors.count" else "<H"
    raw[at : at + struct.calcsize(layout)] = struct.pack(layout, value)
    path.write_bytes(raw)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda parts: parts[1].unlink(), "part 2 of 3 is missing"),
        (lambda parts: _set_mark(parts[1], "split.no", 0), r"split\.no is 0, expected 1"),
        (lambda parts: _set_mark(parts[1], "split.count", 2), r"split\.count is 2, expected 3"),
        (lambda parts: _set_mark(parts[0], "split.count", 4), "but its name differs"),
        (
            lambda parts: [_set_mark(part, "split.tensors.count", 6) for part in parts],
            r"split\.tensors\.count is 6, its parts hold 5",
        ),
        (lambda parts: os.truncate(parts[2], 50), "truncated"),
    ],
)
def test_what_is_wrong_with_parts_is_said(
    damage: Callable[[list[Path]], object], message: str, tmp_path: Path
) -> None:
    parts = cut(written(tmp_path / "model.gguf"), 10_000, tmp_path / "parts")
    damage(parts)
    with pytest.raises(ArtifactError, match=message):
        read_whole_header(parts[0])


def test_a_tensor_in_two_parts_is_found(tmp_path: Path) -> None:
    parts = cut(written(tmp_path / "model.gguf"), 10_000, tmp_path / "parts")
    raw = parts[1].read_bytes()
    parts[1].write_bytes(raw.replace(b"tensor.2.weight", b"tensor.0.weight"))
    with pytest.raises(ArtifactError, match=r"holds 'tensor\.0\.weight', which another part holds"):
        read_whole_header(parts[0])


def test_a_later_part_alone_names_the_first(tmp_path: Path) -> None:
    parts = cut(written(tmp_path / "model.gguf"), 10_000, tmp_path / "parts")
    with pytest.raises(ArtifactError, match=r"part 2 of 3; pass the first, .*00001-of-00003"):
        read_whole_header(parts[1])
    with pytest.raises(ArtifactError, match="is a part of a split file already"):
        plan_split(parts[0], 10_000)


def test_experts_are_counted_across_parts(built: Bundle, parts: list[Path]) -> None:
    manifest = Manifest.load(built.gguf)
    record = replace(manifest.gguf[0], parts=tuple(part.name for part in parts))
    assert check_experts(parts[0].parent, record, 12) == []
    found = check_experts(parts[0].parent, record, 11)
    assert found == [f"{parts[0].name}: qwen3moe.expert_count is 12, expected 11"]


def test_parts_are_verified_against_the_safetensors(built: Bundle, parts: list[Path]) -> None:
    report = verify_paths([built.hf, *parts], 1, Silent())
    assert report.violations == ()
    assert verify_paths([built.hf, parts[0]], 1, Silent()).violations == ()
    (message,) = verify_paths([built.hf, parts[1]], 1, Silent()).violations
    assert "part 2 of 3; pass the first" in message


def test_a_value_in_a_later_part_is_verified(
    built: Bundle, parts: list[Path], tmp_path: Path
) -> None:
    copies = [Path(shutil.copy(part, tmp_path)) for part in parts]
    header = read_gguf_header(copies[2])
    info = next(i for n, i in reversed(header.tensors.items()) if "_exps." in n)
    with copies[2].open("r+b") as file:
        file.seek(info.offset)
        raw = file.read(info.n_bytes)
        file.seek(info.offset)
        half = info.n_bytes // 2
        file.write(raw[half:] + raw[:half])  # the experts in another order
    violations = verify_paths([built.hf, *copies], 1, Silent()).violations
    assert len(violations) == 1
    assert f"{copies[0].name}: {info.name} expert 0 differs from" in violations[0]
    assert "it holds the weights of expert 6" in violations[0]
