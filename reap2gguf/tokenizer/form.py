"""The parts of a `tokenizer.json`, compared with the forms that llama.cpp reproduces.

All but one: `post_processor.py` knows what is put before a text.

Everything is compared: a part, a step or a flag that this module does not know is refused by name.
What is accepted here makes the same token ids in llama.cpp, or has no influence on them.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from reap2gguf.errors import CheckpointError, UnsupportedModelError
from reap2gguf.messages import shown
from reap2gguf.tokenizer.advice import HELP
from reap2gguf.tokenizer.byte_symbols import byte_symbols
from reap2gguf.tokenizer.panics import panics_as
from reap2gguf.tokenizer.pre_tokenizers import NO_NORMALIZER, PRE_TOKENIZERS
from reap2gguf.tokenizer.settings import BYTE_LEVEL_AFTER, check_settings, unknown
from reap2gguf.tokenizer.steps import split_patterns, steps_of

if TYPE_CHECKING:
    from reap2gguf.models.tokenizer_families import PreTokenizers

_ANY_FLAG = (True, False)
# step or part -> its settings and the values that each may have; a missing setting is None
_SPLIT = {"behavior": ("Isolated",), "invert": (False,)}
_DIGITS = {"individual_digits": _ANY_FLAG}
_BYTE_LEVEL = {"add_prefix_space": (False,), "use_regex": (False,), "trim_offsets": _ANY_FLAG}
# alone, or after digits only: it splits by itself then
_SPLITTING_BYTE_LEVEL = _BYTE_LEVEL | {"use_regex": (True, None)}
_MODEL = {
    "dropout": (None, 0),
    "unk_token": (None,),
    "continuing_subword_prefix": (None, ""),
    "end_of_word_suffix": (None, ""),
    "fuse_unk": (*_ANY_FLAG, None),  # without unk_token it does nothing
    "byte_fallback": (False, None),
}
_NORMALIZERS = (*NO_NORMALIZER, {"type": "NFC"})


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
        raise unknown(where, "normalizer", tokenizer["normalizer"], "none or NFC")
    model = {key: value for key, value in tokenizer["model"].items() if key not in _UNREAD_HERE}
    check_settings(model, _MODEL | {"ignore_merges": (*_ANY_FLAG, None)}, "BPE", where, "model")
    check_settings(tokenizer.get("decoder"), BYTE_LEVEL_AFTER, "ByteLevel", where, "decoder")
    ignores = PRE_TOKENIZERS[name].ignore_merges
    if bool(model.get("ignore_merges")) is not ignores and PRE_TOKENIZERS[name].differs is None:
        _check_whole_words(tokenizer["model"], where, ignores)
    return name


_UNREAD_HERE = ("vocab", "merges")  # vocabulary.py checks them


def _check_whole_words(model: dict[str, Any], where: Path, ignores: bool) -> None:
    """Refuse a token that merging does not reach, where llama.cpp and the file disagree on words.

    Whether a word that is a token becomes it without merging makes no difference otherwise.
    """
    from tokenizers.models import BPE

    alphabet = frozenset(byte_symbols())
    with panics_as(CheckpointError, f"{where}: no usable tokenizer"):
        merges = [tuple(one.split(" ") if isinstance(one, str) else one) for one in model["merges"]]
        merging = BPE(vocab=model["vocab"], merges=merges)
        for text in model["vocab"]:
            if alphabet.issuperset(text) and len(merging.tokenize(text)) > 1:
                raise unknown(
                    where,
                    "model.ignore_merges",
                    model.get("ignore_merges"),
                    f"{ignores}, as the merges do not lead to the token {shown(text)}",
                )


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
    patterns = split_patterns(tokenizer.get("pre_tokenizer"))
    if patterns in pre_tokenizers:
        return pre_tokenizers[patterns]
    found = shown(list(patterns)) if patterns else "no pattern"
    raise UnsupportedModelError(
        f"{where}: splits text by {found}, which is none of the patterns known here "
        f"({', '.join(pre_tokenizers.values())}); {HELP}"
    )


def _check_steps(part: Any, where: Path) -> None:
    """Compare a pre-tokenizer with: some Splits and Digits, then ByteLevel."""
    *splits, last = steps_of(part)
    for index, step in enumerate(splits):
        name = f"pre_tokenizer.pretokenizers[{index}]"
        if step.get("type") == "Digits":
            check_settings(step, _DIGITS, "Digits", where, name)
            continue
        settings = {key: value for key, value in step.items() if key != "pattern"}
        check_settings(settings, _SPLIT, "Split", where, name)
    name = f"pre_tokenizer.pretokenizers[{len(splits)}]" if splits else "pre_tokenizer"
    has_split = any(step.get("type") == "Split" for step in splits)
    allowed = _BYTE_LEVEL if has_split else _SPLITTING_BYTE_LEVEL
    check_settings(last, allowed, "ByteLevel", where, name)
