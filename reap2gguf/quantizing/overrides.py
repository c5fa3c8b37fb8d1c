"""`--tensor-type PATTERN=TYPE` and `--set ROLE=TYPE`: types that come before a recipe's rules.

PATTERN is a glob on GGUF tensor names, as in a recipe. A plain word without `*`, `?`, `[` or a dot
finds every tensor with it in its name, as llama-quantize's option of this name does: `attn_v` is
`*attn_v*`, and `output` is `*output*`. Other words for roles, such as `experts.down`, are roles.

`--set` takes roles, `output` too, and globs, but no parts of names (`role_settings.py`). Both take
layers after an @: `experts.down@0-3=Q6_K`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from reap2gguf.errors import RecipeError
from reap2gguf.messages import shown
from reap2gguf.models.roles import ROLE_WORDS
from reap2gguf.quantizing.recipe import Rule
from reap2gguf.quantizing.selector import check_glob, check_layers
from reap2gguf.quantizing.type_names import tensor_type_named

_MOST_OVERRIDES = 200
_WORD = re.compile(r"[A-Za-z0-9_-]+")
_ROLES = ROLE_WORDS.keys() - {"output"}  # llama-quantize finds attn_output by this word as well


def read_overrides(texts: Sequence[str]) -> tuple[Rule, ...]:
    """Rules from texts PATTERN=TYPE, in this order. Raises RecipeError for one that is none."""
    if len(texts) > _MOST_OVERRIDES:
        raise RecipeError(
            f"--tensor-type: {len(texts):,} patterns, expected at most {_MOST_OVERRIDES}; write a "
            "recipe file"
        )
    return tuple(map(_override, texts))


def _override(text: str) -> Rule:
    pattern, equals, name = text.rpartition("=")
    if not equals or not pattern or not name:
        raise RecipeError(
            f"--tensor-type {shown(text)} is not PATTERN=TYPE, such as attn_v=Q5_K or "
            "blk.*.attn_v.weight=Q5_K"
        )
    pattern, at, layers = pattern.partition("@")
    role = pattern.lower() if pattern.lower() in _ROLES else ""
    match = role or (f"*{pattern.lower()}*" if _WORD.fullmatch(pattern) else pattern)
    check_glob(match, "--tensor-type: pattern")
    if at:
        check_layers(layers, f"--tensor-type {shown(text)}: layers")
    tensor_type = tensor_type_named(name, f"--tensor-type {pattern}: type")
    return Rule(match, tensor_type, override=True, layers=layers)
