"""The tokenizer keys of a GGUF header, from `tokenizer.json` and the files beside it.

llama.cpp implements each pre-tokenizer again, under a name. The name is found by the tokenizer's
own split patterns, so a fine-tune under any model name gets the right one. llama.cpp's converter
hashes the tokens of a sample text instead, which fails for every new vocabulary. The architecture
says which patterns a model may have, and what llama.cpp calls them (`MoeModel.pre_tokenizers`):
one pattern has several names.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, Keys, SpecialVocab, TokenType
from tokenizers import Tokenizer as Rust

from reap2gguf.errors import CheckpointError, UnsupportedModelError
from reap2gguf.messages import shown
from reap2gguf.models.description import MAX_VOCABULARY
from reap2gguf.tokenizer.panics import panics_as
from reap2gguf.tokenizer.tokenizer_files import check_tokenizer_files, read_tokenizer_json

PreTokenizers = Mapping[tuple[str, ...], str]  # split patterns -> llama.cpp's name of them


def add_tokenizer(
    writer: GGUFWriter, folder: Path, vocab_size: int, pre_tokenizers: PreTokenizers
) -> None:
    """Add the tokenizer of the checkpoint in `folder`: tokens, types, merges, template.

    Raises CheckpointError if it is broken and UnsupportedModelError if llama.cpp has no
    pre-tokenizer of its pattern.
    """
    tokenizer = read_tokenizer_json(folder)
    check_tokenizer_files(tokenizer, folder)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(recognise_pre_tokenizer(tokenizer, folder, pre_tokenizers))
    tokens, types = _tokens(tokenizer, vocab_size, folder)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    try:
        # gguf-py knows where merges, special ids and chat templates are stored
        special = SpecialVocab(folder, load_merges=True, n_vocab=vocab_size)
        if isinstance(special.chat_template, list):
            # gguf-py takes them in the order of the folder and of a set, which is no fixed order
            special.chat_template.sort(key=lambda template: template["name"])
        special.add_to_gguf(writer, quiet=True)
        if named := writer.kv_data[0].get(Keys.Tokenizer.CHAT_TEMPLATES):
            named.value.sort()
    except (ValueError, TypeError, LookupError, AttributeError, OSError) as error:
        raise CheckpointError(f"{folder}: its tokenizer files are broken ({error!r})") from error


def tokenizer_keys(folder: Path, vocab_size: int, pre_tokenizers: PreTokenizers) -> dict[str, Any]:
    """The tokenizer keys that a GGUF file of the checkpoint in `folder` must have."""
    writer = GGUFWriter(None, "none")
    add_tokenizer(writer, folder, vocab_size, pre_tokenizers)
    return {
        key: value.value for key, value in writer.kv_data[0].items() if key.startswith("tokenizer.")
    }


def check_tokenizer(folder: Path, vocab_size: int, pre_tokenizers: PreTokenizers) -> None:
    """Refuse a tokenizer that `add_tokenizer` would refuse later, or that does not load.

    Raises CheckpointError or UnsupportedModelError.
    """
    logger = logging.getLogger("gguf.vocab")
    before, logger.disabled = logger.disabled, True  # writing the file logs the same lines
    try:
        add_tokenizer(GGUFWriter(None, "none"), folder, vocab_size, pre_tokenizers)
    finally:
        logger.disabled = before
    path = folder / "tokenizer.json"
    with panics_as(CheckpointError, f"{path}: no usable tokenizer"):
        library = Rust.from_file(str(path))
        library.no_padding()  # a file may ask for padding to any length, which would be allocated
        library.no_truncation()
        library.encode("")


def recognise_pre_tokenizer(
    tokenizer: dict[str, Any], folder: Path, pre_tokenizers: PreTokenizers
) -> str:
    """llama.cpp's name of a `tokenizer.json`'s pre-tokenizer, by its split patterns."""
    patterns = tuple(_split_patterns(tokenizer.get("pre_tokenizer")))
    if patterns in pre_tokenizers:
        return pre_tokenizers[patterns]
    found = shown(list(patterns)) if patterns else "no pattern"
    raise UnsupportedModelError(
        f"{folder / 'tokenizer.json'}: splits text by {found}, which is none of the patterns known "
        f"here ({', '.join(pre_tokenizers.values())}); llama.cpp would tokenize differently from "
        "the model, so nothing is written"
    )


def _split_patterns(node: Any) -> Iterator[str]:
    """Regular expressions of the Split steps in a pre-tokenizer description."""
    if not isinstance(node, dict):
        return
    pattern = node.get("pattern")
    if node.get("type") == "Split" and isinstance(pattern, dict):
        yield str(pattern.get("Regex", ""))
    children = node.get("pretokenizers")
    for child in children if isinstance(children, list) else ():
        yield from _split_patterns(child)


def _tokens(
    tokenizer: dict[str, Any], vocab_size: int, folder: Path
) -> tuple[list[str], list[TokenType]]:
    """The text and the type of every id up to `vocab_size`; gaps become unused [PADi]."""
    if vocab_size > MAX_VOCABULARY:
        raise UnsupportedModelError(
            f"{folder}: vocab_size {vocab_size:,} is over {MAX_VOCABULARY:,}"
        )
    tokens = [f"[PAD{i}]" for i in range(vocab_size)]
    types = [TokenType.UNUSED] * vocab_size
    vocab, added = tokenizer["model"]["vocab"], tokenizer.get("added_tokens") or []
    normal = [(text, index, TokenType.NORMAL) for text, index in vocab.items()]
    extra = [(token["content"], token["id"], _added_type(token)) for token in added]
    for text, index, token_type in [*normal, *extra]:
        good = isinstance(index, int) and not isinstance(index, bool) and 0 <= index < vocab_size
        if not good:
            raise CheckpointError(
                f"{folder / 'tokenizer.json'}: token {shown(text)} has the id {shown(index)}, "
                f"expected one below the config's vocab_size {vocab_size}"
            )
        tokens[index], types[index] = text, token_type
    return tokens, types


def _added_type(token: dict[str, Any]) -> TokenType:
    """CONTROL for tokens that never reach the output text, as llama.cpp decides it."""
    text = token["content"]
    looks_special = text.startswith("<|") and text.endswith("|>")
    return TokenType.CONTROL if token.get("special") or looks_special else TokenType.USER_DEFINED
