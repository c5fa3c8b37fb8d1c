from __future__ import annotations

import hashlib
import json
import tomllib
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reap2gguf.calibration.sources import Cut, Passage, load_corpus
from reap2gguf.calibration.tool_calls import Message, Tool
from reap2gguf.errors import CalibrationError
from reap2gguf.resources import shipped_folder
from tests.calibration.reading import reading


def render(messages: list[Message], tools: list[Tool] | None = None) -> str:
    names = "".join(f"<{tool['function']['name']}>" for tool in tools or ())
    return names + "".join(f"[{message['role']}] {message['content']}\n" for message in messages)


def write_jsonl(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
RECORDS = [
    ({"text": "plain words"}, "plain words"),
    ({"messages": CHAT}, "[user] hi\n[assistant] hello\n"),
    ({"prompt": "2+2?", "completion": "4"}, "[user] 2+2?\n[assistant] 4\n"),
    ({"prompt": CHAT, "completion": [{"role": "user", "content": "bye"}]},
     "[user] hi\n[assistant] hello\n[user] bye\n"),
    ({"messages": CHAT, "tools": [{"name": "f"}]}, "<f>[user] hi\n[assistant] hello\n"),
    ({"messages": CHAT, "tools": '[{"name": "f"}]'}, "<f>[user] hi\n[assistant] hello\n"),
    ({"messages": CHAT, "tools": ""}, "[user] hi\n[assistant] hello\n"),
    ({"messages": CHAT, "tools": None}, "[user] hi\n[assistant] hello\n"),
]  # fmt: skip


def test_a_text_file_is_one_stream(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("wörter\r\nzwei".encode())
    corpus = load_corpus(str(path), reading(render))
    assert corpus.passages == (Passage("wörter\r\nzwei", Cut.STREAM),)
    assert corpus.sha256 == hashlib.sha256("wörter\r\nzwei\0".encode()).hexdigest()


@pytest.mark.parametrize(("record", "text"), RECORDS)
def test_layouts_of_a_sample(record: object, text: str, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", record)
    assert load_corpus(str(path), reading(render)).passages == (Passage(text, Cut.SAMPLE),)


def test_parquet_holds_the_same_samples(tmp_path: Path) -> None:
    records = [{"messages": CHAT}, {"messages": CHAT[:1]}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "a.parquet")
    write_jsonl(tmp_path / "a.jsonl", *records)
    as_parquet = load_corpus(str(tmp_path / "a.parquet"), reading(render))
    assert as_parquet.passages == load_corpus(str(tmp_path / "a.jsonl"), reading(render)).passages


def test_a_folder_is_all_its_samples(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "b.jsonl", {"text": "second"})
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "notes.md").write_text("not read")
    corpus = load_corpus(str(tmp_path), reading(render))
    assert corpus.passages == (Passage("first", Cut.DOCUMENT), Passage("second", Cut.SAMPLE))
    assert corpus.text() == "first\nsecond"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "a"}\n{"text": ', "line 2 is not JSON"),
        (b"[1]\n", "sample 1: a int, expected an object"),
        (b'{"question": "a"}\n', "has question, expected text, messages"),
        (b'{"messages": [{"role": "user"}]}\n', "a message of 'user' has no content"),
        (b'{"messages": [{"content": "a"}]}\n', "expected messages with a role and content"),
        (b'{"messages": []}\n', "expected messages"),
        (b'{"messages": "a", "tools": "["}\n', "sample 1: tools are not JSON"),
        (b'{"messages": "a", "tools": {"name": "f"}}\n', "sample 1: expected tools as a list"),
        (b'{"messages": "a", "tools": [1]}\n', "sample 1: expected tools as a list"),
        (b"\n", "holds no text"),
        (b'{"text": "\\ud800"}\n', "holds half a character"),
    ],
)
def test_broken_samples_say_where(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    with pytest.raises(CalibrationError, match=message):
        load_corpus(str(path), reading(render))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"\xff\xfe\x00", "UTF-16 text"),
        ("a.txt", b"ab\xff", "not UTF-8"),
        ("a.txt", b"  \n", "holds no text"),
        ("a.parquet", b"PAR1", "cannot be read as Parquet"),
        ("a.csv", b"x", "expected a .txt"),
    ],
)
def test_unreadable_files(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CalibrationError, match=message):
        load_corpus(str(tmp_path / name), reading(render))


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet"])
def test_missing_files(name: str, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"cannot be read"):
        load_corpus(str(tmp_path / name), reading(render))


def test_what_the_template_refuses_says_which_sample(tmp_path: Path) -> None:
    def refuse(messages: list[Message], tools: list[Tool] | None = None) -> str:
        raise CalibrationError("the chat template refuses it")

    path = write_jsonl(tmp_path / "a.jsonl", {"text": "a"}, {"messages": CHAT})
    with pytest.raises(CalibrationError) as caught:
        load_corpus(str(path), reading(refuse))
    assert str(caught.value) == f"{path}: sample 2: the chat template refuses it"


@given(st.binary(max_size=200))
def test_any_jsonl_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, raw: bytes) -> None:
    path = tmp_path_factory.mktemp("any") / "a.jsonl"
    path.write_bytes(raw)
    try:
        load_corpus(str(path), reading(render))
    except CalibrationError as error:
        assert str(path) in str(error)


def test_the_embedded_mix_is_what_its_manifest_says() -> None:
    folder = shipped_folder("calibration")
    entries = tomllib.loads((folder / "manifest.toml").read_text())["files"]
    assert len(entries) >= 6
    assert sum(entry["bytes"] for entry in entries) >= 60_000
    assert {entry["licence"] for entry in entries} == {"CC0-1.0"}
    for entry in entries:
        raw = (folder / entry["name"]).read_bytes()
        assert (len(raw), hashlib.sha256(raw).hexdigest()) == (entry["bytes"], entry["sha256"])
    listed = {entry["name"] for entry in entries} | {"manifest.toml", "mixes.toml"}
    listed.add("held-out.txt")  # is measured on, and in no mix
    assert {path.name for path in folder.iterdir()} == listed
    dialogue = load_corpus(str(folder / "dialogue.jsonl"), reading(render))
    assert len(dialogue.passages) >= 20
    assert dialogue.passages[0].text.startswith("[")
