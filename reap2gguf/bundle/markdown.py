"""Text from files and arguments, made safe for a card: it may change nothing but what it says.

Recipe titles, names of files and folders, and manifests of other people come from outside. They may
hold line breaks, `|`, HTML, links, and characters that hide or turn the text around them.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Sequence

from reap2gguf.messages import is_visible, one_line

MOST_LETTERS = 200  # of a text in a card
# owner/name, or a name alone, as the Hub allows them
_REPOSITORY = re.compile(r"(?:[A-Za-z0-9][\w.-]{0,95}/)?[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
# Words without Markdown in them: `_` only inside a word, `:` only before a space, and `.` only at
# the end of a word or between digits, as a viewer may make a link of `name.com`. They do not begin
# as the item of a list.
_PLAIN = re.compile(
    r"(?![-+]|\d+[.)](?: |\Z))(?:[^\W_]|[ ,;%()'+/-]|:(?= )|(?<=[^\W_])_(?=[^\W_])|\.(?=[\d ]|\Z)"
    r"|(?<=\bllama)\.(?=cpp\b))+"
)


def inline(text: str) -> str:
    """A text inside a line or a table cell: as it is if it is plain words, else as code."""
    is_plain = len(text) <= MOST_LETTERS and text == text.strip() and _PLAIN.fullmatch(text)
    return text if is_plain and is_visible(text) else code(text)


def code(text: str) -> str:
    """A text as a code span, in which no Markdown, HTML or link is read; a table cell may hold it.

    Backslashes are doubled, as in a string of a program.
    """
    safe = _shortened(text).replace("\\", "\\\\")
    safe = one_line(safe, 2 * len(safe)).replace("|", "\\|")
    if not safe.strip():
        return "(empty)"
    longest = max((len(run) for run in re.findall("`+", safe)), default=0)
    fence = "`" * (longest + 1)
    # a space beside each fence is not shown; it keeps letters and fences apart
    edge = " " if "`" in (safe[0], safe[-1]) or (safe[0] == safe[-1] == " ") else ""
    return f"{fence}{edge}{safe}{edge}{fence}"


def prose(text: str) -> str:
    """A sentence in which no letter means anything to Markdown or HTML."""
    return re.sub(r"[<>&\\`*_\[\]|]", lambda found: f"&#{ord(found[0])};", one_line(text))


def repository(name: str) -> str | None:
    """The name if it may be that of a repository, `owner/name`; else None."""
    return name if "/" in name and _REPOSITORY.fullmatch(name) else None


def hub_link(name: str, kind: str = "", text: str | None = None) -> str:
    """A link to a repository on the Hub; code if the name cannot be that of one.

    `kind` is "" for models, "datasets/" for datasets.
    """
    shown = name if text is None else text
    is_name = _REPOSITORY.fullmatch(name) is not None
    if not is_name:
        return code(shown)
    label = shown if _REPOSITORY.fullmatch(shown) else code(shown)
    return f"[{label}](https://huggingface.co/{kind}{name})"


def picture(words: str, file: str) -> str:
    """A picture beside the card; `words` and the name are the program's own."""
    return f"![{words}]({file})"


def argument(text: str) -> str:
    """A text as one argument of a shell command in a code block."""
    return shlex.quote(one_line(_shortened(text)))


def quoted(text: str) -> str:
    """A text as a string of Python in a code block."""
    return json.dumps(one_line(_shortened(text)), ensure_ascii=False)


def _shortened(text: str) -> str:
    half = MOST_LETTERS // 2
    return text if len(text) <= MOST_LETTERS else f"{text[:half]} [...] {text[-half:]}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of cells that are safe already."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def ranges(ids: Sequence[int]) -> str:
    """Numbers in ascending order, with runs of three and more shortened: 1, 4-7."""
    runs: list[list[int]] = []
    for number in ids:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    parts: list[str] = []
    for first, last in runs:
        parts += [f"{first}-{last}"] if last - first > 1 else map(str, range(first, last + 1))
    return ", ".join(parts) or "none"
