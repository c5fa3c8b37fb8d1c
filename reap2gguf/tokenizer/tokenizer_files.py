"""A checkpoint's tokenizer files, checked before another library reads them.

`tokenizer.json` holds the vocabulary, the merges and the added tokens; gguf-py and transformers
read other files beside it, chat templates among them, and check little of what they read.
"""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from string import ascii_letters, digits
from typing import TYPE_CHECKING, Any

from reap2gguf.checkpoint.companions import TEMPLATES_FOLDER, Purpose, companions
from reap2gguf.checkpoint.config import MAX_TOKENIZER_BYTES, read_json, read_optional
from reap2gguf.errors import CheckpointError, UnsupportedModelError
from reap2gguf.files import TooLargeError, read_entry
from reap2gguf.messages import shown
from reap2gguf.tokenizer.panics import panics_as
from reap2gguf.tokenizer.ranks import tokenizer_of_ranks

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Library

RANKS_FILE = "tiktoken.model"
_RANKS_CLASS = "TikTokenTokenizer"  # of Moonshot AI's models
_N_RESERVED = 258  # ids after the ranks that this class gives to special tokens, at most

MAX_TEMPLATE_BYTES = 2**20  # the longest templates of real models have about 20 kB


def tokenizer_path(folder: Path) -> Path:
    """The file that holds the vocabulary: `tokenizer.json`, or ranks where only they are there."""
    path, ranks = folder / "tokenizer.json", folder / RANKS_FILE
    return ranks if ranks.is_file() and not path.is_file() else path


def read_tokenizer_json(folder: Path) -> dict[str, Any]:
    """The checkpoint's `tokenizer.json`, or what it would be for one that has ranks only.

    It is not to be changed. Raises CheckpointError if the files are missing or broken.
    """
    path = tokenizer_path(folder)
    if not path.is_file():
        raise CheckpointError(
            f"{folder}: no tokenizer.json; save the tokenizer with a fast tokenizer's "
            "save_pretrained() first"
        )
    if path.name != RANKS_FILE:
        return read_json(path, MAX_TOKENIZER_BYTES)
    settings, config = (read_optional(folder, f"{n}.json") for n in ("tokenizer_config", "config"))
    if settings.get("tokenizer_class") != _RANKS_CLASS:
        raise UnsupportedModelError(
            f"{folder / 'tokenizer_config.json'}: tokenizer_class is "
            f"{shown(settings.get('tokenizer_class'))} beside {RANKS_FILE}, expected "
            f"{_RANKS_CLASS}: how another class splits text is not known, as its code is not run; "
            "save the tokenizer as tokenizer.json"
        )
    try:
        data = read_entry(path, MAX_TOKENIZER_BYTES)
    except (OSError, TooLargeError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from error
    special = tuple(_named(settings.get("added_tokens_decoder"), folder).items())
    text = config.get("text_config")
    sizes = (part.get("vocab_size") for part in (config, text) if isinstance(part, dict))
    vocab_size = next((size for size in sizes if type(size) is int), None)
    return _of_ranks(data, special, vocab_size, path)


@lru_cache(maxsize=1)  # it takes seconds, and is asked for again and again
def _of_ranks(
    data: bytes, special: tuple[tuple[int, str], ...], vocab_size: int | None, path: Path
) -> dict[str, Any]:
    n_ranks = sum(1 for line in data.splitlines() if line)
    left = _N_RESERVED if vocab_size is None else vocab_size - n_ranks
    return tokenizer_of_ranks(data, dict(special), min(max(left, 0), _N_RESERVED), path)


def _named(decoder: Any, folder: Path) -> dict[int, str]:
    """The texts of `added_tokens_decoder` by id."""
    entries = decoder.items() if isinstance(decoder, dict) else ()
    named = {
        int(index): entry["content"]
        for index, entry in entries
        if index.isdecimal() and isinstance(entry, dict) and isinstance(entry.get("content"), str)
    }
    if len(named) != len(entries) or not named:
        raise CheckpointError(
            f"{folder / 'tokenizer_config.json'}: added_tokens_decoder is {shown(decoder)}, "
            f"expected texts by id, as {RANKS_FILE} does not have the special tokens"
        )
    return named


def load_library(folder: Path) -> Library:
    """The tokenizer in the tokenizers library, without padding and truncation.

    Raises CheckpointError if it cannot be loaded.
    """
    from tokenizers import Tokenizer

    path = tokenizer_path(folder)
    made = None if path.name != RANKS_FILE else json.dumps(read_tokenizer_json(folder))
    with panics_as(CheckpointError, f"{folder}: no usable tokenizer"):
        found = Tokenizer.from_file(str(path)) if made is None else Tokenizer.from_str(made)
        found.no_padding()  # a file may ask for padding to any length, which would be allocated
        found.no_truncation()
    return found


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
