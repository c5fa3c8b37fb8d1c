"""Tokenizers like those of published models: what llama.cpp's converter writes of them, and ids."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFWriter
from tokenizers import Tokenizer as Library
from transformers import AutoTokenizer

from reap2gguf.errors import CheckpointError, UnsupportedModelError
from reap2gguf.models.tokenizer_families import tokenizer_family
from reap2gguf.tokenizer.caveats import NO_BOS_CAVEAT, PREFIX_CAVEAT
from reap2gguf.tokenizer.check import check_tokenizer
from reap2gguf.tokenizer.gguf_keys import add_tokenizer
from reap2gguf.tokenizer.tokenizer import Tokenizer
from tests.tiny import REPOSITORY
from tests.tokenizer.families import PUBLISHED, Published, plain
from tests.tokenizer.small import llama_cpp_tokenizer, loaded_by_llama_cpp, mixed_text

# what llama.cpp's converter (commit 0c1e570) writes for each, its guess of `pre` replaced
EXPECTED = json.loads((REPOSITORY / "tests" / "data" / "tokenizer-keys.json").read_text())
each = pytest.mark.parametrize("published", PUBLISHED, ids=lambda one: one.name)


def keys_of(published: Published, folder: Path) -> dict[str, Any]:
    writer = GGUFWriter(None, "x")
    family = tokenizer_family(published.model_type)
    add_tokenizer(writer, folder, published.vocab_size, family)
    return {
        key: plain(entry.value)
        for key, entry in writer.kv_data[0].items()
        if key.startswith("tokenizer.")
    }


def test_each_family_is_recorded() -> None:
    assert EXPECTED.keys() == {published.name for published in PUBLISHED}


@each
def test_keys_are_those_of_the_converter(published: Published, tmp_path: Path) -> None:
    assert keys_of(published, published.write(tmp_path)) == EXPECTED[published.name]


@each
def test_ids_are_those_of_llama_cpp_and_of_the_library(
    published: Published, tmp_path: Path
) -> None:
    published.write(tmp_path)
    size, family = published.vocab_size, tokenizer_family(published.model_type)
    check_tokenizer(tmp_path, size, family)
    tokenizer = Tokenizer(tmp_path)
    library = Library.from_file(str(tmp_path / "tokenizer.json"))
    text = mixed_text(seed=3, length=3_000)
    for token in [*published.special, *published.ordinary]:
        text = text.replace(" ", token, 1)
    with llama_cpp_tokenizer(tmp_path, size, family) as llama:
        ids = llama.encode(text, add_special=True)
    expected = library.encode(text).ids
    if len(published.begins_with) > 1:  # llama.cpp puts one of them
        del expected[1]
    assert ids == expected
    first = [] if tokenizer.bos is None else [tokenizer.bos]
    assert [*first, *tokenizer.encode(text)] == ids


@each
def test_transformers_makes_the_same_ids(published: Published, tmp_path: Path) -> None:
    """And where it did not, the user would be told of a class that splits in its own way."""
    published.write(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    library = Library.from_file(str(tmp_path / "tokenizer.json"))
    text = mixed_text(seed=4, length=3_000)
    assert loaded.encode(text) == library.encode(text).ids
    found = check_tokenizer(tmp_path, published.vocab_size, tokenizer_family(published.model_type))
    assert not any("loads the tokenizer as" in caveat for caveat in found)


@each
def test_an_answer_ends_where_the_header_says_it(published: Published, tmp_path: Path) -> None:
    published.write(tmp_path)
    size, family = published.vocab_size, tokenizer_family(published.model_type)
    expected = EXPECTED[published.name]
    ends = [expected.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot", "eom")]
    with llama_cpp_tokenizer(tmp_path, size, family) as llama:
        assert all(llama.ends_at(end) for end in ends if end is not None)


def test_the_ends_of_glm_need_no_flag(tmp_path: Path) -> None:
    """transformers ends an answer at three tokens, and the header names two of them."""
    glm = PUBLISHED[0]
    glm.write(tmp_path)
    found = check_tokenizer(tmp_path, glm.vocab_size, tokenizer_family(glm.model_type))
    assert not any("ends an answer" in caveat for caveat in found)


def test_two_tokens_before_a_text_are_told(tmp_path: Path) -> None:
    glm = PUBLISHED[2]
    glm.write(tmp_path)
    family = tokenizer_family(glm.model_type)
    assert PREFIX_CAVEAT in check_tokenizer(tmp_path, glm.vocab_size, family)
    with pytest.raises(UnsupportedModelError, match="at most one token before a text"):
        check_tokenizer(tmp_path, glm.vocab_size, replace(family, prefix=("[gMASK]", "<eop>")))


def test_a_token_that_the_family_needs_is_missing(tmp_path: Path) -> None:
    glm = PUBLISHED[0]
    description = json.loads((glm.write(tmp_path) / "tokenizer.json").read_text())
    for token in description["added_tokens"]:
        token["content"] = token["content"].replace("[gMASK]", "[MASK2]")
    (tmp_path / "tokenizer.json").write_text(json.dumps(description))
    with pytest.raises(CheckpointError, match=r"no token '\[gMASK\]' .* takes as bos for glm4"):
        keys_of(glm, tmp_path)


def test_overlapping_tokens_of_minimax_are_told(tmp_path: Path) -> None:
    """transformers and llama.cpp choose another one; in other families that is refused."""
    published = next(one for one in PUBLISHED if one.model_type == "minimax_m2")
    published.write(tmp_path)
    size, family = published.vocab_size, tokenizer_family(published.model_type)
    text = "a]~b]!d~[b"
    with llama_cpp_tokenizer(tmp_path, size, family) as llama:
        assert (
            llama.encode(text)
            != Library.from_file(str(tmp_path / "tokenizer.json")).encode(text).ids
        )
    said = "added tokens such as ']~b]' and .* can overlap in a text"
    assert any(re.match(said, caveat) for caveat in check_tokenizer(tmp_path, size, family))
    with pytest.raises(UnsupportedModelError, match=r"can overlap in a text.*rename one of them"):
        check_tokenizer(tmp_path, size, replace(family, may_overlap=False))


@pytest.mark.parametrize("name", ["deepseek_v3", "deepseek_v2"])
def test_a_bos_that_only_tokenizer_config_asks_for_is_said(name: str, tmp_path: Path) -> None:
    """transformers 5 and llama.cpp put none, and the flag that the user is told of puts it."""
    (published,) = (one for one in PUBLISHED if one.name == name)
    published.write(tmp_path)
    size, family = published.vocab_size, tokenizer_family(published.model_type)
    assert NO_BOS_CAVEAT in check_tokenizer(tmp_path, size, family)
    bos = published.ids["bos_token_id"]
    loaded = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    assert loaded.encode("a b")[0] != bos
    with llama_cpp_tokenizer(tmp_path, size, family) as llama:
        assert llama.encode("a b", add_special=True)[0] != bos
    writer = GGUFWriter(tmp_path / "asked.gguf", "qwen3moe")
    add_tokenizer(writer, tmp_path, size, family)
    key = "tokenizer.ggml.add_bos_token"
    assert f"--override-kv {key}=bool:true" in NO_BOS_CAVEAT
    assert not writer.kv_data[0].pop(key).value
    writer.add_add_bos_token(True)
    with loaded_by_llama_cpp(writer, tmp_path / "asked.gguf") as llama:
        assert llama.encode("a b", add_special=True)[0] == bos
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({**published.config, "add_bos_token": False})
    )
    assert NO_BOS_CAVEAT not in check_tokenizer(tmp_path, size, family)
