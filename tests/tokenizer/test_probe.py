from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from pathlib import Path
from random import Random
from time import process_time
from typing import Any

import pytest
from tokenizers import Tokenizer as Library

from reap2gguf.errors import CheckpointError, UnsupportedModelError
from reap2gguf.models.tokenizer_families import QWEN
from reap2gguf.tokenizer.added_tokens import is_nfc
from reap2gguf.tokenizer.probe import HARD_CASES, check_against_library
from reap2gguf.tokenizer.vocabulary import read_vocabulary
from tests.tokenizer.mutations import HARMLESS, Draft
from tests.tokenizer.small import added, byte_level, llama_cpp_tokenizer, write


def probe(draft: Draft, folder: Path, pre: str = "qwen2") -> None:
    """Compare the ids alone: the form of the tokenizer is not looked at."""
    draft.write(folder)
    path = folder / "tokenizer.json"
    check_against_library(read_vocabulary(draft.description, 4200, path), path, pre)


def test_hard_cases_are_in_normal_form() -> None:
    assert all(map(is_nfc, HARD_CASES))


def test_llama_cpp_makes_the_ids_that_are_compared(tmp_path: Path) -> None:
    draft = Draft.of_example()
    draft.write(tmp_path)
    library = Library.from_file(str(tmp_path / "tokenizer.json"))
    with llama_cpp_tokenizer(tmp_path, 4096, QWEN) as llama:
        for text in HARD_CASES:
            assert llama.encode(text) == library.encode(text).ids, text


@pytest.mark.parametrize("mutate", [m for m in HARMLESS if m.__name__ != "marks_in_words"])
def test_harmless_changes_pass(mutate: Any, tmp_path: Path) -> None:
    draft = Draft.of_example()
    mutate(draft, Random(1))
    probe(draft, tmp_path)


def changed(**parts: Any) -> Callable[[Draft], None]:
    return lambda draft: draft.description.update(parts)


def step(index: int, **settings: Any) -> Callable[[Draft], None]:
    return lambda draft: draft.steps[index].update(settings)


def more(kind: str, **settings: Any) -> Callable[[Draft], None]:
    return lambda draft: draft.steps.insert(1, {"type": kind, **settings})


@pytest.mark.parametrize(
    "change",
    [
        step(-1, add_prefix_space=True),
        step(-1, use_regex=True),
        step(0, behavior="Removed"),
        step(0, pattern={"String": " "}),
        more("Punctuation", behavior="Isolated"),
        more("WhitespaceSplit"),
        more("CharDelimiterSplit", delimiter="_"),
        more("UnicodeScripts"),
        more("Metaspace", replacement="▁", prepend_scheme="always", split=True),
        changed(normalizer={"type": "NFKC"}),
        changed(normalizer={"type": "NFD"}),
        changed(normalizer={"type": "Lowercase"}),
        changed(normalizer={"type": "Strip", "strip_left": True, "strip_right": True}),
        changed(pre_tokenizer=byte_level()),
        lambda draft: draft.model.update(ignore_merges=True, merges=draft.model["merges"][:9]),
        lambda draft: draft.model.update(dropout=0.3),
    ],
)
def test_other_ids_are_found_without_a_list(change: Any, tmp_path: Path) -> None:
    draft = Draft.of_example()
    change(draft)
    message = r"llama.cpp would tokenize .* as \[.*\] where transformers has \[.*; use the tok"
    with pytest.raises(UnsupportedModelError, match=message):
        probe(draft, tmp_path)


def test_marks_are_found_under_the_other_name(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="would tokenize"):
        probe(Draft.of_example(), tmp_path, pre="qwen35")


def test_ids_that_the_library_gives_are_those_of_the_file(tmp_path: Path) -> None:
    draft = Draft.of_example()
    draft.added.append(added(4100, "<gap>"))
    with pytest.raises(CheckpointError, match=r"'<gap>' has the id 4100, .* gives it 4096: ids"):
        probe(draft, tmp_path)


def test_a_file_that_the_library_does_not_load_is_refused(tmp_path: Path) -> None:
    draft = Draft.of_example()
    draft.description["truncation"] = "x"
    with pytest.raises(CheckpointError, match="no usable tokenizer"):
        probe(draft, tmp_path)


@pytest.mark.slow
def test_a_vocabulary_of_real_size_takes_little_time_and_memory(tmp_path: Path) -> None:
    """151,000 tokens take about half a second of one core; the limit allows for slow machines."""
    draft = Draft.of_example()
    grow(draft, 151_000)
    write(tmp_path, draft.description)
    path = tmp_path / "tokenizer.json"
    vocabulary = read_vocabulary(draft.description, 151_936, path)
    before = process_time()
    check_against_library(vocabulary, path, "qwen2")
    assert process_time() - before < 5
    tracemalloc.start()
    check_against_library(vocabulary, path, "qwen2")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100 * 2**20


def grow(draft: Draft, size: int) -> None:
    """Add merges of two words that are tokens, until there are `size` tokens."""
    vocab, merges, draw = draft.model["vocab"], draft.model["merges"], Random(0)
    words = [text for text in vocab if text.isalpha()]
    for token in draft.added:
        token["id"] += size - len(vocab)
    while len(vocab) < size:
        left, right = draw.choice(words), draw.choice(words)
        if left + right not in vocab:
            vocab[left + right] = len(vocab)
            merges.append([left, right])
