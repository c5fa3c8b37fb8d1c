"""A checkpoint's tokenizer files, checked before another library reads them.

`tokenizer.json` holds the vocabulary, the merges and the added tokens; gguf-py and transformers
read other files beside it, chat templates among them, and check little of what they read.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from reap2gguf.checkpoint.companions import Purpose, companions
from reap2gguf.checkpoint.config import MAX_TOKENIZER_BYTES, read_json
from reap2gguf.errors import CheckpointError, UnsupportedModelError
from reap2gguf.messages import shown

MAX_TEMPLATE_BYTES = 2**20  # the longest templates of real models have about 20 kB
_BPE_EXTRAS = ("dropout", "continuing_subword_prefix", "end_of_word_suffix")


def read_tokenizer_json(folder: Path) -> dict[str, Any]:
    """The checkpoint's `tokenizer.json`; CheckpointError if it is missing or broken."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise CheckpointError(
            f"{folder}: no tokenizer.json; save the tokenizer with a fast tokenizer's "
            "save_pretrained() first"
        )
    return read_json(path, MAX_TOKENIZER_BYTES)


def special_tokens(folder: Path) -> dict[int, str]:
    """The special tokens of `tokenizer.json`, by id. Raises CheckpointError if it is broken."""
    added = read_tokenizer_json(folder).get("added_tokens")
    entries = added if isinstance(added, list) else []
    return {
        entry["id"]: entry["content"]
        for entry in entries
        if isinstance(entry, dict)
        and type(entry.get("id")) is int
        and entry.get("special") is True
        and isinstance(entry.get("content"), str)
    }


def check_template_files(folder: Path) -> None:
    """Raise CheckpointError if the file of a chat template is too large or cannot be read."""
    for path in companions(folder, Purpose.TEMPLATE):
        try:
            size = path.stat().st_size
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from error
        if size > MAX_TEMPLATE_BYTES:
            raise CheckpointError(
                f"{path}: {size:,} bytes, expected a chat template of at most "
                f"{MAX_TEMPLATE_BYTES:,}; remove it, or use the model's own"
            )


def check_tokenizer_files(tokenizer: dict[str, Any], folder: Path) -> None:
    """Refuse files that gguf-py would fail on, or read only in part.

    `tokenizer` is what `read_tokenizer_json` returns. Raises CheckpointError for broken files and
    UnsupportedModelError for what llama.cpp's byte-level BPE does not support.
    """
    _check_model(tokenizer, folder / "tokenizer.json")
    _check_added_tokens(tokenizer, folder / "tokenizer.json")
    for path in companions(folder, Purpose.GGUF):
        if path.is_file():
            _check_named_templates(path)
    check_template_files(folder)


def _check_model(tokenizer: dict[str, Any], where: Path) -> None:
    model = tokenizer.get("model")
    model_type = model.get("type") if isinstance(model, dict) else None
    if not isinstance(model, dict) or model_type != "BPE":
        raise UnsupportedModelError(
            f"{where}: tokenizer model {shown(model_type)}, expected byte-level BPE"
        )
    if not isinstance(model.get("vocab"), dict) or not model["vocab"]:
        raise CheckpointError(f"{where}: no vocabulary")
    normalizer = tokenizer.get("normalizer")
    if normalizer is not None and normalizer != {"type": "NFC"}:
        raise UnsupportedModelError(
            f"{where}: normalizer {shown(normalizer)}, expected none or NFC; llama.cpp supports no "
            "other"
        )
    for key in _BPE_EXTRAS:
        if model.get(key):
            raise UnsupportedModelError(
                f"{where}: {key} is {shown(model[key])}; llama.cpp's byte-level BPE does not "
                "support it"
            )
    merges = model.get("merges")
    if merges == []:
        raise CheckpointError(f"{where}: no merges; llama.cpp's byte-level BPE needs them")
    if not isinstance(merges, list) or not all(_is_merge(merge) for merge in merges):
        raise CheckpointError(f"{where}: merges are not a list of pairs of tokens")
    if len({type(merge) for merge in merges}) > 1:
        raise CheckpointError(f"{where}: merges have two forms, expected one")


def _check_added_tokens(tokenizer: dict[str, Any], where: Path) -> None:
    added = tokenizer.get("added_tokens") or []
    if not isinstance(added, list) or not all(
        isinstance(token, dict) and isinstance(token.get("content"), str) and "id" in token
        for token in added
    ):
        raise CheckpointError(f"{where}: added_tokens are not a list of tokens with content and id")


def _check_named_templates(path: Path) -> None:
    template = read_json(path).get("chat_template")
    if template is not None and not _is_template(template):
        raise CheckpointError(
            f"{path}: chat_template is {shown(template)}, expected text or a list of named texts"
        )


def _is_template(value: Any) -> bool:
    """Whether a value is one template, or a list of named ones."""
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
    """Whether a value is `"a b"` or `["a", "b"]`."""
    parts = merge.split(" ") if isinstance(merge, str) else merge
    good = isinstance(parts, list) and len(parts) == 2
    return good and all(isinstance(part, str) for part in parts)
