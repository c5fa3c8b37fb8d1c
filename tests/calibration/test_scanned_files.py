"""A file is read once to check and hash it, and once more for what was drawn."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow
import pyarrow.parquet
import pytest

from reap2gguf.building.keys import BuildKeys
from reap2gguf.building.plan import make_plan
from reap2gguf.calibration import scanned_files
from reap2gguf.calibration.drawing import read_texts
from reap2gguf.calibration.scanned_files import JsonFile, ParquetFile, ScannedFiles, TextFile
from reap2gguf.calibration.sources import load_corpus
from reap2gguf.errors import CalibrationError
from reap2gguf.options import BuildOptions, CalibrationOptions, ComputeOptions
from reap2gguf.tokenizer.tokenizer import Tokenizer
from tests.calibration.reading import reading
from tests.tiny import EXAMPLE

WORDS = "one two three four five six seven eight nine ten "


class Reads:
    """The bytes that were read of each file, one number per opening."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sizes: list[int] = []
        original = scanned_files.open_plain
        monkeypatch.setattr(scanned_files, "open_plain", lambda path: self.wrap(original(path)))

    def wrap(self, file: BinaryIO) -> Any:
        self.sizes.append(0)
        return Counting(file, self, len(self.sizes) - 1)


class Counting:
    def __init__(self, file: BinaryIO, reads: Reads, number: int) -> None:
        self.file, self.reads, self.number = file, reads, number

    def __enter__(self) -> Counting:
        return self

    def __exit__(self, *arguments: object) -> None:
        self.file.close()

    def read(self, *arguments: int) -> bytes:
        return self.counted(self.file.read(*arguments))

    def readline(self, *arguments: int) -> bytes:
        return self.counted(self.file.readline(*arguments))

    def seek(self, position: int) -> None:
        self.file.seek(position)

    def counted(self, data: bytes) -> bytes:
        self.reads.sizes[self.number] += len(data)
        return data


@pytest.fixture
def samples(tmp_path: Path) -> Path:
    """50 samples, with blank lines among them."""
    path = tmp_path / "samples.jsonl"
    lines = (json.dumps({"text": f"{number} {WORDS * 4}"}) for number in range(50))
    path.write_text("\n\n".join(lines))
    return path


def options(samples: Path, output: Path) -> BuildOptions:
    return BuildOptions(
        ("q8_0",),
        str(EXAMPLE),
        output=output,
        chunk=32,
        compute=ComputeOptions("cpu"),
        calibration=CalibrationOptions(str(samples), samples=5, max_length=32),
    )


def test_a_build_reads_jsonl_twice(
    samples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second time, five lines of fifty."""
    reads = Reads(monkeypatch)
    plan = make_plan(options(samples, tmp_path))
    assert len(BuildKeys(plan).texts) == 32
    read_texts(
        Tokenizer(EXAMPLE), plan.calibration, plan.max_length, None, 32, 4096, files=plan.files
    )
    size = samples.stat().st_size
    assert reads.sizes[0] == size
    assert len(reads.sizes) == 2
    assert reads.sizes[1] < size / 8


def test_a_text_is_read_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "text.txt"
    path.write_text(WORDS * 100)
    reads = Reads(monkeypatch)
    plan = make_plan(options(path, tmp_path))
    assert BuildKeys(plan).texts
    load_corpus(str(path), reading(lambda messages, tools=None: ""), 5, 42, plan.files)
    assert reads.sizes == [path.stat().st_size] * 2


def test_the_hash_is_that_of_the_bytes(samples: Path, tmp_path: Path) -> None:
    text, table = tmp_path / "a.txt", tmp_path / "a.parquet"
    text.write_bytes("wörter\r\n".encode())
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"text": "a"}]), table)
    for file in (JsonFile(samples), TextFile(text), ParquetFile(table)):
        assert file.sha256 == hashlib.sha256(file.path.read_bytes()).hexdigest()


def test_records_are_found_where_they_are(samples: Path) -> None:
    file = JsonFile(samples)
    records = list(file.records())
    assert file.n_records == len(records) == 50
    wanted = [49, 0, 7, 7]
    assert list(file.records_at(wanted)) == [records[number] for number in wanted]


def changes(path: Path) -> Iterator[None]:
    """Ways to change a file: longer; of the same length, but later; replaced by another."""
    content = path.read_bytes()
    path.write_bytes(content + b'\n{"text": "one more"}\n')
    yield
    os.utime(path, ns=(1, 1))
    yield
    other = path.with_name("other")
    other.write_bytes(content)
    os.utime(other, ns=(1, 1))
    other.rename(path)
    yield


def test_a_change_makes_another_key(samples: Path, tmp_path: Path) -> None:
    """Between two runs, and between a plan and its build."""
    plan = make_plan(options(samples, tmp_path))
    key = BuildKeys(plan).texts
    samples.write_text(samples.read_text() + '\n{"text": "one more"}')
    assert BuildKeys(make_plan(options(samples, tmp_path))).texts != key
    assert BuildKeys(plan).texts != key


def test_a_file_that_changes_after_its_scan_is_refused(samples: Path) -> None:
    file = JsonFile(samples)
    for _ in changes(samples):
        with pytest.raises(CalibrationError, match="changed while it was read; run the same"):
            list(file.records())
        with pytest.raises(CalibrationError, match="changed while it was read"):
            list(file.records_at([1]))
        file = JsonFile(samples)


def test_a_changed_file_is_scanned_again(samples: Path) -> None:
    files = ScannedFiles()
    first = files.file(samples)
    assert files.file(samples) is first
    for _ in changes(samples):
        again = files.file(samples)
        assert again is not first
        assert files.file(samples) is again
        first = again


def test_a_text_has_any_suffix(samples: Path) -> None:
    files = ScannedFiles()
    text = files.text(samples)
    assert text.text() == samples.read_text()
    assert isinstance(files.file(samples), JsonFile)
    assert files.text(samples) is text
