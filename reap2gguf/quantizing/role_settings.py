"""`--set ROLE=TYPE` as patterns of `--tensor-type`."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from reap2gguf.errors import RecipeError
from reap2gguf.messages import shown
from reap2gguf.models.roles import ROLE_WORDS

_OUTPUT = "output.weight"


def roles_as_patterns(texts: Sequence[str]) -> tuple[str, ...]:
    """What `--tensor-type` would be given for the texts of `--set`.

    Raises RecipeError for one that is neither a role nor a glob.
    """
    return tuple(map(_as_pattern, texts))


def _as_pattern(text: str) -> str:
    selector, equals, name = text.rpartition("=")
    match, at, layers = selector.partition("@")
    word = match.lower()
    if not equals or not name or not match:
        raise RecipeError(
            f"--set {shown(text)} is not ROLE=TYPE, such as experts.down=Q6_K or "
            "experts.down@0-3=Q6_K"
        )
    if word in ROLE_WORDS:
        # `output` alone is a part of names to --tensor-type
        return f"{_OUTPUT if word == 'output' else word}{at}{layers}={name}"
    is_glob = any(sign in match for sign in "*?[") or match.endswith((".weight", ".bias"))
    if not is_glob:
        near = difflib.get_close_matches(word, ROLE_WORDS, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise RecipeError(
            f"--set: {shown(match)} is not a role{hint}, expected one of {', '.join(ROLE_WORDS)}, "
            "or a glob such as blk.*.attn_v.weight; --tensor-type takes parts of names"
        )
    return text
