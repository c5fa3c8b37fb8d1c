"""Regular expressions on tensor names, as llama-quantize's options have them, in bounded time.

They are those of ECMAScript, as std::regex reads them, without what needs to try again: no
references to groups and no looking ahead. A pattern becomes an automaton of states, and a name is
read once, letter by letter, with all states that are possible; nothing is tried twice. What a set
of states becomes with a letter is remembered.
"""

from __future__ import annotations

import string
from dataclasses import dataclass

MOST_LETTERS = 1500  # of a pattern
_MOST_STATES = 1000
_MOST_REPEATS = 100  # in {1,100}
_MOST_REMEMBERED = 500
_MOST_GROUPS = 50  # within each other

_ANY_LETTER = frozenset(map(chr, range(128))) - {"\n", "\r"}
_DIGITS = frozenset(string.digits)
_WORDS = frozenset(string.ascii_letters + string.digits + "_")
_SPACES = frozenset(" \t\n\r\v\f")
_CLASSES = {"d": _DIGITS, "w": _WORDS, "s": _SPACES}
_CONTROLS = {"t": "\t", "n": "\n", "r": "\r", "v": "\v", "f": "\f"}
_POSIX = {
    "alnum": frozenset(string.ascii_letters + string.digits),
    "alpha": frozenset(string.ascii_letters),
    "digit": _DIGITS,
    "lower": frozenset(string.ascii_lowercase),
    "punct": frozenset(string.punctuation),
    "space": _SPACES,
    "upper": frozenset(string.ascii_uppercase),
    "xdigit": frozenset(string.hexdigits),
}
_REPEATS = {"*": (0, None), "+": (1, None), "?": (0, 1)}


class RegexError(ValueError):
    """A pattern that cannot be used: what is wrong with it, and where."""


@dataclass(frozen=True)
class _Letters:
    """One letter of a set."""

    letters: frozenset[str]


@dataclass(frozen=True)
class _Assertion:
    """`^`, `$`, `\\b` or `\\B` (as "B")."""

    kind: str


@dataclass(frozen=True)
class _Sequence:
    parts: tuple[_Node, ...]


@dataclass(frozen=True)
class _Either:
    choices: tuple[_Node, ...]


@dataclass(frozen=True)
class _Repeat:
    what: _Node
    least: int
    most: int | None


_Node = _Letters | _Assertion | _Sequence | _Either | _Repeat


class _Parser:
    """Reads a pattern from left to right."""

    def __init__(self, pattern: str) -> None:
        self._text, self._at, self._depth = pattern, 0, 0

    def parse(self) -> _Node:
        found = self._either()
        if self._at < len(self._text):
            raise self._wrong("')' without '('")
        return found

    def _wrong(self, what: str) -> RegexError:
        return RegexError(f"{what} (letter {self._at + 1})")

    def _next(self, what: str) -> str:
        if self._at >= len(self._text):
            raise self._wrong(f"the end, expected {what}")
        letter = self._text[self._at]
        self._at += 1
        return letter

    def _skip(self, text: str) -> bool:
        found = self._text.startswith(text, self._at)
        self._at += len(text) if found else 0
        return found

    def _either(self) -> _Node:
        choices = [self._sequence()]
        while self._skip("|"):
            choices.append(self._sequence())
        return choices[0] if len(choices) == 1 else _Either(tuple(choices))

    def _sequence(self) -> _Node:
        parts: list[_Node] = []
        while self._at < len(self._text) and self._text[self._at] not in "|)":
            parts.append(self._repeated(self._one()))
        return _Sequence(tuple(parts))

    def _repeated(self, what: _Node) -> _Node:
        if self._at >= len(self._text) or self._text[self._at] not in "*+?{":
            return what
        if isinstance(what, _Assertion):
            raise self._wrong("nothing to repeat")
        sign = self._next("a repeat")
        least, most = self._counts() if sign == "{" else _REPEATS[sign]
        self._skip("?")  # as few as possible: whether a name has the pattern is the same
        if self._at < len(self._text) and self._text[self._at] in "*+?{":
            raise self._wrong("a repeat of a repeat")
        return _Repeat(what, least, most)

    def _counts(self) -> tuple[int, int | None]:
        least = self._number()
        most: int | None = least
        if self._skip(","):
            most = None if self._text.startswith("}", self._at) else self._number()
        if not self._skip("}"):
            raise self._wrong("expected '}'")
        if most is not None and most < least:
            raise self._wrong(f"{{{least},{most}}} ends before it begins")
        return least, most

    def _number(self) -> int:
        digits = ""
        while self._at < len(self._text) and self._text[self._at] in string.digits:
            digits += self._next("a digit")
        if not digits or int(digits[:9]) > _MOST_REPEATS:
            raise self._wrong(f"expected a number up to {_MOST_REPEATS}")
        return int(digits)

    def _one(self) -> _Node:
        letter = self._next("a letter")
        if letter == "(":
            return self._group()
        if letter == "[":
            return _Letters(self._set())
        if letter == ".":
            return _Letters(_ANY_LETTER)
        if letter in "^$":
            return _Assertion(letter)
        if letter == "\\":
            return self._escape()
        if letter in "*+?{}]":
            self._at -= 1
            raise self._wrong(
                "nothing to repeat" if letter in "*+?{" else f"{letter!r} without its beginning"
            )
        return _Letters(frozenset(letter))

    def _group(self) -> _Node:
        if self._skip("?") and not self._skip(":"):
            raise self._wrong("a group that begins with '(?' is not supported, but for '(?:'")
        self._depth += 1
        if self._depth > _MOST_GROUPS:
            raise self._wrong(f"more than {_MOST_GROUPS} groups within each other")
        found = self._either()
        if not self._skip(")"):
            raise self._wrong("expected ')'")
        self._depth -= 1
        return found

    def _escape(self) -> _Node:
        letter = self._next("a letter after the '\\'")
        if letter in "bB":
            return _Assertion(letter)
        return _Letters(self._class(letter) or frozenset(self._escaped(letter)))

    def _class(self, letter: str) -> frozenset[str] | None:
        """The set that an escape stands for, if it stands for one."""
        known = _CLASSES.get(letter.lower())
        if known is None or letter in _CLASSES:
            return known
        return frozenset(map(chr, range(128))) - known

    def _escaped(self, letter: str) -> str:
        if letter in _CONTROLS:
            return _CONTROLS[letter]
        if letter.isalnum() or not letter.isascii():
            self._at -= 1
            raise self._wrong(f"'\\{letter}' is not supported")
        return letter

    def _set(self) -> frozenset[str]:
        """What is in brackets, of which the first is read."""
        is_other = self._skip("^")
        if self._text.startswith("]", self._at):
            raise self._wrong("an empty set")
        found: set[str] = set()
        while not self._skip("]"):
            found |= self._item()
        return frozenset(map(chr, range(128))) - found if is_other else frozenset(found)

    def _item(self) -> frozenset[str]:
        if self._skip("[:"):
            end = self._text.find(":]", self._at)
            name = self._text[self._at : end] if end >= 0 else ""
            if name not in _POSIX:
                raise self._wrong(f"expected one of {', '.join(_POSIX)} and ':]'")
            self._at = end + 2
            return _POSIX[name]
        first = self._member()
        is_range = self._text.startswith("-", self._at) and not self._text.startswith(
            "-]", self._at
        )
        if not is_range or isinstance(first, frozenset):
            return first if isinstance(first, frozenset) else frozenset(first)
        self._at += 1
        last = self._member()
        if isinstance(last, frozenset) or ord(last) < ord(first):
            raise self._wrong("a range that ends before it begins")
        return frozenset(map(chr, range(ord(first), ord(last) + 1)))

    def _member(self) -> str | frozenset[str]:
        letter = self._next("']'")
        if letter != "\\":
            return letter
        letter = self._next("a letter after the '\\'")
        return self._class(letter) or self._escaped(letter)


class NameRegex:
    """A pattern that is searched for in names.

    Raises RegexError for a pattern that is too long, is wrong or has what is not supported.
    """

    def __init__(self, pattern: str) -> None:
        if len(pattern) > MOST_LETTERS:
            raise RegexError(f"{len(pattern):,} letters, expected at most {MOST_LETTERS:,}")
        if not pattern.isascii() or not pattern:
            raise RegexError("expected letters, digits and signs of ASCII")
        # of each state: the letters and the state they lead to, or the states after it at once
        self._letters: list[tuple[frozenset[str], int] | None] = []
        self._empty: list[list[tuple[str, int]]] = []
        self._end = self._state()
        self._start = self._built(_Parser(pattern).parse(), self._end)
        self._remembered: dict[tuple[frozenset[int], str, str], frozenset[int]] = {}

    @property
    def n_states(self) -> int:
        """How many states may be possible at a letter, at most."""
        return len(self._letters)

    def _state(self) -> int:
        if len(self._letters) >= _MOST_STATES:
            raise RegexError("too many parts and repeats; write it shorter")
        self._letters.append(None)
        self._empty.append([])
        return len(self._letters) - 1

    def _built(self, node: _Node, after: int) -> int:
        """The state from which `node` leads to the state `after`."""
        if isinstance(node, _Sequence):
            for part in reversed(node.parts):
                after = self._built(part, after)
            return after
        if isinstance(node, _Repeat):
            return self._repeat(node, after)
        state = self._state()
        if isinstance(node, _Letters):
            self._letters[state] = (node.letters, after)
        elif isinstance(node, _Assertion):
            self._empty[state].append((node.kind, after))
        else:
            self._empty[state] += [("", self._built(one, after)) for one in node.choices]
        return state

    def _repeat(self, node: _Repeat, after: int) -> int:
        if node.most is None:
            loop = self._state()
            self._empty[loop] += [("", self._built(node.what, loop)), ("", after)]
            after = loop
        else:
            end = after
            for _ in range(node.most - node.least):
                state = self._state()
                self._empty[state] += [("", self._built(node.what, after)), ("", end)]
                after = state
        for _ in range(node.least):
            after = self._built(node.what, after)
        return after

    def found_in(self, name: str) -> bool:
        """Whether a part of the name, or all of it, fits the pattern."""
        states = frozenset((self._start,))
        before = ""
        for letter in (*name, ""):
            key = (states, before, letter)
            known = self._remembered.get(key)
            if known is None:
                known = self._step(states, before, letter)
                if len(self._remembered) >= _MOST_REMEMBERED:
                    self._remembered.clear()
                self._remembered[key] = known
            if self._end in known:
                return True
            states, before = known, letter
        return False

    def _step(self, states: frozenset[int], before: str, letter: str) -> frozenset[int]:
        """States after a letter ("" at the end); the last state alone if it is reached before."""
        waiting, reached = [*states], {*states}
        while waiting:
            for kind, state in self._empty[waiting.pop()]:
                if state not in reached and _holds(kind, before, letter):
                    reached.add(state)
                    waiting.append(state)
        if self._end in reached:
            return frozenset((self._end,))
        following = {self._start} if letter else set()
        for state in reached:
            leads = self._letters[state]
            if leads is not None and letter in leads[0]:
                following.add(leads[1])
        return frozenset(following)


def _holds(kind: str, before: str, after: str) -> bool:
    """Whether an assertion holds between two letters, of which "" is none."""
    if kind == "^":
        return not before
    if kind == "$":
        return not after
    at_edge = (before in _WORDS) != (after in _WORDS)
    return not kind or at_edge is (kind == "b")
