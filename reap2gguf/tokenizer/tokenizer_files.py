"""A checkpoint's tokenizer files, checked before another library reads them.

`tokenizer.json` holds the vocabulary, the merges and the added tokens; gguf-py and transformers
read other files beside it, chat templates among them, and check little of what they read.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from reap2gguf.checkpoint.companions import Purpose, companions
from reap2gguf.checkpoint.config import MAX_TOKENIZER_BYTES, read_json
from reap2gguf.errors import CheckpointError
from reap2gguf.messages import shown

MAX_TEMPLATE_BYTES = 2**20  # the longest templates of real models have about 20 kB


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


def check_template_texts(folder: Path) -> None:
    """Raise CheckpointError for chat templates that gguf-py would fail on, or read in part."""
    for path in companions(folder, Purpose.GGUF):
        if path.is_file():
            _check_named_templates(path)
    check_template_files(folder)


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
