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

_PLACE = re.compile(r" \(at line (\d+), column (\d+)\)$")  # in tomllib's errors
_KEY = re.compile(r"[ \t]*([\w-]+)[ \t]*=")


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
    """The values of a TOML text. Raises `error_class`, which names `where` and the line."""
    if _MANY_PARTS.search(_QUOTED.sub("q", text)):
        raise error_class(f"{where}: not valid TOML (a key of over 16 parts)")
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # TOMLDecodeError is a ValueError
        raise error_class(_wrong_toml(where, str(error))) from error


def _wrong_toml(where: str, problem: str) -> str:
    """tomllib's words, with the line where other errors have it, and what to do."""
    twice = problem.startswith(("Cannot overwrite", "Cannot declare"))
    advice = "; it stands there for the second time, so remove one of both" if twice else ""
    if found := _PLACE.search(problem):
        where, problem = f"{where}, line {found[1]}", problem[: found.start()]
        problem += f" at column {found[2]}"
    return f"{where}: not valid TOML ({problem}){advice}"


class SourceLines:
    """On which lines of a TOML text its keys and its [[tables]] of one name stand.

    tomllib does not say. Texts that write the tables in another way, such as `rules = [{...}]`,
    have no lines here, and never wrong ones: `has_all` compares the numbers of tables.
    """

    def __init__(self, text: str, table: str) -> None:
        self.top: dict[str, int] = {}
        self._tables: list[tuple[int, dict[str, int]]] = []
        header = re.compile(rf"\s*\[\[\s*{re.escape(table)}\s*\]\]")
        keys = self.top
        plain = _QUOTED.sub(lambda found: "\n" * found[0].count("\n") or "q", text)
        for number, line in enumerate(plain.split("\n"), start=1):
            if header.match(line):
                keys = {}
                self._tables.append((number, keys))
            elif key := _KEY.match(line):
                keys.setdefault(key[1], number)

    def has_all(self, n_tables: int) -> bool:
        """Whether every table's line is known."""
        return len(self._tables) == n_tables

    def of_table(self, position: int, key: str | None = None) -> int:
        """The line of a table's key, or of its beginning."""
        first, keys = self._tables[position]
        return keys.get(key, first) if key is not None else first


def toml_string(text: str) -> str:
    r"""A text as a basic string of TOML.

    >>> toml_string('a "b"')
    '"a \\"b\\""'
    """
    # JSON escapes what TOML wants escaped, except for one control character
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def toml_pattern(text: str) -> str:
    r"""The same for a pattern, as a literal string where it has backslashes.

    >>> toml_pattern(r"blk\.0\."), toml_pattern("a")
    ("'blk\\.0\\.'", '"a"')
    """
    is_literal = "\\" in text and "'" not in text and text.isascii() and text.isprintable()
    return f"'{text}'" if is_literal else toml_string(text)
