"""Records of a JSON file, whether it holds lines or one array, and in which encoding."""

from __future__ import annotations

import bz2
import codecs
import gzip
import hashlib
import io
import json
import lzma
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reap2gguf.calibration import json_records
from reap2gguf.calibration.json_records import MAX_RECORD_BYTES, iterate_records
from reap2gguf.calibration.scanned_files import JsonFile, TextFile
from reap2gguf.calibration.sources import ignored_files, load_corpus
from reap2gguf.errors import CalibrationError
from tests.calibration.reading import reading

RECORDS = [{"text": "wörter 😀"}, {"text": "two\n]", "n": [1, {"x": "}"}]}, {"text": "three"}]
FORMS = {
    "lines": "\n".join(json.dumps(record) for record in RECORDS),
    "lines with spaces": "\r\n\n".join(json.dumps(r, ensure_ascii=False) for r in RECORDS) + "\n ",
    "an array": json.dumps(RECORDS),
    "an object with a list": json.dumps({"version": [1], "data": RECORDS, "n": {"a": [{}]}}),
    "an object for people": json.dumps({"train": RECORDS, "test": []}, indent=2) + "\n",
    "an array for people": "\n " + json.dumps(RECORDS, indent=4, ensure_ascii=False) + "\n\n",
}


def records_of(raw: bytes, path: Path = Path("a.jsonl")) -> list[Any]:
    return [record for _, record in iterate_records(io.BytesIO(raw), path, len)]


@pytest.mark.parametrize("mark", [b"", codecs.BOM_UTF8])
@pytest.mark.parametrize("suffix", ["json", "jsonl"])
@pytest.mark.parametrize("form", FORMS)
def test_each_form_has_the_same_records(
    form: str, suffix: str, mark: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_records, "_BLOCK_BYTES", 7)  # each entry crosses a block
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(mark + FORMS[form].encode())
    file = JsonFile(path)
    assert list(file.records()) == RECORDS
    assert list(file.records_at([2, 0, 1])) == [RECORDS[2], RECORDS[0], RECORDS[1]]
    assert file.n_records == 3


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('[{"text": "a"}', "sample 1 is not JSON (expected a comma or the end of the array after"),
        ('[{"text": "a"},', "sample 1 is not JSON (expected another record after the comma"),
        ('[{"text": "a"},]', "sample 1 is not JSON (expected another record after the comma"),
        ('[{"text": "a"} {"text": "b"}]', "sample 1 is not JSON (expected a comma"),
        ('[{"text": "a"}, {"text": ]', "sample 2 is not JSON (Expecting value)"),
        ('[{"text": "a"}]\n[{"text": "b"}]', "sample 1 is not JSON (text after the array"),
        ('{\n  "text": "a"\n}\n{\n  "text": "b"\n}', "line 1 is not JSON ("),
        ('{\n  "text": "a",\n}', "line 1 is not JSON ("),
        ('{"text": 1' + "0" * 5000 + "}", "line 1 is not JSON (Exceeds the limit (4300 digits)"),
        ('[{"text": 1' + "0" * 5000 + "}]", "sample 1 is not JSON (Exceeds the limit (4300"),
        ('{"text": ' + "[" * 10**5, "line 1 is nested too deeply"),
        ('[{"text": ' + "[" * 10**5, "sample 1 is not JSON (nested too deeply"),
    ],
)  # fmt: skip
def test_what_is_not_json_says_where(text: str, reason: str) -> None:
    with pytest.raises(CalibrationError) as caught:
        records_of(text.encode(), Path("a.json"))
    assert str(caught.value).startswith(f"a.json: {reason}")
    if reason.startswith("line"):
        assert str(caught.value).endswith(
            "; a .json file holds one array of records, or one record per line"
        )


@pytest.mark.parametrize("raw", [b"[", b"[\xff", b'[{"text": "\xc3'])
def test_an_array_that_breaks_off_is_refused(raw: bytes) -> None:
    with pytest.raises(CalibrationError, match=r"^a.jsonl: .* is not JSON"):
        records_of(raw)


def test_no_record_is_longer_than_the_limit() -> None:
    long = json.dumps({"text": "a" * (MAX_RECORD_BYTES + 1)})
    with pytest.raises(CalibrationError, match=r"line 1 is over 4,194,304 bytes"):
        records_of(f"{long}\n{long}".encode())
    with pytest.raises(CalibrationError, match=r"'text', over 4,194,304 bytes, too long"):
        records_of(long.encode())
    with pytest.raises(CalibrationError, match=r"sample 1 is not JSON .*over 4,194,304 bytes long"):
        records_of(b'[{"text": "' + b"a" * 3 * MAX_RECORD_BYTES)


def test_a_large_array_is_never_in_memory_as_a_whole() -> None:
    file = io.BytesIO(json.dumps([{"text": "word " * 2000}] * 4000).encode())  # 40 MB
    tracemalloc.start()
    try:
        assert sum(1 for _ in iterate_records(file, Path("a.json"), len)) == 4000
        assert tracemalloc.get_traced_memory()[1] < 12e6
    finally:
        tracemalloc.stop()


TEXT = FORMS["lines"]


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (TEXT.encode("utf-16"), "UTF-16 text, expected UTF-8; convert it with `iconv -f UTF-16"),
        (TEXT.encode("utf-32"), "UTF-16 text, expected UTF-8"),
        (gzip.compress(TEXT.encode(), mtime=0), "compressed with gzip; decompress it first"),
        (bz2.compress(TEXT.encode()), "compressed with bzip2"),
        (lzma.compress(TEXT.encode()), "compressed with xz"),
        (b"\x28\xb5\x2f\xfd\0", "compressed with zstd"),
        (b"PK\x03\x04\0", "compressed with zip"),
    ],
)
def test_other_encodings_are_refused_by_name(raw: bytes, reason: str, tmp_path: Path) -> None:
    for suffix, scan in (("jsonl", JsonFile), ("json", JsonFile), ("txt", TextFile)):
        path = tmp_path / f"a.{suffix}"
        path.write_bytes(raw)
        with pytest.raises(CalibrationError) as caught:
            scan(path)
        assert str(caught.value).startswith(f"{path}: {reason}")


def test_a_text_has_no_byte_order_mark_and_no_nul(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(codecs.BOM_UTF8 + b"words")
    assert TextFile(path).text() == "words"
    path.write_bytes("words".encode("utf-16-le"))
    with pytest.raises(CalibrationError, match=r"holds a NUL character \(byte 1\)"):
        TextFile(path)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=8,
)


@given(st.lists(VALUES, max_size=5), st.sampled_from([None, 1]), st.booleans(), st.integers(1, 9))
def test_any_array_is_read_as_python_reads_it(
    values: list[Any], indent: int | None, is_ascii: bool, block: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_records, "_BLOCK_BYTES", block)
        raw = json.dumps(values, indent=indent, ensure_ascii=is_ascii).encode()
        found = list(iterate_records(io.BytesIO(raw), Path("a"), len))
    assert [value for _, value in found] == values
    pieces = [raw[place.offset : place.offset + place.length] for place, _ in found]
    assert [json.loads(piece) for piece in pieces] == values


@pytest.mark.parametrize("mark", [b"", codecs.BOM_UTF8])
@pytest.mark.parametrize(
    "record", [{"text": "a"}, {"messages": [{"role": "user", "content": "a"}]}]
)
def test_an_object_for_people_is_one_record(record: Any, mark: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(mark + json.dumps(record, indent=2).encode())
    file = JsonFile(path)
    assert list(file.records()) == list(file.records_at([0])) == [record]
    assert file.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("indent", [None, 1])
def test_an_object_with_two_lists_is_refused_with_its_keys(indent: int | None) -> None:
    raw = json.dumps({"train": [{"text": "a"}], "test": [{"text": "b"}]}, indent=indent).encode()
    with pytest.raises(CalibrationError) as caught:
        records_of(raw, Path("a.json"))
    assert str(caught.value).startswith("a.json: one object with 'train', 'test', expected")
    assert "(2 found)" in str(caught.value)


def test_a_list_in_an_object_may_be_long_and_a_record_may_not() -> None:
    records = [{"text": "a" * 10**6}] * 5
    assert records_of(json.dumps({"data": records}).encode()) == records
    with pytest.raises(CalibrationError, match="over 4,194,304 bytes, too long"):
        records_of(json.dumps({"messages": records}, indent=1).encode())


@pytest.mark.parametrize("suffix", ["ndjson", "JSONL", "Json", "NDJSON"])
def test_suffixes_in_any_case_of_letters(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{suffix}"
    path.write_text(FORMS["lines"])
    for spec in (path, tmp_path):
        passages = load_corpus(str(spec), reading(lambda messages, tools: "")).passages
        assert len(passages) == 3
    assert not ignored_files(str(tmp_path))
