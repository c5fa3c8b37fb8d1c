"""`--tensor-type PATTERN=TYPE`: types for some tensors, before the rules of a recipe.

PATTERN is a glob on GGUF tensor names, as in a recipe. A plain word without `*`, `?`, `[` or a dot
finds every tensor with it in its name, as llama-quantize's option of this name does: `attn_v` is
`*attn_v*`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from reap2gguf.errors import RecipeError
from reap2gguf.messages import shown
from reap2gguf.quantizing.recipe import Rule, check_glob, tensor_type_named

_MOST_OVERRIDES = 200
_WORD = re.compile(r"[A-Za-z0-9_-]+")


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
    match = f"*{pattern.lower()}*" if _WORD.fullmatch(pattern) else pattern
    check_glob(match, "--tensor-type: pattern")
    return Rule(match, tensor_type_named(name, f"--tensor-type {pattern}: type"), override=True)
