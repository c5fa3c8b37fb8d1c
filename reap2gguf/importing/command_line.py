"""A llama-quantize command as it is pasted: out of a terminal, a card or a shell script.

A script may set variables and use them (`custom="..."`, `--custom-q "$custom"`), break lines with
a backslash, and start the program through others. Nothing is run. What a command substitutes,
`custom=$(echo "$custom" | grep ...)`, is taken for the cleaning of the text that it prints, as
scripts of this kind do; a list is cleaned here anyway.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import PurePath

from reap2gguf.errors import RecipeError
from reap2gguf.messages import shown

_PROGRAM = re.compile(r"(llama-)?quantize(\.exe)?")
_IS_COMMAND = re.compile(r"(^|[\s/\"'])llama-quantize\b|(^|\s)--[a-z]", re.MULTILINE)
_SET = re.compile(
    r"""^[ \t]*(?:export[ \t]+)?(?P<name>[A-Za-z_]\w*)=
        (?: "(?P<double>(?:\\.|[^"\\])*)" | '(?P<single>[^']*)' | (?P<plain>[^\s"'$(]+) )
        [ \t]*;?$""",
    re.MULTILINE | re.VERBOSE | re.DOTALL,
)
_SUBSTITUTED = re.compile(r"[ \t]*(?:export[ \t]+)?[A-Za-z_]\w*=\"?\$\(")
_VARIABLE = re.compile(r"\$(?:\{(\w+)\}|([A-Za-z_]\w*))")
_ESCAPED = re.compile(r"\\([\\\"$`])")  # what a shell unescapes between double quotes
_OPERATORS = ("|", "||", "&", "&&", ";", ">", ">>", "2>", "2>&1", "1>", "<")

# options with a value, and those without; what becomes of each
TYPE_OPTIONS = ("--output-tensor-type", "--token-embedding-type")
RULE_OPTIONS = ("--tensor-type", "--tensor-type-file", "--custom-q")
_ELSEWHERE = {
    "--imatrix": "pass the importance matrix to `build` or `quantize` with --imatrix",
    "--include-weights": "an importance matrix is used for all tensors that it has",
    "--exclude-weights": "an importance matrix is used for all tensors that it has",
    "--override-kv": "no key of the header is changed",
    "--prune-layers": "no layer is removed",
    "--max-buffer-size": "it changes no type",
}
_FLAGS_ELSEWHERE = {
    "--allow-requantize": "it changes no type",
    "--keep-split": "pass --max-file-size to `build` or `quantize` for several parts",
    "--dry-run": "`reap2gguf recipes check` shows sizes",
    "--hide-imatrix": "it changes no type",
    "--partial-requant": "it changes no type",
}
_FLAGS = ("--leave-output-tensor", "--pure")
_REFUSED = re.compile(
    r"--(attn-(q|k|v|qkv|output)|ffn-(gate|down|up|gate-inp)|per-layer-token-embedding)-type"
    r"|--(extra-output-tensor|repack|repack-pattern|symmetric-q40|slow-iq2ks)"
    r"|--(ignore-imatrix-rules|help)"
)


@dataclass
class Command:
    """A command, taken apart."""

    options: list[tuple[str, str]] = field(default_factory=list)  # of RULE_ and TYPE_OPTIONS
    flags: set[str] = field(default_factory=set)
    words: list[str] = field(default_factory=list)  # files, the file type, the number of threads
    notes: list[str] = field(default_factory=list)

    @property
    def is_pure(self) -> bool:
        return "--pure" in self.flags

    @property
    def leaves_output(self) -> bool:
        return "--leave-output-tensor" in self.flags


def is_command(text: str) -> bool:
    """Whether a text is a command, and not a list of rules."""
    lines = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    return _IS_COMMAND.search(lines) is not None


def read_command(text: str, where: str) -> Command:
    """A command from its text. Raises RecipeError, which begins with `where`."""
    text = text.replace("\r\n", "\n")
    variables: dict[str, str] = {}
    for found in _SET.finditer(text):
        value = found["single"] or found["plain"] or _ESCAPED.sub(r"\1", found["double"] or "")
        variables.setdefault(found["name"], value)
    lines = _without_substitutions(_SET.sub("", text).split("\n"))
    kept = [line for line in lines if not line.lstrip().startswith("#")]
    words = _words(_line(re.sub(r"\\[ \t]*\n", " ", "\n".join(kept)), where), where)

    def value_of(found: re.Match[str]) -> str:
        return variables.get(found[1] or found[2], found[0])

    return _parsed([_VARIABLE.sub(value_of, word) for word in words], where)


def _without_substitutions(lines: Iterable[str]) -> Iterator[str]:
    """The lines that are not of `NAME=$(...)`."""
    is_inside = False
    for line in lines:
        is_inside = is_inside or _SUBSTITUTED.match(line) is not None
        if not is_inside:
            yield line
        elif line.rstrip().removesuffix('"').endswith(")"):
            is_inside = False


def _line(text: str, where: str) -> str:
    """The line with the program; all of them if none has its name."""
    found = [line for line in text.split("\n") if re.search(r"(^|[\s/\"'])llama-quantize\b", line)]
    if len(found) > 1:
        raise RecipeError(f"{where}: {len(found)} llama-quantize commands, expected one; pass one")
    return found[0] if found else " ".join(text.split("\n"))


def _words(line: str, where: str) -> list[str]:
    """The words after the program's name, up to what a shell would not pass to it."""
    try:
        # punctuation_chars would cut `a|b` of a pattern that is not quoted
        words = shlex.split(line)
    except ValueError as error:
        raise RecipeError(f"{where}: not a command that a shell would read ({error})") from error
    names = (place for place, word in enumerate(words) if _is_program(word))
    words = words[next(names, -1) + 1 :]
    end = next((place for place, word in enumerate(words) if word in _OPERATORS), len(words))
    return words[:end]


def _is_program(word: str) -> bool:
    return _PROGRAM.fullmatch(PurePath(word.replace("\\", "/")).name) is not None


def _parsed(words: list[str], where: str) -> Command:
    command = Command()
    waiting = iter(words)
    for word in waiting:
        if not word.startswith("--"):
            command.words.append(word)
        elif word in _FLAGS:
            command.flags.add(word)
        elif word in _FLAGS_ELSEWHERE:
            command.notes.append(f"{word} is not part of a recipe: {_FLAGS_ELSEWHERE[word]}")
        elif word in (*RULE_OPTIONS, *TYPE_OPTIONS, *_ELSEWHERE):
            value = next(waiting, None)
            if value is None:
                raise RecipeError(f"{where}: {word} without a value")
            if word not in _ELSEWHERE and _VARIABLE.fullmatch(value):
                raise RecipeError(
                    f"{where}: {word} {value}: the variable is not set in this text; write its "
                    "value in its place"
                )
            if word in _ELSEWHERE:
                command.notes.append(f"{word} is not part of a recipe: {_ELSEWHERE[word]}")
            else:
                command.options.append((word, value))
        else:
            raise _unknown(word, where)
    command.notes = list(dict.fromkeys(command.notes))
    return command


def _unknown(word: str, where: str) -> RecipeError:
    if _REFUSED.fullmatch(word):
        return RecipeError(
            f"{where}: {word} is not supported, as no recipe says what it does; remove it, or "
            "write what it does to types as --custom-q PATTERN=TYPE"
        )
    return RecipeError(f"{where}: {shown(word)} is not an option of llama-quantize; remove it")
