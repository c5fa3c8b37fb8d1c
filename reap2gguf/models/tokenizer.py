"""The tokenizer keys of a GGUF header, from `tokenizer.json` alone.

llama.cpp re-implements each pre-tokenizer under a name. The name is recognised by the tokenizer's
own split pattern, so a fine-tune under any model name gets the right one; llama.cpp's converter
hashes the tokens of a sample text instead, which fails for every new vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, SpecialVocab, TokenType

from reap2gguf.checkpoint.checkpoint import read_tokenizer_json
from reap2gguf.checkpoint.config import read_json
from reap2gguf.checkpoint.template_files import check_template_files
from reap2gguf.errors import CheckpointError, UnsupportedModelError

# split pattern -> llama.cpp's name; two families differ only in how they treat marks (\p{M})
_QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN35_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PRE_TOKENIZERS = {_QWEN2_PATTERN: "qwen2", _QWEN35_PATTERN: "qwen35"}
_MAX_TOKENS = 2**24


def add_tokenizer(writer: GGUFWriter, folder: Path, vocab_size: int) -> None:
    """Add the tokenizer of the checkpoint in `folder`: tokens, types, merges, template.

    Raises CheckpointError if it is broken and UnsupportedModelError if llama.cpp has no
    pre-tokenizer of its pattern.
    """
    tokenizer = check_tokenizer(folder, vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(recognise_pre_tokenizer(tokenizer, folder))
    tokens, types = _tokens(tokenizer, vocab_size, folder)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    try:
        # gguf-py knows where merges, special ids and chat templates hide
        SpecialVocab(folder, load_merges=True, n_vocab=vocab_size).add_to_gguf(writer, quiet=True)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{folder}: its tokenizer files are broken ({error})") from error


def tokenizer_keys(folder: Path, vocab_size: int) -> dict[str, Any]:
    """The tokenizer keys that a GGUF file of the checkpoint in `folder` must have."""
    writer = GGUFWriter(None, "none")
    add_tokenizer(writer, folder, vocab_size)
    return {
        key: value.value for key, value in writer.kv_data[0].items() if key.startswith("tokenizer.")
    }


def check_tokenizer(folder: Path, vocab_size: int) -> dict[str, Any]:
    """The checkpoint's `tokenizer.json`, refused here if it could not be written later."""
    tokenizer = read_tokenizer_json(folder)
    _check(tokenizer, folder)
    recognise_pre_tokenizer(tokenizer, folder)
    _tokens(tokenizer, vocab_size, folder)
    return tokenizer


def _check(tokenizer: dict[str, Any], folder: Path) -> None:
    """Refuse files that gguf-py's reader would stumble over or read only in part."""
    where = folder / "tokenizer.json"
    model = tokenizer.get("model")
    kind = model.get("type") if isinstance(model, dict) else None
    if not isinstance(model, dict) or kind != "BPE":
        raise UnsupportedModelError(f"{where}: tokenizer model {kind!r}, expected byte-level BPE")
    if not isinstance(model.get("vocab"), dict) or not model["vocab"]:
        raise CheckpointError(f"{where}: no vocabulary")
    merges = model.get("merges")
    if not isinstance(merges, list) or not all(_is_merge(merge) for merge in merges):
        raise CheckpointError(f"{where}: merges are not a list of pairs of tokens")
    added = tokenizer.get("added_tokens") or []
    if not isinstance(added, list) or not all(
        isinstance(token, dict) and isinstance(token.get("content"), str) and "id" in token
        for token in added
    ):
        raise CheckpointError(f"{where}: added_tokens are not a list of tokens with content and id")
    for name in ("tokenizer_config.json", "chat_template.json"):
        if (folder / name).is_file():
            read_json(folder / name)
    check_template_files(folder)


def _is_merge(merge: Any) -> bool:
    """`"a b"` or `["a", "b"]`."""
    parts = merge.split(" ") if isinstance(merge, str) else merge
    good = isinstance(parts, list) and len(parts) == 2
    return good and all(isinstance(part, str) for part in parts)


def recognise_pre_tokenizer(tokenizer: dict[str, Any], folder: Path) -> str:
    """llama.cpp's name of a `tokenizer.json`'s pre-tokenizer, by its split pattern."""
    patterns = list(_split_patterns(tokenizer.get("pre_tokenizer")))
    for pattern in patterns:
        if pattern in PRE_TOKENIZERS:
            return PRE_TOKENIZERS[pattern]
    raise UnsupportedModelError(
        f"{folder / 'tokenizer.json'}: splits text by {patterns or 'no pattern'}, which is none of "
        f"the patterns known here ({', '.join(PRE_TOKENIZERS.values())}); llama.cpp would "
        "tokenize differently from the model, so nothing is written"
    )


def _split_patterns(node: Any) -> Iterator[str]:
    """Regular expressions of the Split steps in a pre-tokenizer description."""
    if not isinstance(node, dict):
        return
    pattern = node.get("pattern")
    if node.get("type") == "Split" and isinstance(pattern, dict):
        yield str(pattern.get("Regex", ""))
    for child in node.get("pretokenizers") or []:
        yield from _split_patterns(child)


def _tokens(
    tokenizer: dict[str, Any], vocab_size: int, folder: Path
) -> tuple[list[str], list[TokenType]]:
    """The text and the type of every id up to `vocab_size`; gaps become unused [PADi]."""
    if vocab_size > _MAX_TOKENS:
        raise UnsupportedModelError(f"{folder}: vocab_size {vocab_size:,} is over {_MAX_TOKENS:,}")
    tokens = [f"[PAD{i}]" for i in range(vocab_size)]
    types = [TokenType.UNUSED] * vocab_size
    vocab, added = tokenizer["model"]["vocab"], tokenizer.get("added_tokens") or []
    normal = [(text, index, TokenType.NORMAL) for text, index in vocab.items()]
    extra = [(token["content"], token["id"], _added_type(token)) for token in added]
    for text, index, kind in [*normal, *extra]:
        if not isinstance(index, int) or not 0 <= index < vocab_size:
            raise CheckpointError(
                f"{folder / 'tokenizer.json'}: token {text!r} has the id {index!r}, expected one "
                f"below the config's vocab_size {vocab_size}"
            )
        tokens[index], types[index] = text, kind
    return tokens, types


def _added_type(token: dict[str, Any]) -> TokenType:
    """Control tokens never reach the output text; llama.cpp also hides what looks like one."""
    text = token["content"]
    looks_special = text.startswith("<|") and text.endswith("|>")
    return TokenType.CONTROL if token.get("special") or looks_special else TokenType.USER_DEFINED
