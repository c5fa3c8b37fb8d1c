r"""Regular expressions of other programs as globs and layers, where these mean the same.

>>> selector_of(r"^blk\.([0-9]|1[0-5])\.ffn_up_exps\.weight$")
('blk.*.ffn_up_exps.weight', '0-15', False)
>>> selector_of("attn_v")
('attn_v', '', True)
"""

from __future__ import annotations

import re

from reap2gguf.quantizing.name_regex import NameRegex, RegexError
from reap2gguf.quantizing.selector import MAX_PARTS, layers_text

_NAME = r"(?:[a-z0-9_]|\\\.)+"  # of which only the dots are escaped
_WHOLE = re.compile(rf"\^({_NAME})\$")
_OF_LAYERS = re.compile(rf"\^blk\\\.(?P<layers>(?:[0-9()|\[\]?:+-]|\\d)+)\\\.(?P<rest>{_NAME})\$")
_MOST_LAYERS = 1000  # numbers that are tried; no model has half as many


def selector_of(pattern: str) -> tuple[str, str, bool]:
    """`match` or `regex`, `layers`, and whether the first is a regular expression."""
    if found := _WHOLE.fullmatch(pattern):
        return _unescaped(found[1]), "", False
    found = _OF_LAYERS.fullmatch(pattern)
    layers = None if found is None else _layers(found["layers"])
    if found is None or layers is None:
        return pattern, "", True
    return f"blk.*.{_unescaped(found['rest'])}", layers, False


def _unescaped(pattern: str) -> str:
    return pattern.replace("\\.", ".")


def _layers(pattern: str) -> str | None:
    """The layers whose numbers a pattern means; "" is all, None what cannot be said in layers."""
    try:
        regex = NameRegex(f"^(?:{pattern})$")
    except RegexError:
        return None
    found = [number for number in range(_MOST_LAYERS) if regex.found_in(str(number))]
    if len(found) == _MOST_LAYERS:
        return ""
    text = layers_text(found)
    is_small = bool(found) and found[-1] < _MOST_LAYERS // 2 and text.count(",") < MAX_PARTS
    return text if is_small else None
