"""Text for people: numbers with units, and untrusted text made safe for a terminal."""

from __future__ import annotations

import os
import re
import reprlib
import shlex
import textwrap
from typing import Any

_WORD = re.compile(r"\S+")
_COMMAND = re.compile(r"\breap2gguf \w")
_MOST_LETTERS = 1600  # per line: a path of 255 names is too long to read
_MOST_SHOWN = 500  # letters per value

# Letters and marks that show nothing, though `str.isprintable` accepts them: fillers, the combining
# grapheme joiner, vowels of Khmer and separators of Mongolian that are not drawn, variation
# selectors, and the empty Braille pattern.
_BLANK = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\ufe00-\ufe0f\uffa0"
    "\U000e0100-\U000e01ef]"
)

_SHORT = reprlib.Repr()
_SHORT.maxlevel = 3
_SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxdict = 8
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 120


def shown(value: Any) -> str:
    """A value that was read from a file, as `repr` writes it, shortened if it is long."""
    try:
        text = _SHORT.repr(value)
    except ValueError:  # Python prints no integer of thousands of digits, which TOML can hold
        return "an integer of thousands of digits"
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}..."


def is_visible(text: str) -> bool:
    """Whether every character of a text shows: none breaks a line, turns its direction, or hides.

    Spaces count as visible.
    """
    return text.isprintable() and not _BLANK.search(text)


def one_line(text: str, most: int = _MOST_LETTERS) -> str:
    """`text` without line breaks, control and hidden characters; a long text loses its middle.

    Otherwise a name from a file could move the cursor, colour the terminal, or imitate a line of
    this program.

    >>> one_line("a\\x1b[2Jb\\nc")
    'a\\\\x1b[2Jb\\\\nc'
    """
    if len(text) <= most:
        return _escaped(text)
    # a message begins with what is wrong and ends with what to do
    half = most // 2
    left_out = f" [... {len(text) - 2 * half:,} letters left out ...] "
    return _escaped(text[:half])[:half] + left_out + _escaped(text[-half:])[-half:]


def wrapped(text: str, width: int) -> str:
    """`text` in lines of at most `width` letters, broken between words, the later ones indented.

    A line with a command of this program stays whole, so that it can be copied.

    >>> wrapped("  a note of several words", 20)
    '  a note of several\\n    words'
    """
    if len(text) <= width or _COMMAND.search(text):
        return text
    margin = text[: len(text) - len(text.lstrip())]
    lines = textwrap.wrap(
        text.strip(),
        max(width, 20),
        initial_indent=margin,
        subsequent_indent=f"{margin}  ",
        break_long_words=False,
        break_on_hyphens=False,
    )
    return "\n".join(lines)


def without_password(text: str) -> str:
    """`text` without the user names, passwords and queries of URLs in it.

    >>> without_password("https://me:secret@example.org/model?token=x")
    'https://...@example.org/model?...'
    """
    return _WORD.sub(lambda word: _without_password(word[0]), text) if "://" in text else text


def _without_password(word: str) -> str:
    """The same for one word: a time that grows with its length only."""
    scheme, *rest = word.split("://")
    if not rest:
        return word
    bare = [scheme]
    for part in rest:
        place, slash, path = part.partition("/")
        _, at, host = place.rpartition("@")
        bare.append(f"...@{host}{slash}{path}" if at else part)
    url, query, _ = "://".join(bare).partition("?")
    return f"{url}?..." if query else url


def shell_word(path: os.PathLike[str] | str) -> str:
    """A path as a word of a command that the user may copy.

    >>> shell_word("my models/-x")
    "'my models/-x'"
    >>> shell_word("-x")
    './-x'
    """
    text = os.fspath(path)
    return shlex.quote(f"./{text}" if text.startswith("-") else text)


def _escaped(text: str) -> str:
    if is_visible(text):
        return text
    letters = (c if is_visible(c) else c.encode("unicode_escape").decode("ascii") for c in text)
    return "".join(letters)


def size(n_bytes: float) -> str:
    """Bytes in the largest binary unit that fits.

    >>> size(3 * 2**30)
    '3.00 GiB'
    """
    for scale, unit in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if n_bytes >= scale:
            return f"{n_bytes / scale:.2f} {unit}"
    return f"{n_bytes:.0f} bytes"


def parameters(count: int) -> str:
    """A number of parameters in millions or billions.

    >>> parameters(30_532_122_624)
    '30.53 B'
    """
    return f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.1f} M"


def quantity(amount: float | None, unit: str) -> str:
    """A number with its unit; bytes as `size` prints them.

    >>> quantity(1_234_567, "tokens")
    '1.2 M tokens'
    """
    if amount is None:
        return f"? {unit}"
    if unit == "bytes":
        return size(amount)
    for scale, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if amount >= scale:
            return f"{amount / scale:.1f} {letter} {unit}"
    return f"{amount:.0f} {unit}"


def duration(seconds: float) -> str:
    """Seconds, minutes, hours or days, whichever suits.

    >>> duration(600)
    '10 min'
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    if seconds < 2 * 86400:
        return f"{seconds / 3600:.1f} h"
    days, hours = divmod(round(seconds / 3600), 24)
    return f"{days} d {hours} h"
