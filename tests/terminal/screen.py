"""A small terminal: what a user sees after a program has printed some bytes."""

from __future__ import annotations

import codecs
import re

_SEQUENCE = re.compile(r"\x1b\[([?\d;]*)([A-Za-z])|\x1b[()][A-B0]|\x1b[=>78]")


class Screen:
    """Draws text, carriage returns, cursor movements and erasures; colours are dropped.

    Raises AssertionError for a control sequence that it does not know.
    """

    def __init__(self, n_lines: int = 24, n_columns: int = 80) -> None:
        self._size = (n_lines, n_columns)
        self._rows = [[" "] * n_columns for _ in range(n_lines)]
        self._scrolled: list[str] = []
        self._y = self._x = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._rest = ""
        self.n_wrapped = 0  # lines that were too long for the screen

    @property
    def lines(self) -> list[str]:
        """Everything from the first line to the last one with text, the scrolled ones included."""
        lines = [*self._scrolled, *("".join(row).rstrip() for row in self._rows)]
        while lines and not lines[-1]:
            lines.pop()
        return lines

    def feed(self, data: bytes) -> None:
        text = self._rest + self._decoder.decode(data)
        self._rest = ""
        at = 0
        while at < len(text):
            if text[at] != "\x1b":
                self._put(text[at])
                at += 1
            elif found := _SEQUENCE.match(text, at):
                self._control(found[1] or "", found[2] or "")
                at = found.end()
            else:
                assert len(text) - at < 20, f"unknown sequence {text[at : at + 20]!r}"
                self._rest = text[at:]
                return

    def _put(self, letter: str) -> None:
        n_columns = self._size[1]
        if letter == "\r":
            self._x = 0
        elif letter == "\n":
            self._next_line()
        elif letter == "\b":
            self._x = max(self._x - 1, 0)
        elif letter == "\x07":
            pass
        else:
            if self._x == n_columns:
                self.n_wrapped += 1
                self._x = 0
                self._next_line()
            self._rows[self._y][self._x] = letter
            self._x += 1

    def _next_line(self) -> None:
        if self._y + 1 < self._size[0]:
            self._y += 1
            return
        self._scrolled.append("".join(self._rows.pop(0)).rstrip())
        self._rows.append([" "] * self._size[1])

    def _control(self, values: str, kind: str) -> None:
        n_lines, n_columns = self._size
        if kind in "mhl" or not kind:
            return
        amount = int(values) if values.isdigit() else None
        if kind == "A":
            self._y = max(self._y - (amount or 1), 0)
        elif kind == "B":
            self._y = min(self._y + (amount or 1), n_lines - 1)
        elif kind == "C":
            self._x = min(self._x + (amount or 1), n_columns - 1)
        elif kind == "D":
            self._x = max(self._x - (amount or 1), 0)
        elif kind == "G":
            self._x = min((amount or 1) - 1, n_columns - 1)
        elif kind == "K":
            first, last = {0: (self._x, n_columns), 1: (0, self._x + 1), 2: (0, n_columns)}[
                amount or 0
            ]
            self._rows[self._y][first:last] = [" "] * (last - first)
        else:
            raise AssertionError(f"unknown control sequence {values}{kind}")
