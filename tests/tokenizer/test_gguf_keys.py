from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFReader, GGUFWriter, TokenType
from tokenizers import Tokenizer as Library
from transformers import AutoTokenizer

from reap2gguf.errors import CheckpointError, UnsupportedModelError
from reap2gguf.models.tokenizer_families import QWEN
from reap2gguf.tokenizer.check import check_tokenizer
from reap2gguf.tokenizer.gguf_keys import add_tokenizer
from tests.tiny import EXAMPLE, REPOSITORY
from tests.tokenizer.small import (
    QWEN2,
    QWEN35,
    SMALL_SIZE,
    added,
    llama_cpp_tokenizer,
    tokenizer,
    write,
)

LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+"


def header(
    folder: Path, description: dict[str, Any], vocab_size: int = SMALL_SIZE + 8
) -> dict[str, Any]:
    """The keys that a tokenizer gives, read back by gguf-py."""
    (folder / "tokenizer.json").write_text(json.dumps(description))
    writer = GGUFWriter(folder / "header.gguf", "qwen3moe")
    try:
        add_tokenizer(writer, folder, vocab_size, QWEN)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()
    fields = GGUFReader(folder / "header.gguf").fields
    return {name: field.contents() for name, field in fields.items()}


@pytest.mark.parametrize(("pattern", "name"), [(QWEN2, "qwen2"), (QWEN35, "qwen35")])
def test_the_pre_tokenizer_is_recognised_by_its_pattern(
    tmp_path: Path, pattern: str, name: str
) -> None:
    keys = header(tmp_path, tokenizer(pattern))
    assert keys["tokenizer.ggml.pre"] == name
    assert keys["tokenizer.ggml.model"] == "gpt2"
    assert keys["tokenizer.ggml.merges"] == ["a b"]


@pytest.mark.parametrize("pattern", [LLAMA3, "", QWEN2 + " "])
def test_an_unknown_pattern_is_refused(tmp_path: Path, pattern: str) -> None:
    message = r"splits text by .* none of the patterns known here"
    with pytest.raises(UnsupportedModelError, match=message) as raised:
        header(tmp_path, tokenizer(pattern))
    assert "qwen2, qwen35" in str(raised.value)
    assert str(tmp_path / "tokenizer.json") in str(raised.value)


def test_no_pre_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="splits text by no pattern"):
        header(tmp_path, tokenizer() | {"pre_tokenizer": None})


@pytest.mark.parametrize("model", [{"type": "Unigram", "vocab": [["a", 0.0]]}, {}, None])
def test_a_tokenizer_that_is_not_bpe_is_refused(tmp_path: Path, model: Any) -> None:
    with pytest.raises(UnsupportedModelError, match="expected byte-level BPE"):
        header(tmp_path, tokenizer() | {"model": model})


def test_tokens_types_and_padding(tmp_path: Path) -> None:
    extra = [
        added(257, "<|end|>", special=True),
        added(258, "<|looks_special|>"),
        added(260, "<think>"),
        added(1, "b"),
    ]
    keys = header(tmp_path, tokenizer(added=extra), vocab_size=262)
    texts, types = keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.token_type"]
    pairs = [(text, TokenType(kind).name) for text, kind in zip(texts, types, strict=True)]
    assert pairs[:3] == [("a", "NORMAL"), ("b", "USER_DEFINED"), ("ab", "NORMAL")]
    assert {kind for _, kind in pairs[3:257]} == {"NORMAL"}
    assert pairs[257:] == [
        ("<|end|>", "CONTROL"),
        ("<|looks_special|>", "CONTROL"),
        ("[PAD259]", "UNUSED"),
        ("<think>", "USER_DEFINED"),
        ("[PAD261]", "UNUSED"),
    ]


@pytest.mark.parametrize("index", [265, 2**31, -1, None, "3", 3.0, True])
def test_an_id_outside_the_vocabulary_is_refused(tmp_path: Path, index: Any) -> None:
    with pytest.raises(CheckpointError, match=r"token '<t>' has the id .* vocab_size 265"):
        header(tmp_path, tokenizer(added=[added(index, "<t>")]))


def test_a_vocabulary_larger_than_the_models_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"token 'ab' has the id 2, .* vocab_size 2"):
        header(tmp_path, tokenizer(), vocab_size=2)


@pytest.mark.parametrize("vocab", [{}, None, ["a", "b"]])
def test_no_vocabulary_is_refused(tmp_path: Path, vocab: Any) -> None:
    description = tokenizer()
    description["model"]["vocab"] = vocab
    with pytest.raises(CheckpointError, match="no vocabulary"):
        header(tmp_path, description)


@pytest.mark.parametrize("token", [{"id": 3}, {"content": "<t>"}, "<t>", {"id": 3, "content": 5}])
def test_an_added_token_without_id_or_text_is_refused(tmp_path: Path, token: Any) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        header(tmp_path, tokenizer(added=[token]))


def test_an_absurd_vocabulary_size_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="vocab_size 1,099,511,627,776"):
        header(tmp_path, tokenizer(), vocab_size=2**40)


def test_a_missing_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
        add_tokenizer(GGUFWriter(tmp_path / "x.gguf", "qwen3moe"), tmp_path, 8, QWEN)


def test_special_ids_and_template_come_from_the_other_files(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"eos_token_id": 257, "bos_token_id": 2}')
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|end|>"}')
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    keys = header(tmp_path, tokenizer(added=[added(257, "<|end|>", special=True)]))
    assert keys["tokenizer.ggml.eos_token_id"] == 257
    assert keys["tokenizer.ggml.bos_token_id"] == 2
    assert keys["tokenizer.chat_template"] == "{{ messages }}"


def test_the_examples_tokens_are_those_llama_cpp_converts(tmp_path: Path) -> None:
    data = REPOSITORY / "tests" / "data" / "tiny-qwen3-moe.gguf.json"
    expected = json.loads(data.read_text())["BF16"]["metadata"]
    keys = header(tmp_path, json.loads((EXAMPLE / "tokenizer.json").read_text()), 4096)
    for name in ("tokens", "token_type", "merges"):
        text = json.dumps(keys[f"tokenizer.ggml.{name}"], ensure_ascii=False)
        digest = hashlib.sha256(text.encode()).hexdigest()
        assert expected[f"tokenizer.ggml.{name}"]["sha256"] == digest


@pytest.mark.parametrize("merges", [[5], [["a"]], [["a", "b", "c"]], "a b"])
def test_merges_that_are_no_pairs_are_refused(tmp_path: Path, merges: Any) -> None:
    description = tokenizer()
    description["model"]["merges"] = merges
    with pytest.raises(CheckpointError, match=r"merges"):
        header(tmp_path, description)


def test_a_broken_tokenizer_config_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json"):
        header(tmp_path, tokenizer())


def test_several_templates_are_written_in_one_order(tmp_path: Path) -> None:
    """gguf-py keeps their names in a set, whose order changes from process to process."""
    names = ["tool_use", "rag", "default", "zeta", "alpha", "think"]
    templates = [{"name": name, "template": f"{{{{ '{name}' }}}}"} for name in names]
    config = {"chat_template": templates}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    keys = header(tmp_path, tokenizer())
    assert keys["tokenizer.chat_templates"] == ["alpha", "rag", "think", "tool_use", "zeta"]
    assert keys["tokenizer.chat_template"] == "{{ 'default' }}"
    written = [key for key in keys if key.startswith("tokenizer.chat_template.")]
    assert written == [f"tokenizer.chat_template.{n}" for n in keys["tokenizer.chat_templates"]]


@pytest.mark.parametrize("name", ["chat_template.jinja", "additional_chat_templates/rag.jinja"])
def test_a_template_beyond_reason_is_not_copied(name: str, tmp_path: Path, example: Path) -> None:
    shutil.copytree(example, tmp_path / "model")
    path = tmp_path / "model" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("x" * (2**20 + 1))
    with pytest.raises(CheckpointError, match=r"1,048,577 bytes, expected a chat template of at"):
        check_tokenizer(tmp_path / "model", 4096, QWEN)


def test_a_tokenizer_without_an_end_of_text_is_refused(tmp_path: Path) -> None:
    """llama.cpp takes token 11 then, a comma in Qwen's vocabularies."""
    write(tmp_path, tokenizer())
    (tmp_path / "config.json").write_text('{"eos_token_id": [1, 2]}')  # gguf-py reads no lists
    with pytest.raises(CheckpointError, match=r"no eos_token .* token 11; set eos_token in"):
        check_tokenizer(tmp_path, SMALL_SIZE, QWEN)


START = {"SpecialToken": {"id": "<s>", "type_id": 0}}
TEXT = {"Sequence": {"id": "A", "type_id": 0}}
KNOWN = {"<s>": {"id": "<s>", "ids": [257], "tokens": ["<s>"]}}


@pytest.mark.parametrize(
    ("template", "config", "good"),
    [
        ([START, TEXT], {"bos_token": "<s>"}, True),
        ([START, TEXT], {"bos_token": "<e>"}, False),
        ([TEXT], {"bos_token": "<s>"}, True),
        ([TEXT], {"bos_token": "<s>", "add_bos_token": True}, False),
        ([TEXT], {"bos_token": "<s>", "add_eos_token": True}, False),
        ([TEXT, START], {"bos_token": "<s>"}, False),
        ([START, START, TEXT], {"bos_token": "<s>"}, False),
        ([START], {"bos_token": "<s>"}, False),
    ],
)
def test_llama_cpp_adds_the_tokens_that_the_post_processor_adds(
    template: list[Any], config: dict[str, Any], good: bool, tmp_path: Path
) -> None:
    tokens = [added(257, "<s>", special=True), added(258, "<e>", special=True)]
    processor = {"type": "TemplateProcessing", "single": template, "pair": []}
    description = tokenizer(added=tokens)
    description["post_processor"] = {**processor, "special_tokens": KNOWN}
    write(tmp_path, description)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    if not good:
        with pytest.raises(UnsupportedModelError, match=r"post_processor"):
            header(tmp_path, description)
        return
    header(tmp_path, description)
    library = Library.from_file(str(tmp_path / "tokenizer.json"))
    with llama_cpp_tokenizer(tmp_path, SMALL_SIZE + 2, QWEN) as llama:
        assert llama.encode("ab", add_special=True) == library.encode("ab").ids


ONE, TWO, THREE = "{{ 1 }}", "{{ 2 }}", "{{ 3 }}"
NAMED = [{"name": "rag", "template": TWO}, {"name": "default", "template": THREE}]


def templates_in(keys: dict[str, Any]) -> Any:
    """The templates of a header, as transformers' tokenizers have them."""
    start = "tokenizer.chat_template"
    found = {key[len(start) + 1 :]: text for key, text in keys.items() if key.startswith(start)}
    found.pop("", None)
    found = {key: text for key, text in found.items() if isinstance(text, str)}
    default = keys.get(start)
    found.pop("s", None)
    if not found:
        return default
    return found if default is None else {**found, "default": default}


@pytest.mark.parametrize(
    ("config", "jinja", "legacy"),
    [
        ({"chat_template": TWO}, ONE, None),
        ({"chat_template": NAMED}, ONE, None),
        ({"chat_template": None}, ONE, None),
        ({"chat_template": ""}, ONE, None),
        ({}, ONE + "\r\n", ONE + "\n"),
        (None, ONE, None),
        (None, None, None),
        ({"chat_template": TWO}, None, TWO),
        ({"chat_template": NAMED}, None, THREE),
        ({"chat_template": NAMED[:1]}, None, None),
        ({"chat_template": [*NAMED, {"name": "rag", "template": ONE}]}, None, None),
    ],
)
def test_the_template_is_the_one_that_transformers_loads(
    config: dict[str, Any] | None, jinja: str | None, legacy: str | None, tmp_path: Path
) -> None:
    write(tmp_path, tokenizer(added=[added(257, "<e>", special=True)]))
    if config is not None:
        config |= {"tokenizer_class": "PreTrainedTokenizerFast"}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    if jinja is not None:
        (tmp_path / "chat_template.jinja").write_bytes(jinja.encode())
    if legacy is not None:
        (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": legacy}))
    (tmp_path / "config.json").write_text('{"eos_token_id": 257, "model_type": "qwen3_moe"}')
    loaded = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True).chat_template
    assert templates_in(
        header(tmp_path, json.loads((tmp_path / "tokenizer.json").read_text()))
    ) == (loaded)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"chat_template.json": {"chat_template": ONE}}, r"and load no template, .* remove it"),
        (
            {"chat_template.json": {"chat_template": ONE}, "chat_template.jinja": TWO},
            r"chat_template\.json: .* and load another one",
        ),
        ({"additional_chat_templates/rag.jinja": ONE}, r"rag\.jinja: .* save_jinja_files=False"),
        ({"chat_template.jinja": ""}, r"chat_template\.jinja: the chat template is empty"),
        ({"tokenizer_config.json": {"chat_template": ""}}, r"config\.json: .* is empty"),
        (
            {
                "tokenizer_config.json": {
                    "chat_template": [{"name": n, "template": ONE} for n in ("a-b", "a_b")]
                }
            },
            r"the name 'a_b', expected names that differ",
        ),
        ({"chat_template.jinja": b"\xff"}, r"chat_template\.jinja: not UTF-8"),
    ],
)
def test_templates_that_programs_read_differently_are_refused(
    files: dict[str, Any], message: str, tmp_path: Path
) -> None:
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        text = json.dumps(content) if isinstance(content, dict) else content
        (tmp_path / name).write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(CheckpointError, match=message):
        header(tmp_path, tokenizer())


@pytest.mark.parametrize("config", [{"pad_token_id": -1}, {"text_config": {"bos_token_id": -1}}])
def test_an_id_that_no_token_has_is_named_with_its_file(
    config: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"config\.json: (pad|bos)_token_id is -1, expected"):
        header(tmp_path, tokenizer())
