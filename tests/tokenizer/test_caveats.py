from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFWriter
from tokenizers import Tokenizer as Library
from transformers import AutoTokenizer

from reap2gguf.models.tokenizer_families import QWEN
from reap2gguf.tokenizer.byte_symbols import byte_symbols
from reap2gguf.tokenizer.caveats import NFC_CAVEAT, ORDINARY_CAVEAT, tokenizer_caveats
from reap2gguf.tokenizer.check import check_tokenizer
from reap2gguf.tokenizer.gguf_keys import add_tokenizer
from reap2gguf.tokenizer.special_names import ENDS_BY_GROUP, ENDS_BY_NAME
from reap2gguf.tokenizer.tokenizer import Tokenizer
from reap2gguf.tokenizer.vocabulary import Vocabulary
from tests.tokenizer.mutations import Draft
from tests.tokenizer.small import (
    QWEN2,
    QWEN35,
    SMALL_SIZE,
    added,
    llama_cpp_tokenizer,
    loaded_by_llama_cpp,
    tokenizer,
    write,
)

MARKS = "a\u0301\u0302b हिन्दी"
PLAIN = Vocabulary([], [], [], [], normalizes=False)
CLASSES = (
    "Qwen2Tokenizer", "Qwen2TokenizerFast", "Qwen3_5Tokenizer", "TokenizersBackend",
    "PreTrainedTokenizerFast", "GPT2Tokenizer", "LlamaTokenizerFast", None,
)  # fmt: skip


def words(library: Any) -> list[str]:
    return [word for word, _ in library.pre_tokenizer.pre_tokenize_str(MARKS)]


@pytest.mark.parametrize("pattern", [QWEN2, QWEN35])
@pytest.mark.parametrize("model_type", ["qwen3_moe", "qwen3_5_moe", "qwen3_5_moe_text"])
@pytest.mark.parametrize("tokenizer_class", CLASSES)
def test_a_class_that_splits_in_its_own_way_is_named(
    tokenizer_class: str | None, model_type: str, pattern: str, tmp_path: Path
) -> None:
    draft = Draft.of_example()
    draft.steps[0]["pattern"]["Regex"] = pattern
    draft.config["tokenizer_class"] = tokenizer_class
    if tokenizer_class is None:
        del draft.config["tokenizer_class"]
    draft.write(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    loaded = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    library = Library.from_file(str(tmp_path / "tokenizer.json"))
    found = tokenizer_caveats(tmp_path, QWEN.pre_tokenizers[(pattern,)], PLAIN)
    assert bool(found) is (words(loaded.backend_tokenizer) != words(library))
    assert all(type(loaded).__name__ in caveat for caveat in found)


def test_the_name_of_a_class_is_not_text_for_a_card(tmp_path: Path) -> None:
    draft = Draft.of_example()
    draft.config["tokenizer_class"] = "[x](http://example.org)"
    draft.write(tmp_path)
    (caveat,) = tokenizer_caveats(tmp_path, "qwen2", PLAIN)
    assert "as another class, which splits text in a way that is not known here" in caveat


def test_text_that_is_not_in_normal_form_gets_other_ids(tmp_path: Path) -> None:
    draft = Draft.of_example()
    draft.write(tmp_path)
    assert check_tokenizer(tmp_path, 4096, QWEN) == (NFC_CAVEAT,)
    library = Library.from_file(str(tmp_path / "tokenizer.json"))
    with llama_cpp_tokenizer(tmp_path, 4096, QWEN) as llama:
        assert llama.encode("e\u0301") != library.encode("e\u0301").ids
        assert llama.encode("\u00e9") == library.encode("e\u0301").ids


def test_a_tokenizer_without_normalizer_has_no_caveat(tmp_path: Path) -> None:
    draft = Draft.of_example()
    draft.description["normalizer"] = None
    draft.write(tmp_path)
    assert check_tokenizer(tmp_path, 4096, QWEN) == ()


def test_an_ordinary_token_of_qwen_that_llama_cpp_takes_for_a_special_one(tmp_path: Path) -> None:
    """All of Qwen's vocabularies have it; transformers splits its text before it is merged."""
    draft = Draft.of_example()
    draft.model["vocab"]["</s>"] = 4093
    for token in draft.added:
        token["id"] += 1
    draft.write(tmp_path)
    assert check_tokenizer(tmp_path, 4097, QWEN) == (NFC_CAVEAT, ORDINARY_CAVEAT)
    library = Library.from_file(str(tmp_path / "tokenizer.json"))
    with llama_cpp_tokenizer(tmp_path, 4097, QWEN) as llama:
        assert llama.encode("a</s>") == [*library.encode("a").ids, 4093]
        assert len(library.encode("a</s>").ids) == 4
        assert llama.encode("a</s b>") == library.encode("a</s b>").ids
    draft.add("</s>")  # added as well: special for both
    draft.added[-1]["id"] = 4093
    draft.write(tmp_path)
    assert check_tokenizer(tmp_path, 4097, QWEN) == (NFC_CAVEAT,)


def test_calibration_follows_the_file_that_the_gguf_is_made_of(tmp_path: Path) -> None:
    """Where transformers splits by a class of its own, its ids are not those of llama.cpp."""
    draft = Draft.of_example()
    acute = "".join(byte_symbols()[byte] for byte in "\u0301".encode())
    for left, right in ((acute[0], acute[1]), ("q", acute)):
        draft.model["vocab"][left + right] = len(draft.model["vocab"])
        draft.model["merges"].append([left, right])
    for index, token in enumerate(draft.added):
        token["id"] = len(draft.model["vocab"]) + index
    draft.write(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "qwen3_5_moe", "eos_token_id": 4095}')
    (_, caveat) = check_tokenizer(tmp_path, 4100, QWEN)
    assert "loads the tokenizer as Qwen3_5Tokenizer, which splits text like qwen35" in caveat
    loaded = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    ids = Tokenizer(tmp_path).encode("q\u0301").tolist()
    with llama_cpp_tokenizer(tmp_path, 4100, QWEN) as llama:
        assert ids == llama.encode("q\u0301")
    assert ids != loaded("q\u0301")["input_ids"]


ENDS = (
    *ENDS_BY_NAME, *(text for group in ENDS_BY_GROUP for text in group), "<|im_start|>", "<x>",
    "<|fim_prefix|>", "<|start|>",
)  # fmt: skip


def ends_in_llama_cpp(writer: GGUFWriter, path: Path) -> set[int]:
    with loaded_by_llama_cpp(writer, path) as llama:
        return {i for i in range(llama.n_tokens) if llama.ends_at(i)}


@pytest.mark.parametrize(
    "texts",
    [
        *((text,) for text in sorted(ENDS)), ("<|end|>", "<|return|>", "<|call|>"),
        ("<|end|>", "<|flush|>", "<|calls|>"), ("<|end|>", "<|call|>"), ("<|end|>", "<|return|>"),
        ("<|im_start|>", "<x>", "<|im_end|>"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", ["generation_config.json", "config.json"])
def test_an_end_that_llama_cpp_does_not_know_is_named_with_a_flag_that_helps(
    name: str, texts: tuple[str, ...], tmp_path: Path
) -> None:
    ids = {text: SMALL_SIZE + 1 + i for i, text in enumerate(texts)}
    eos = added(SMALL_SIZE, "<e>", special=True)
    size = SMALL_SIZE + 1 + len(ids)
    write(tmp_path, tokenizer(added=[eos, *(added(i, t, special=True) for t, i in ids.items())]))
    (tmp_path / "tokenizer_config.json").write_text(
        '{"eos_token": "<e>", "tokenizer_class": "PreTrainedTokenizerFast"}'
    )
    (tmp_path / "config.json").write_text("{}")
    wanted = [SMALL_SIZE, *ids.values(), 10**6, -1, None, True]
    (tmp_path / name).write_text(json.dumps({"eos_token_id": wanted}))
    found = check_tokenizer(tmp_path, size, QWEN)
    caveat = next((text for text in found if "eos_token_id" in text), "")
    writer = GGUFWriter(tmp_path / "v.gguf", "qwen3moe")
    add_tokenizer(writer, tmp_path, size, QWEN)
    missed = set(ids.values()) - ends_in_llama_cpp(writer, tmp_path / "v.gguf")
    assert {i for i in ids.values() if f"(id {i})" in caveat} == missed
    assert bool(caveat) is bool(missed)
    if missed:
        assert f"by the eos_token_id of {name}, transformers" in caveat
        again = GGUFWriter(tmp_path / "v.gguf", "qwen3moe")
        add_tokenizer(again, tmp_path, size, QWEN)
        without = {i for text, i in ids.items() if text == "<|end|>"}  # nothing helps there
        assert ("--override-kv" in caveat) is bool(missed - without)
        for change in re.findall(r"[a-z._]+=int:\d+", caveat):
            key, _, index = change.partition("=int:")
            again.add_uint32(key, int(index))
        assert missed - without <= ends_in_llama_cpp(again, tmp_path / "v.gguf")


def test_many_ends_are_counted(tmp_path: Path) -> None:
    draft = Draft.of_example()
    draft.write(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [*range(9)]}))
    (_, caveat) = check_tokenizer(tmp_path, 4096, QWEN)
    assert "(id 3) and 5 more, and llama.cpp does not" in caveat
    assert caveat.endswith("=int:1 to end it at 0 and 1; no flag does so for the others")
