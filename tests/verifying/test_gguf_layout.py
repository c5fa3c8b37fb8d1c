"""Where tensors lie: what no writer does is a violation."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFValueType, GGUFWriter

from reap2gguf.gguf_files.reader import KEYS_BEGIN, read_gguf_header
from reap2gguf.gguf_files.split import plan_split, read_whole_header, write_part
from reap2gguf.gguf_files.writer import encode_key, encode_start, padded
from reap2gguf.progress import Silent
from reap2gguf.verifying.gguf_layout import check_layout


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Three tensors of five values: each is followed by twelve bytes of padding."""
    path = tmp_path / "x.gguf"
    writer = GGUFWriter(path, "qwen3moe")
    for name in "abc":
        writer.add_tensor(name, np.arange(5, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def found(path: Path) -> list[str]:
    return list(check_layout(read_whole_header(path)))


def test_a_file_as_it_is_written(file: Path) -> None:
    assert found(file) == []


def test_the_last_padding_may_be_left_out(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-12])
    assert found(file) == []


@pytest.mark.parametrize("more", [bytes(1), bytes(32), b"x" * 7])
def test_bytes_behind_the_last_tensor(file: Path, more: bytes) -> None:
    file.write_bytes(file.read_bytes() + more)
    assert found(file) == [f"x.gguf: has {12 + len(more)} bytes after its last tensor"]


@pytest.mark.parametrize("back", [1, 12, 33, 44])
def test_a_padding_that_is_not_zero(file: Path, back: int) -> None:
    raw = bytearray(file.read_bytes())
    raw[-back] = 1
    file.write_bytes(raw)
    (violation,) = found(file)
    assert re.fullmatch(r"x.gguf: the padding at byte \d+ is not zero", violation)


def test_the_padding_of_the_header(file: Path) -> None:
    header = read_gguf_header(file)
    assert header.infos_end % header.alignment, "the header has no padding"
    raw = bytearray(file.read_bytes())
    raw[header.infos_end] = 1
    file.write_bytes(raw)
    assert found(file) == [f"x.gguf: the padding at byte {header.infos_end} is not zero"]


def offset_at(file: Path, name: str) -> int:
    """Where the info of a tensor of one dimension has its offset."""
    return file.read_bytes().index(b"\x01" + bytes(7) + name.encode()) + 9 + 4 + 8 + 4


def move(file: Path, name: str, offset: int) -> None:
    at = offset_at(file, name)
    raw = file.read_bytes()
    file.write_bytes(raw[:at] + offset.to_bytes(8, "little") + raw[at + 8 :])


def test_a_gap_between_tensors(file: Path) -> None:
    file.write_bytes(file.read_bytes() + bytes(32))
    move(file, "c", 96)
    assert found(file) == ["x.gguf: 32 bytes that belong to no tensor lie before 'c'"]


def test_tensors_in_another_order(file: Path) -> None:
    move(file, "a", 32)
    move(file, "b", 0)
    assert found(file) == ["x.gguf: its tensors lie in another order than its header lists them"]


def test_every_part_of_a_split_file(file: Path, tmp_path: Path) -> None:
    plan = plan_split(file, 300)
    assert len(plan.parts) > 1
    with Silent().task("", 1, "bytes") as task:
        paths = [write_part(plan, part, tmp_path, task)[0] for part in plan.parts]
    assert found(paths[0]) == []
    paths[1].write_bytes(paths[1].read_bytes() + bytes(5))
    (violation,) = found(paths[0])
    assert violation.startswith(f"{paths[1].name}: has ")


def test_keys_of_a_later_part(file: Path, tmp_path: Path) -> None:
    plan = plan_split(file, 300)
    with Silent().task("", 1, "bytes") as task:
        paths = [write_part(plan, part, tmp_path, task)[0] for part in plan.parts]
    later = paths[1]
    raw = later.read_bytes()
    count = encode_key("split.count", GGUFValueType.UINT16, len(paths))
    wide = encode_key("split.count", GGUFValueType.INT16, len(paths))
    assert count in raw
    later.write_bytes(raw.replace(count, wide))
    assert found(paths[0]) == [f"{later.name}: split.count is of type INT16, expected UINT16"]
    header = read_gguf_header(paths[0].with_name(later.name))
    extra = encode_key("x.y", GGUFValueType.UINT8, 1)
    head = encode_start(len(header.tensors), len(header.metadata) + 1) + extra
    head += raw[KEYS_BEGIN : header.infos_end]
    start = min(info.offset for info in header.tensors.values())
    later.write_bytes(head.ljust(padded(len(head), 32), bytes(1)) + raw[start:])
    assert found(paths[0]) == [f"{later.name}: has the key 'x.y', which belongs in the first part"]
