"""A checkpoint's tokenizer files, checked before another library reads them.

`tokenizer.json` holds the vocabulary, the merges and the added tokens; gguf-py and transformers
read other files beside it, chat templates among them, and check little of what they read.
"""

from __future__ import annotations

from pathlib import Path
from string import ascii_letters, digits
from typing import Any

from reap2gguf.checkpoint.companions import TEMPLATES_FOLDER, Purpose, companions
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
    """Raise CheckpointError for a template that is too large, cannot be read, or cannot be copied.

    A bundle has no folders, so it cannot hold `additional_chat_templates`.
    """
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
    if others := sorted((folder / TEMPLATES_FOLDER).glob("*.jinja")):
        raise CheckpointError(
            f"{others[0]}: a chat template in a folder of its own, expected all templates beside "
            "the weights; load the tokenizer with transformers, save it with "
            f"save_pretrained(..., save_jinja_files=False), and remove {TEMPLATES_FOLDER} and "
            "chat_template.jinja"
        )


def check_template_texts(folder: Path) -> None:
    """Raise CheckpointError for chat templates that gguf-py would fail on, or read in part."""
    for path in companions(folder, Purpose.GGUF):
        if path.is_file():
            _check_named_templates(path)
    check_template_files(folder)


def loaded_templates(folder: Path) -> str | dict[str, str] | None:
    """The chat template that transformers' AutoTokenizer loads from a folder, or named ones.

    `chat_template.jinja` comes before the `chat_template` of tokenizer_config.json, and is then
    the only one. Raises CheckpointError if a file is broken, or if another file that programs read
    holds another template, and for named templates that a GGUF header or a bundle cannot hold.
    """
    check_template_texts(folder)
    jinja, config = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    found: Any = None
    if jinja.is_file():
        found = _text_of(jinja)
    elif config.is_file():
        found = read_json(config).get("chat_template")
    where = jinja if jinja.is_file() else config
    if isinstance(found, list):
        found = {named["name"]: named["template"] for named in found}
        _check_names(found, config)
    if "" in (found.values() if isinstance(found, dict) else [found]):
        raise CheckpointError(
            f"{where}: the chat template is empty, expected text: transformers writes nothing by "
            "it, and llama.cpp takes a template of its own; remove it, or use the model's own"
        )
    _check_legacy(folder / "chat_template.json", found)
    return found or None


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(
            f"{path}: not UTF-8 text ({error.reason} at {error.start})"
        ) from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from error


def _check_names(templates: dict[str, str], path: Path) -> None:
    """Refuse names that are one key in a GGUF header, or none: it has letters and digits only."""
    keys: dict[str, str] = {}
    for name in templates:
        key = "".join(c if c in ascii_letters + digits else "_" for c in name)
        if not key or keys.setdefault(key, name) != name:
            raise CheckpointError(
                f"{path}: chat_template has the name {shown(name)}, expected names that differ in "
                "letters and digits; rename it"
            )


def _check_legacy(path: Path, loaded: str | dict[str, str] | None) -> None:
    """Refuse a `chat_template.json`, which transformers' processors read, that says otherwise."""
    text = read_json(path).get("chat_template") if path.is_file() else None
    default = loaded.get("default") if isinstance(loaded, dict) else loaded
    if text is not None and text != default:
        what = "no template" if default is None else "another one"
        raise CheckpointError(
            f"{path}: holds a chat template, but transformers' tokenizers do not read this file "
            f"and load {what}, expected the same; remove it, or put its text into "
            "chat_template.jinja"
        )


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
