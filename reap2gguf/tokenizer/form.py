"""The parts of a `tokenizer.json`, compared with the forms that llama.cpp reproduces.

Everything is compared: a part, a step or a flag that this module does not know is refused by name.
What is accepted here makes the same token ids in llama.cpp, or has no influence on them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reap2gguf.errors import CheckpointError, UnsupportedModelError
from reap2gguf.messages import shown
from reap2gguf.tokenizer.pre_tokenizers import NO_NORMALIZER, PRE_TOKENIZERS

if TYPE_CHECKING:
    from reap2gguf.models.tokenizer_families import PreTokenizers

_ANY_FLAG = (True, False)
# step or part -> its settings and the values that each may have; a missing setting is None
_SPLIT = {"behavior": ("Isolated",), "invert": (False,)}
_BYTE_LEVEL = {"add_prefix_space": (False,), "use_regex": (False,), "trim_offsets": _ANY_FLAG}
# after splitting, and for texts made of ids, nothing of these changes an id
_BYTE_LEVEL_AFTER = dict.fromkeys(_BYTE_LEVEL, (*_ANY_FLAG, None))
_MODEL = {
    "dropout": (None, 0),
    "unk_token": (None,),
    "continuing_subword_prefix": (None, ""),
    "end_of_word_suffix": (None, ""),
    "fuse_unk": (*_ANY_FLAG, None),  # without unk_token it does nothing
    "byte_fallback": (False, None),
}
_NORMALIZERS = (*NO_NORMALIZER, {"type": "NFC"})
_HELP = (
    "llama.cpp would tokenize differently from the model, so nothing is written; use the "
    "tokenizer.json of the model that this one was made from"
)


def check_form(tokenizer: dict[str, Any], where: Path, pre_tokenizers: PreTokenizers) -> str:
    """llama.cpp's name of the pre-tokenizer of a `tokenizer.json` that llama.cpp reproduces.

    `where` is the path of the file, for messages. Raises UnsupportedModelError that names the first
    part of another form, and CheckpointError if the file has no vocabulary.
    """
    check_model_type(tokenizer, where)
    name = recognise_pre_tokenizer(tokenizer, where, pre_tokenizers)
    if name not in PRE_TOKENIZERS:
        raise UnsupportedModelError(
            f"{where}: how llama.cpp's pre-tokenizer {name} splits text is not known here, "
            f"expected one of {', '.join(PRE_TOKENIZERS)}; add it to tokenizer/pre_tokenizers.py"
        )
    _check_steps(tokenizer["pre_tokenizer"], where)
    if tokenizer.get("normalizer") not in _NORMALIZERS:
        raise _unknown(where, "normalizer", tokenizer["normalizer"], "none or NFC")
    model = {key: value for key, value in tokenizer["model"].items() if key not in _UNREAD_HERE}
    ignores = (True,) if PRE_TOKENIZERS[name].ignore_merges else (False, None)
    _check_settings(model, _MODEL | {"ignore_merges": ignores}, "BPE", where, "model")
    _check_settings(tokenizer.get("decoder"), _BYTE_LEVEL_AFTER, "ByteLevel", where, "decoder")
    added_by_post_processor(tokenizer, where)
    return name


_UNREAD_HERE = ("vocab", "merges")  # vocabulary.py checks them


def check_model_type(tokenizer: dict[str, Any], where: Path) -> None:
    """Raise UnsupportedModelError if the model is not BPE, CheckpointError if it has no tokens."""
    model = tokenizer.get("model")
    model_type = model.get("type") if isinstance(model, dict) else None
    if not isinstance(model, dict) or model_type != "BPE":
        raise UnsupportedModelError(
            f"{where}: tokenizer model {shown(model_type)}, expected byte-level BPE"
        )
    if not isinstance(model.get("vocab"), dict) or not model["vocab"]:
        raise CheckpointError(f"{where}: no vocabulary")


def recognise_pre_tokenizer(
    tokenizer: dict[str, Any], where: Path, pre_tokenizers: PreTokenizers
) -> str:
    """llama.cpp's name of a `tokenizer.json`'s pre-tokenizer, by its split patterns."""
    patterns = tuple(
        str(step["pattern"].get("Regex", ""))
        for step in _steps(tokenizer.get("pre_tokenizer"))
        if step.get("type") == "Split" and isinstance(step.get("pattern"), dict)
    )
    if patterns in pre_tokenizers:
        return pre_tokenizers[patterns]
    found = shown(list(patterns)) if patterns else "no pattern"
    raise UnsupportedModelError(
        f"{where}: splits text by {found}, which is none of the patterns known here "
        f"({', '.join(pre_tokenizers.values())}); {_HELP}"
    )


def added_by_post_processor(tokenizer: dict[str, Any], where: Path) -> list[int]:
    """The ids that the post-processor puts before each text: none, or one.

    Raises UnsupportedModelError for a post-processor that does anything else.
    """
    part = tokenizer.get("post_processor")
    first: list[int] = []
    for index, step in enumerate(_steps(part, "processors")):
        name = f"post_processor.processors[{index}]" if _is_sequence(part) else "post_processor"
        if step.get("type") == "ByteLevel":
            _check_settings(step, _BYTE_LEVEL_AFTER, "ByteLevel", where, name)
        else:
            first += _template_prefix(step, where, name)
    if len(first) > 1:
        raise _unknown(where, "post_processor", part, "at most one token before a text")
    return first


def _template_prefix(step: dict[str, Any], where: Path, name: str) -> list[int]:
    """The ids before the text in a TemplateProcessing step."""
    template = step.get("single") if step.get("type") == "TemplateProcessing" else None
    if not isinstance(template, list) or not template:
        expected = "ByteLevel, or a template of at most one special token and the text"
        raise _unknown(where, name, step, expected)
    *before, text = template
    if not isinstance(text, dict) or _inner(text, "Sequence").get("id") != "A":
        raise _unknown(where, f"{name}.single", template, "a template that ends with the text")
    ids: list[int] = []
    for item in before:
        token = _inner(item, "SpecialToken").get("id")
        known = _inner(_inner(step, "special_tokens"), token).get("ids")
        if not (isinstance(known, list) and len(known) == 1 and type(known[0]) is int):
            raise _unknown(where, f"{name}.single", template, "special tokens of one id each")
        ids += known
    return ids


def _inner(part: Any, key: Any) -> dict[str, Any]:
    """The object that an object has under `key`, or an empty one."""
    inner = part.get(key) if isinstance(part, dict) and isinstance(key, str) else None
    return inner if isinstance(inner, dict) else {}


def _check_steps(part: Any, where: Path) -> None:
    """Compare a pre-tokenizer with: some Splits, then ByteLevel."""
    *splits, last = _steps(part)
    for index, step in enumerate(splits):
        name = f"pre_tokenizer.pretokenizers[{index}]"
        settings = {key: value for key, value in step.items() if key != "pattern"}
        _check_settings(settings, _SPLIT, "Split", where, name)
    name = f"pre_tokenizer.pretokenizers[{len(splits)}]" if splits else "pre_tokenizer"
    _check_settings(last, _BYTE_LEVEL, "ByteLevel", where, name)


def _check_settings(
    part: Any, allowed: Mapping[str, tuple[Any, ...]], kind: str, where: Path, name: str
) -> None:
    """Refuse a part of another type, with a setting that is not known, or with another value."""
    if not isinstance(part, dict) or part.get("type") != kind:
        found = part.get("type") if isinstance(part, dict) else part
        raise _unknown(where, name, found, kind)
    for key in sorted({*part, *allowed} - {"type"}):
        values, value = allowed.get(key), part.get(key)
        if values is None:
            raise _unknown(where, f"{name}.{key}", value, "no such setting")
        if not any(
            value == good and isinstance(value, bool) == isinstance(good, bool) for good in values
        ):
            raise _unknown(where, f"{name}.{key}", value, " or ".join(map(shown, values)))


def _steps(part: Any, key: str = "pretokenizers") -> list[dict[str, Any]]:
    """The steps of a part: those of a Sequence, or itself."""
    steps = part.get(key) if _is_sequence(part) else [] if part is None else [part]
    return [step if isinstance(step, dict) else {"type": step} for step in steps or []]


def _is_sequence(part: Any) -> bool:
    return (
        isinstance(part, dict)
        and part.get("type") == "Sequence"
        and any(isinstance(value, list) for value in part.values())
    )


def _unknown(where: Path, name: str, found: Any, expected: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"{where}: {name} is {shown(found)}, expected {expected}; {_HELP}")
