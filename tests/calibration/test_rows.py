from __future__ import annotations

import json
import shutil
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from transformers import AutoTokenizer

from reap2gguf.artifacts.texts import Texts
from reap2gguf.calibration.drawing import imatrix_chunks, observation_rows, read_texts
from reap2gguf.calibration.rows import chunk_text, make_rows, spread
from reap2gguf.calibration.sources import Corpus, Cut, Passage
from reap2gguf.calibration.spec import Calibration, decide
from reap2gguf.checkpoint.safetensors_header import read_metadata
from reap2gguf.errors import ArtifactError, CalibrationError, CheckpointError
from reap2gguf.options import CalibrationOptions
from reap2gguf.tokenizer.tokenizer import Tokenizer
from tests.tiny import EXAMPLE

TEXT = "def add(a, b):\n    return a + b\n\n" * 40


def asked(*values: Any, **named: Any) -> Calibration:
    return decide(CalibrationOptions(*values, **named))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(EXAMPLE)


@pytest.fixture(scope="module")
def ids() -> list[int]:
    reference = AutoTokenizer.from_pretrained(EXAMPLE, model_max_length=10**9)
    return list(reference(TEXT, add_special_tokens=False)["input_ids"])


def corpus(cut: Cut, *texts: str) -> Corpus:
    return Corpus("test", tuple(Passage(text, cut) for text in texts))


def rows_of(*arguments: Any, **named: Any) -> list[Any]:
    return [one.tokens for one in make_rows(*arguments, **named)]


def test_a_stream_is_cut_into_whole_rows(tokenizer: Tokenizer, ids: list[int]) -> None:
    rows = rows_of(corpus(Cut.STREAM, TEXT), tokenizer, 50, None, seed=1)
    assert [list(row) for row in rows] == [ids[i : i + 50] for i in range(0, len(ids) - 49, 50)]
    first = rows_of(corpus(Cut.STREAM, TEXT), tokenizer, 50, 3, seed=2)
    assert [list(row) for row in first] == [ids[:50], ids[50:100], ids[100:150]]


def test_a_document_keeps_its_tail(tokenizer: Tokenizer, ids: list[int]) -> None:
    length = (len(ids) - 20) // 2
    rows = rows_of(corpus(Cut.DOCUMENT, TEXT), tokenizer, length, None, seed=1)
    assert sorted(len(row) for row in rows) == [len(ids) - 2 * length, length, length]


def test_a_sample_is_one_row(tokenizer: Tokenizer, ids: list[int]) -> None:
    rows = rows_of(corpus(Cut.SAMPLE, TEXT, "short one", "x"), tokenizer, 64, None, seed=1)
    assert sorted(len(row) for row in rows)[-1] == 64
    assert ids[:64] in [list(row) for row in rows]


def test_samples_are_shuffled_by_the_seed(tokenizer: Tokenizer) -> None:
    texts = [f"sample number {i} of many" for i in range(20)]

    def order(seed: int) -> list[list[int]]:
        rows = rows_of(corpus(Cut.SAMPLE, *texts), tokenizer, 64, 5, seed)
        return [list(row) for row in rows]

    assert order(1) == order(1)
    assert order(1) != order(2)


def test_too_little_text_says_how_little(tokenizer: Tokenizer) -> None:
    with pytest.raises(CalibrationError, match=r"\d+ tokens do not fill one row of 2,048"):
        make_rows(corpus(Cut.STREAM, "a few words"), tokenizer, 2048, None, 1)
    with pytest.raises(CalibrationError, match=r"notes\.txt: \d+ tokens do not fill one chunk"):
        chunk_text("a few words", tokenizer, 512, "notes.txt")


def test_chunks_are_those_of_llama_imatrix(tokenizer: Tokenizer, ids: list[int]) -> None:
    chunks = chunk_text(TEXT, tokenizer, 32, "text")
    assert len(chunks) == len(ids) // 32
    np.testing.assert_array_equal(np.concatenate(chunks), ids[: len(chunks) * 32])


def test_bos_begins_each_row_where_the_tokenizer_adds_one(tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(EXAMPLE / name, tmp_path / name)
    values = json.loads((tmp_path / "tokenizer.json").read_text())
    bos = {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}
    values["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [bos, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {
            "<|endoftext|>": {"id": "<|endoftext|>", "ids": [4093], "tokens": ["<|endoftext|>"]}
        },
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.bos == 4093
    rows = chunk_text(TEXT, tokenizer, 32, "text")
    assert {int(row[0]) for row in rows} == {4093}


def test_the_chat_template_is_the_models(tokenizer: Tokenizer) -> None:
    text = tokenizer.render_chat(
        [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    )
    assert text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>\n"
    assert list(tokenizer.encode("<|im_start|>")) == [4094]


def test_a_template_that_refuses_is_one_line(tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(EXAMPLE / name, tmp_path / name)
    (tmp_path / "chat_template.jinja").write_text("{{ raise_exception('no system role') }}")
    with pytest.raises(CalibrationError, match="no system role"):
        Tokenizer(tmp_path).render_chat([{"role": "system", "content": "x"}])


def test_a_template_runs_in_a_sandbox(tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(EXAMPLE / name, tmp_path / name)
    attack = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    (tmp_path / "chat_template.jinja").write_text(attack)
    with pytest.raises(
        CalibrationError, match=r"does something forbidden \(access to attribute '__class__'"
    ):
        Tokenizer(tmp_path).render_chat([{"role": "user", "content": "x"}])


def test_a_folder_without_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no usable tokenizer"):
        Tokenizer(tmp_path)


class PanicException(BaseException):
    """What the Rust library raises when it panics: no Exception."""


def test_a_panic_of_the_tokenizer_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def panic(*args: Any, trust_remote_code: bool, **kwargs: Any) -> None:
        assert not trust_remote_code
        raise PanicException("called `Option::unwrap()` on a `None` value")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", panic)
    with pytest.raises(CheckpointError, match=r"no usable tokenizer \(called `Option::unwrap"):
        Tokenizer(tmp_path)

    def interrupt(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", interrupt)
    with pytest.raises(KeyboardInterrupt):
        Tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["chat_template.jinja", "chat_templates/rag.jinja"])
def test_a_template_file_beyond_reason(name: str, tmp_path: Path) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("x" * (2**20 + 1))
    with pytest.raises(CheckpointError, match=r"1,048,577 bytes, expected a chat template of at"):
        Tokenizer(tmp_path)


def test_a_template_that_is_no_text(tmp_path: Path) -> None:
    shutil.copyfile(EXAMPLE / "tokenizer.json", tmp_path / "tokenizer.json")
    config = json.loads((EXAMPLE / "tokenizer_config.json").read_text()) | {"chat_template": 5}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="its chat template is not text"):
        Tokenizer(tmp_path)


def test_labels_tell_no_paths(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_text(TEXT)
    rows = observation_rows(tokenizer, asked(str(path), max_length=64), 64, 4096)
    assert rows.label == "mine.txt"
    assert imatrix_chunks(tokenizer, path, 64).label == "mine.txt"


def test_the_importance_matrix_reads_the_same_corpus(tokenizer: Tokenizer) -> None:
    texts = read_texts(tokenizer, asked(), 512, None, 512, 4096)
    rows, chunks = texts.rows, texts.chunks
    assert (rows.label, chunks.label) == ("default", "default")
    assert len(chunks.chunks) > 100
    assert "<|im_start|>assistant" in chunks.text


def test_the_importance_matrix_reads_no_more_than_the_observation_may(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    path = tmp_path / "many.jsonl"
    path.write_text("".join(json.dumps({"text": f"{i} " + TEXT}) + "\n" for i in range(50)))
    options = asked(str(path), samples=3, max_length=64)
    texts = read_texts(tokenizer, options, 64, None, 32, 4096)
    assert len(texts.rows.rows) == 3
    assert len(texts.chunks.chunks) == 3 * 64 // 32 < texts.chunks.n_of_text
    assert texts.chunks.text.count("def add(a, b)") == 3 * TEXT.count("def add(a, b)")


@settings(deadline=None)
@given(n_of=st.integers(1, 400), n=st.integers(1, 500), seed=st.integers(-9, 9))
def test_a_few_of_many_are_spread(n_of: int, n: int, seed: int) -> None:
    chosen = spread(n_of, n, seed)
    assert chosen == sorted(set(chosen)) == spread(n_of, n, seed)
    assert len(chosen) == min(n, n_of)
    assert chosen[0] >= 0
    assert chosen[-1] < n_of
    # one of each stretch: never further apart than two stretches, at both ends too
    widest = 2 * -(-n_of // n)
    assert all(b - a < widest for a, b in pairwise([-1, *chosen, n_of]))


def test_the_seed_decides_which() -> None:
    assert len({tuple(spread(150, 8, seed)) for seed in range(10)}) > 5
    assert spread(150, 8, 42) == [3, 18, 45, 63, 82, 97, 115, 148]


def test_chunks_are_not_the_head_of_the_text(tokenizer: Tokenizer) -> None:
    few = asked(samples=16, max_length=256)
    chunks = read_texts(tokenizer, few, 256, None, 512, 4096).chunks
    every = read_texts(tokenizer, asked(), 512, None, 512, 4096).chunks
    assert len(chunks.chunks) == 8
    assert chunks.n_of_text == len(every.chunks) == every.n_of_text
    numbers = [
        next(n for n, other in enumerate(every.chunks) if np.array_equal(one, other))
        for one in chunks.chunks
    ]
    assert numbers == spread(chunks.n_of_text, 8, 42)
    assert chunks.summary == (f"8 of {chunks.n_of_text} chunks of 512 tokens, spread over the text")
    assert every.summary == f"all {chunks.n_of_text} chunks of 512 tokens"
    more = read_texts(tokenizer, few, 256, None, 512, 4096, n_chunks=12).chunks
    assert len(more.chunks) == 12


def test_chunks_of_a_text_of_its_own(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "own.txt"
    path.write_text("".join(f"{number} {TEXT}" for number in range(8)))
    every = read_texts(tokenizer, asked(), 512, path, 64, 4096).chunks
    assert len(every.chunks) == every.n_of_text > 50
    few = read_texts(tokenizer, asked(seed=7), 512, path, 64, 4096, n_chunks=5).chunks
    assert few.n_of_text == every.n_of_text
    for number, chunk in zip(spread(every.n_of_text, 5, 7), few.chunks, strict=True):
        assert np.array_equal(chunk, every.chunks[number])
    assert few.sha256 == every.sha256, "of the whole text"
    assert few.tokens_sha256 != every.tokens_sha256


def test_how_rows_are_cut_is_in_their_hashes(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text(TEXT * 8)
    cuts = [asked(str(path), samples=8, max_length=64),
            asked(str(path), samples=4, max_length=128)]  # fmt: skip
    texts = [
        read_texts(tokenizer, cut, cut.max_length, None, cut.max_length, 4096, n_chunks=10**9)
        for cut in cuts
    ]
    for name in ("rows", "chunks"):
        one, other = (getattr(getattr(text, name), name) for text in texts)
        first_ones = (np.concatenate(cut)[: 8 * 64] for cut in (one, other))
        assert np.array_equal(*first_ones), "the same tokens"
    assert texts[0].rows.sha256 != texts[1].rows.sha256
    assert texts[0].chunks.tokens_sha256 != texts[1].chunks.tokens_sha256


def test_texts_are_kept_as_they_are(tokenizer: Tokenizer, tmp_path: Path) -> None:
    texts = read_texts(tokenizer, asked(), 512, None, 128, 4096)
    texts.save(tmp_path / "texts.safetensors")
    loaded = Texts.load(tmp_path / "texts.safetensors")
    for kept, made in (
        (loaded.rows.rows, texts.rows.rows),
        (loaded.chunks.chunks, texts.chunks.chunks),
    ):
        assert len(kept) == len(made)
        assert all(np.array_equal(a, b) for a, b in zip(kept, made, strict=True))
    assert (loaded.rows.label, loaded.rows.sha256) == (texts.rows.label, texts.rows.sha256)
    assert loaded.chunks.text == texts.chunks.text
    assert loaded.chunks.n_of_text == texts.chunks.n_of_text
    assert loaded.made_with == texts.made_with
    assert loaded.made_with["tokenizers"] == version("tokenizers")
    assert loaded.chunks.tokens_sha256 == texts.chunks.tokens_sha256


@pytest.mark.parametrize("name", ["rows.lengths", "chunks.tokens", "text"])
def test_damaged_texts(tokenizer: Tokenizer, tmp_path: Path, name: str) -> None:
    path = tmp_path / "texts.safetensors"
    read_texts(tokenizer, asked(samples=2), 64, None, 64, 4096).save(path)
    arrays, metadata = load_file(path), read_metadata(path)
    arrays[name] = arrays[name][:-1]
    if name == "text":
        arrays[name][-1] = 0xFF
    save_file(arrays, path, metadata)
    with pytest.raises(ArtifactError, match="damaged, not the tokenized text that was saved"):
        Texts.load(path)


def test_a_tokenizer_beyond_the_models_vocabulary(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_text(TEXT)
    with pytest.raises(CalibrationError, match=r"gives id \d+, but the model's vocab_size is 100"):
        observation_rows(tokenizer, asked(str(path), max_length=64), 64, 100)


def test_another_tokenizer_makes_another_key(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_text(TEXT)
    options = asked(str(path), max_length=64)
    first = observation_rows(tokenizer, options, 64, 4096)
    shorter = observation_rows(tokenizer, options, 32, 4096)
    assert first.sha256 != shorter.sha256


@pytest.mark.parametrize(
    "template", ["{{ 1 / 0 }}", "{{ range(10**9) | list }}", "{% include 'x' %}"]
)
def test_a_template_that_fails_is_one_line(tmp_path: Path, template: str) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(EXAMPLE / name, tmp_path / name)
    (tmp_path / "chat_template.jinja").write_text(template)
    with pytest.raises(CalibrationError, match="the chat template refuses it"):
        Tokenizer(tmp_path).render_chat([{"role": "user", "content": "x"}])
