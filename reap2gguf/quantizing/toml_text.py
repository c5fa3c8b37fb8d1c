"""Reads and writes TOML: no text makes the reader take memory or time out of proportion."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reap2gguf.files import plain_size

if TYPE_CHECKING:
    from reap2gguf.errors import Reap2ggufError

MAX_TOML_BYTES = 2**18
# Strings and comments, then keys of many parts: tomllib keeps every beginning of a dotted key, so
# that one of 40 KB would take gigabytes.
_QUOTED = re.compile(
    r"""
    [#][^\n]*+
    | "{3} (?: \\. | [^\\] )*? (?: "{3} | \\?\Z )
    | '{3} .*? (?: '{3} | \Z )
    | " (?: \\. | [^"\\\n] )*+ "?
    | ' [^'\n]*+ '?
    """,
    re.DOTALL | re.VERBOSE,
)
_MANY_PARTS = re.compile(r"(?<![\w-])(?:[\w-]++[ \t]*+\.[ \t]*+){16}")


def read_toml_file(path: Path, what: str, error_class: type[Reap2ggufError]) -> str:
    """The text of a TOML file, at most 256 KiB; `what` it should be.

    Raises `error_class` if it is larger, is not a plain file of UTF-8, or cannot be read.
    """
    try:
        if plain_size(path) > MAX_TOML_BYTES:
            raise error_class(f"{path}: over {MAX_TOML_BYTES:,} bytes, too large for a {what}")
        return path.read_text(encoding="utf-8-sig")  # some editors begin files with a BOM
    except (OSError, UnicodeDecodeError) as error:
        raise error_class(f"{path}: cannot be read ({error})") from error


def parse_toml(text: str, where: str, error_class: type[Reap2ggufError]) -> dict[str, Any]:
    """The values of a TOML text. Raises `error_class`, which names `where`."""
    if _MANY_PARTS.search(_QUOTED.sub("q", text)):
        raise error_class(f"{where}: not valid TOML (a key of over 16 parts)")
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # TOMLDecodeError is a ValueError
        raise error_class(f"{where}: not valid TOML ({error})") from error


def toml_string(text: str) -> str:
    r"""A text as a basic string of TOML.

    >>> toml_string('a "b"')
    '"a \\"b\\""'
    """
    # JSON escapes what TOML wants escaped, except for one control character
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
