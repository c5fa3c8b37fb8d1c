"""The files beside `tokenizer.json` that change token ids, compared with it.

The GGUF header and the calibration follow `tokenizer.json`. transformers reads three more files,
and adds tokens that it finds only there; each must say the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reap2gguf.checkpoint.config import read_optional
from reap2gguf.errors import CheckpointError, UnsupportedModelError
from reap2gguf.messages import shown

if TYPE_CHECKING:
    from reap2gguf.tokenizer.added_tokens import AddedToken

_CONFIG, _MAP, _ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
_FLAGS = ("lstrip", "rstrip", "single_word")
_LISTS = ("additional_special_tokens", "extra_special_tokens")
# settings of tokenizer_config.json -> the values with which ids are those of tokenizer.json
_SETTINGS: dict[str, tuple[Any, ...]] = {
    "split_special_tokens": (None, False),
    "fast_tokenizer_files": (None, [], ["tokenizer.json"]),  # another file would be read
}
_HELP = (
    "transformers would tokenize differently from the GGUF file; load the tokenizer with "
    "transformers, correct it and save it with save_pretrained()"
)


def check_files_beside(folder: Path, added: list[AddedToken], space_prefix: bool = False) -> None:
    """Refuse files beside `tokenizer.json` that change ids, or name tokens that it does not have.

    `added` are the added tokens of `tokenizer.json`, `space_prefix` says whether it puts a space
    before a text. Raises CheckpointError for files that
    disagree, and UnsupportedModelError for a setting that llama.cpp does not support.
    """
    config, special, ids = (read_optional(folder, name) for name in (_CONFIG, _MAP, _ADDED))
    for key, allowed in (_SETTINGS | {"add_prefix_space": (None, space_prefix)}).items():
        if config.get(key) not in allowed:
            raise UnsupportedModelError(
                f"{folder / _CONFIG}: {key} is {shown(config[key])}, expected "
                f"{shown(allowed[1])}; {_HELP}"
            )
    by_text = {token.text: token for token in added}
    _check_decoder(config.get("added_tokens_decoder"), by_text, folder / _CONFIG)
    for text, index in ids.items():
        if text not in by_text or by_text[text].index != index:
            raise _disagree(folder / _ADDED, f"token {shown(text)} has the id {shown(index)}")
    for path, values in ((folder / _CONFIG, config), (folder / _MAP, special)):
        for key, text in _named_tokens(values):
            if text not in by_text:
                raise _disagree(path, f"{key} is {shown(text)}")
    if "added_tokens_decoder" not in config:  # transformers prefers special_tokens_map.json then
        _check_same_names(config, special, folder)


def _check_decoder(decoder: Any, by_text: dict[str, AddedToken], path: Path) -> None:
    """Compare `added_tokens_decoder`, which maps ids to tokens, with the added tokens."""
    if decoder is None:
        return
    if not isinstance(decoder, dict):
        raise CheckpointError(
            f"{path}: added_tokens_decoder is {shown(decoder)}, expected tokens by id; {_HELP}"
        )
    for index, entry in decoder.items():
        name = f"added_tokens_decoder has {shown(entry)} as {shown(index)}"
        text = entry.get("content") if isinstance(entry, dict) else None
        token = by_text.get(text) if isinstance(text, str) else None
        if token is None or str(token.index) != index:
            raise _disagree(path, name)
        flags = {"special": token.special, "normalized": token.normalized}
        flags |= dict.fromkeys(_FLAGS, False)
        if any(entry.get(flag, value) is not value for flag, value in flags.items()):
            raise _disagree(path, name)
    if missing := next((t for t in by_text.values() if str(t.index) not in decoder), None):
        raise _disagree(path, f"added_tokens_decoder does not have {shown(missing.text)}")


def _named_tokens(values: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The special tokens that a file names: the key and the text of each."""
    for key, value in values.items():
        named: list[Any] = []
        if key in _LISTS:
            named = list(value.values()) if isinstance(value, dict) else value or []
        elif key.endswith("_token"):
            named = [value]
        for token in named if isinstance(named, list) else [named]:
            text = _text(token)
            if text:
                yield key, text


def _text(token: Any) -> str | None:
    """The text of a token that is written as text, or as an object with `content`."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None


def _check_same_names(config: dict[str, Any], special: dict[str, Any], folder: Path) -> None:
    """Compare the tokens that both files name, such as `eos_token`."""
    for key in config.keys() & special.keys():
        one, other = _text(config[key]), _text(special[key])
        if one is not None and other is not None and one != other:
            raise CheckpointError(
                f"{folder / _MAP}: {key} is {shown(other)}, but {_CONFIG} has {shown(one)}; delete "
                f"{_MAP}, which transformers 5 no longer writes, or correct it"
            )


def _disagree(path: Path, found: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: {found}, expected what the added_tokens of tokenizer.json have; {_HELP}"
    )
