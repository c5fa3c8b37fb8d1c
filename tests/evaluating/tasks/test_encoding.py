from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from reap2gguf.errors import CheckpointError, EvaluationError
from reap2gguf.evaluating.tasks.encoding import Encoded, encode, encoder_of
from reap2gguf.evaluating.tasks.harness import harness
from tests.tiny import EXAMPLE
from tests.tokens import TOKENIZER_FILES, write_tokenizer

LENGTH = 16


def request(*texts: Any, kind: str = "loglikelihood") -> Any:
    return SimpleNamespace(request_type=kind, args=texts)


def encoder(max_length: int | None = LENGTH, folder: Path = EXAMPLE) -> Any:
    with harness(allows_code=False):
        return encoder_of(folder, max_length)


def encoded(*requests: Any, max_length: int = LENGTH) -> Encoded:
    found = Encoded()
    one = encoder(max_length)
    with harness(allows_code=False):
        encode(one, "task", requests, found)
    return found


def test_a_continuation_is_scored_after_its_context() -> None:
    one = encoder()
    found = encoded(request("The sky is", " blue today"))
    (row,) = found.rows
    assert one.tokenizer.decode(row.tokens) == "The sky is blue today"
    assert one.tokenizer.decode(row.tokens[row.first :]) == " blue today"


def test_spaces_at_the_end_of_a_context_are_the_continuations() -> None:
    spaced, plain = encoded(request("The sky is ", "blue"), request("The sky is", " blue")).rows * 2
    assert spaced.tokens.tolist() == plain.tokens.tolist()


def test_an_empty_context_is_the_first_token_of_a_text() -> None:
    one = encoder()
    (row,) = encoded(request("", "blue sky")).rows
    assert row.first == 1
    assert row.tokens[0] == one.prefix_token_id
    # a continuation that begins with that token has it once, as its context
    prefix = one.tokenizer.decode(one.prefix_token_id)
    (same,) = encoded(request("", f"{prefix}blue sky")).rows
    assert same.tokens.tolist() == row.tokens.tolist()


def test_what_is_too_long_loses_its_beginning() -> None:
    text = "one two three four five six seven eight nine ten " * 4
    found = encoded(request(text.strip(), " end"))
    (row,) = found.rows
    assert len(row.tokens) == LENGTH + 1  # the last token is scored, and read by nothing
    assert found.n_cut == 1
    whole = encoder().tokenizer.encode(f"{text.strip()} end")
    assert row.tokens.tolist() == whole[-(LENGTH + 1) :]


def test_windows_score_each_token_of_a_text_once() -> None:
    text = "It was a bright cold day in April, and the clocks were striking thirteen. " * 3
    found = encoded(request(text, kind="loglikelihood_rolling"))
    (numbers,) = found.answers.values()
    rows = [found.rows[number] for number in numbers]
    scored = [token for row in rows for token in row.tokens[row.first :].tolist()]
    assert scored == encoder().tokenizer.encode(text)
    assert all(len(row.tokens) <= LENGTH + 1 for row in rows)
    assert len(rows[-1].tokens) == LENGTH + 1  # with as much before the last ones as fits
    empty = encoded(request("", kind="loglikelihood_rolling"))
    assert list(empty.answers.values()) == [()]


def test_rows_are_kept_once_and_answers_of_a_question_are_neighbours() -> None:
    letters = [request(text, letter) for letter in (" A", " B") for text in ("Who?", "Why?")]
    found = encoded(*letters, *letters, request("Who", "? A"))
    assert found.n_requests == 9
    assert len(found.rows) == 5  # the last has the same tokens, of which another part is scored
    before = {key: [found.rows[n] for n in numbers] for key, numbers in found.answers.items()}
    found.sort()
    after = {key: [found.rows[n] for n in numbers] for key, numbers in found.answers.items()}
    assert before == after
    beginnings = [row.tokens[:-1].tolist() for row in found.rows]
    changes = sum(a != b for a, b in pairwise(beginnings))
    assert changes == 1


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (request("Who?", ""), "task: an answer to 'Who[?]' is empty"),
        (request("  ", "you"), "task: the question at '  ' has no tokens of its own"),
        (request("Who?", " you" * 99), "tokens, expected at most 16"),
        (request("Who?", 3), "expected texts"),
        (request("Who?", {}, kind="generate_until"), "asks for 'generate_until'"),
    ],
)
def test_requests_that_cannot_be_answered(asked: Any, words: str) -> None:
    with pytest.raises(EvaluationError, match=words):
        encoded(asked)


def write_config(folder: Path, **values: Any) -> Path:
    write_tokenizer(folder, 512)
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def test_the_length_of_a_context_is_found_as_by_lm_eval(tmp_path: Path) -> None:
    nested = {"text_config": {"max_position_embeddings": 99}, "max_position_embeddings": 7}
    assert encoder(None, write_config(tmp_path, **nested)).max_length == 99
    assert encoder(None, write_config(tmp_path, thinker_config=nested)).max_length == 99
    assert encoder(None, write_config(tmp_path, n_ctx=50)).max_length == 50
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    for length, expected in ((333, 333), (None, 2048)):
        changed = {**config, "model_max_length": length}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(changed))
        (tmp_path / "config.json").write_text("{}")
        assert encoder(None, tmp_path).max_length == expected
    with pytest.raises(CheckpointError, match="the context has 'many' tokens, expected a count"):
        encoder(None, write_config(tmp_path, n_ctx="many"))


def test_folders_without_a_tokenizer_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no usable tokenizer"):
        encoder(LENGTH, tmp_path)
    write_config(tmp_path)
    name = next(name for name in TOKENIZER_FILES if name == "tokenizer_config.json")
    config = json.loads((tmp_path / name).read_text())
    for key in ("bos_token", "eos_token"):
        config[key] = None
    (tmp_path / name).write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="no token for the beginning or end of a text"):
        encoder(LENGTH, tmp_path)
