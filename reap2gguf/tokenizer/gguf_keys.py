"""The tokenizer keys of a GGUF header, from `tokenizer.json` alone.

llama.cpp re-implements each pre-tokenizer under a name. The name is recognised by the tokenizer's
own split patterns, so a fine-tune under any model name gets the right one; llama.cpp's converter
hashes the tokens of a sample text instead, which fails for every new vocabulary. Which patterns a
model may have, and what llama.cpp calls them, is for its architecture to say
(`MoeModel.pre_tokenizers`): one pattern has several names.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, Keys, SpecialVocab, TokenType
from tokenizers import Tokenizer as Rust

from reap2gguf.checkpoint.config import read_json, read_tokenizer_json
from reap2gguf.errors import CheckpointError, UnsupportedModelError
from reap2gguf.messages import shown
from reap2gguf.models.description import MAX_VOCABULARY
from reap2gguf.tokenizer.panics import panics_as
from reap2gguf.tokenizer.template_files import check_template_files

PreTokenizers = Mapping[tuple[str, ...], str]  # split patterns -> llama.cpp's name of them
_BPE_EXTRAS = ("dropout", "continuing_subword_prefix", "end_of_word_suffix")
# read by gguf-py or transformers, which believe what they find
_COMPANIONS = (
    "tokenizer_config.json", "chat_template.json", "special_tokens_map.json", "added_tokens.json",
    "generation_config.json",
)  # fmt: skip


def add_tokenizer(
    writer: GGUFWriter, folder: Path, vocab_size: int, pre_tokenizers: PreTokenizers
) -> None:
    """Add the tokenizer of the checkpoint in `folder`: tokens, types, merges, template.

    Raises CheckpointError if it is broken and UnsupportedModelError if llama.cpp has no
    pre-tokenizer of its pattern.
    """
    tokenizer = read_tokenizer_json(folder)
    _check(tokenizer, folder)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(recognise_pre_tokenizer(tokenizer, folder, pre_tokenizers))
    tokens, types = _tokens(tokenizer, vocab_size, folder)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    try:
        # gguf-py knows where merges, special ids and chat templates hide
        special = SpecialVocab(folder, load_merges=True, n_vocab=vocab_size)
        if isinstance(special.chat_template, list):
            # as they come from the folder, and later from a set: in no order at all
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
    """Refuse a tokenizer that could not be written later, as `add_tokenizer` does, or not run."""
    said = logging.getLogger("gguf.vocab")
    before, said.disabled = said.disabled, True  # the file that is written brings the same words
    try:
        add_tokenizer(GGUFWriter(None, "none"), folder, vocab_size, pre_tokenizers)
    finally:
        said.disabled = before
    path = folder / "tokenizer.json"
    with panics_as(CheckpointError, f"{path}: no usable tokenizer"):
        library = Rust.from_file(str(path))
        library.no_padding()  # a file may ask for any length, which would be allocated
        library.no_truncation()
        library.encode("")


def _check(tokenizer: dict[str, Any], folder: Path) -> None:
    """Refuse files that gguf-py's reader would stumble over or read only in part."""
    where = folder / "tokenizer.json"
    model = tokenizer.get("model")
    kind = model.get("type") if isinstance(model, dict) else None
    if not isinstance(model, dict) or kind != "BPE":
        raise UnsupportedModelError(
            f"{where}: tokenizer model {shown(kind)}, expected byte-level BPE"
        )
    if not isinstance(model.get("vocab"), dict) or not model["vocab"]:
        raise CheckpointError(f"{where}: no vocabulary")
    normalizer = tokenizer.get("normalizer")
    if normalizer is not None and normalizer != {"type": "NFC"}:
        raise UnsupportedModelError(
            f"{where}: normalizer {shown(normalizer)}, expected none or NFC; llama.cpp has no other"
        )
    for key in _BPE_EXTRAS:
        if model.get(key):
            raise UnsupportedModelError(
                f"{where}: {key} is {shown(model[key])}, which llama.cpp's byte-level BPE has not"
            )
    merges = model.get("merges")
    if merges == []:
        raise CheckpointError(f"{where}: no merges, which llama.cpp's byte-level BPE needs")
    if not isinstance(merges, list) or not all(_is_merge(merge) for merge in merges):
        raise CheckpointError(f"{where}: merges are not a list of pairs of tokens")
    if len({type(merge) for merge in merges}) > 1:
        raise CheckpointError(f"{where}: merges are spelled in two ways, expected one")
    added = tokenizer.get("added_tokens") or []
    if not isinstance(added, list) or not all(
        isinstance(token, dict) and isinstance(token.get("content"), str) and "id" in token
        for token in added
    ):
        raise CheckpointError(f"{where}: added_tokens are not a list of tokens with content and id")
    for name in _COMPANIONS:
        if (folder / name).is_file():
            template = read_json(folder / name).get("chat_template")
            if template is not None and not _is_template(template):
                raise CheckpointError(
                    f"{folder / name}: chat_template is {shown(template)}, expected text or a list "
                    "of named texts"
                )
    check_template_files(folder)


def _is_template(value: Any) -> bool:
    """One template, or several by name."""
    return isinstance(value, str) or (
        isinstance(value, list)
        and all(
            isinstance(named, dict)
            and isinstance(named.get("name"), str)
            and isinstance(named.get("template"), str)
            for named in value
        )
    )


def _is_merge(merge: Any) -> bool:
    """`"a b"` or `["a", "b"]`."""
    parts = merge.split(" ") if isinstance(merge, str) else merge
    good = isinstance(parts, list) and len(parts) == 2
    return good and all(isinstance(part, str) for part in parts)


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
    for text, index, kind in [*normal, *extra]:
        good = isinstance(index, int) and not isinstance(index, bool) and 0 <= index < vocab_size
        if not good:
            raise CheckpointError(
                f"{folder / 'tokenizer.json'}: token {shown(text)} has the id {shown(index)}, "
                f"expected one "
                f"below the config's vocab_size {vocab_size}"
            )
        tokens[index], types[index] = text, kind
    return tokens, types


def _added_type(token: dict[str, Any]) -> TokenType:
    """Control tokens never reach the output text; llama.cpp also hides what looks like one."""
    text = token["content"]
    looks_special = text.startswith("<|") and text.endswith("|>")
    return TokenType.CONTROL if token.get("special") or looks_special else TokenType.USER_DEFINED
