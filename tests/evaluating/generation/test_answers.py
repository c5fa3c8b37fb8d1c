"""Answers that are kept: whole lines, of one model, asked in one way."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from reap2gguf.errors import ArtifactError, OutputError
from reap2gguf.evaluating.generation.answers import (
    Answer,
    answer_key,
    fingerprint,
    kept_answers,
)

FIRST = Answer("a", "HumanEval/0", "chat", "text\n\u2028 and more")
SECOND = Answer("b", "HumanEval/1", "completion", "\ud800")


def test_answers_are_found_again(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    for answer in (FIRST, SECOND):
        with kept_answers(path) as answers:
            assert answers.get(answer.key) is None
            answers.add(answer)
            assert answers.get(answer.key) == answer
    with kept_answers(path) as answers:
        assert [answers.get("a"), answers.get("b")] == [FIRST, SECOND]


def test_at_every_byte_a_run_can_end(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    with kept_answers(path) as answers:
        answers.add(FIRST)
        answers.add(SECOND)
    whole = path.read_bytes()
    for end in range(len(whole)):
        path.write_bytes(whole[:end])
        with kept_answers(path) as answers:
            n_lines = whole[:end].count(b"\n")
            assert [answers.get("a") == FIRST, answers.get("b") == SECOND] == [
                n_lines > 0,
                n_lines > 1,
            ]
            if n_lines < 2:
                answers.add(SECOND)
        assert path.read_bytes().endswith(b"\n")


@pytest.mark.parametrize(
    "line",
    [
        b"[]",
        b"{}",
        b'{"key": 1}',
        b"[" * 10_000,
        b"\xff",
        b'{"key":"a","task_id":"b","style":"other","text":"c"}',
        b'{"key":"a","task_id":"b","style":"chat","text":1}',
    ],
)
def test_another_file_is_refused(line: bytes, tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_bytes(line + b"\n")
    with pytest.raises(ArtifactError, match="line 1 is not an answer"), kept_answers(path):
        pass
    assert path.read_bytes() == line + b"\n"


def test_a_link_is_not_written_through(tmp_path: Path) -> None:
    (tmp_path / "other").write_text("")
    (tmp_path / "answers.jsonl").symlink_to("other")
    with pytest.raises(OutputError, match="a link"), kept_answers(tmp_path / "answers.jsonl"):
        pass


def test_fingerprints(example: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(example, folder)
    assert fingerprint(folder) == fingerprint(example)
    shard = next(folder.glob("*.safetensors"))
    os.utime(shard)
    assert fingerprint(folder) == fingerprint(example)
    with shard.open("r+b") as file:
        file.write(b"x")
    assert fingerprint(folder) != fingerprint(example)
    assert fingerprint(shard) != fingerprint(folder)
    with pytest.raises(ArtifactError, match="cannot be read"):
        fingerprint(tmp_path / "missing.gguf")


def test_keys() -> None:
    assert answer_key({"a": 1, "b": None}) == answer_key({"b": None, "a": 1})
    assert answer_key({"a": 1}) != answer_key({"a": 2})
