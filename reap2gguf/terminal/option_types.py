"""Values of options: sizes, labels and paths."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import click

from reap2gguf.messages import shown
from reap2gguf.pruning.counts import WEIGHED

_MOST_BYTES = 2**60
_SIZE = re.compile(r"(\d+(?:\.\d+)?) *([KMGT]?)(i?)(B?)", re.IGNORECASE)


def read_size(text: str) -> int:
    """Bytes of "12GiB", "12G" (the same), "12GB" (powers of 1000) or "12B".

    Raises ValueError if `text` is not a size, or has no unit.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None or (match[3] and not match[2]):
        raise ValueError(f"{shown(text)} is not a size such as 12GiB")
    number, letter, is_binary, is_bytes = match.groups()
    if not letter and not is_bytes:
        raise ValueError(f"{text.strip()} has no unit; write {number}GiB")
    base = 1000 if is_bytes and not is_binary else 1024
    amount = float(number) * base ** " KMGT".index(letter.upper() or " ")
    if amount > _MOST_BYTES:
        raise ValueError(f"{shown(text)} is too large, expected at most 1024 PiB")
    return int(amount)


class SizeType(click.ParamType):  # type: ignore[type-arg]
    """An amount of memory."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            return read_size(str(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)


class LabelType(click.ParamType):  # type: ignore[type-arg]
    """A recipe and the label of its file."""

    name = "label"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, str]:
        recipe, equals, label = str(value).rpartition("=")
        if not equals or not recipe or not label:
            self.fail(f"{shown(value)} is not RECIPE=LABEL", param, ctx)
        return recipe, label


FilePath = click.Path(path_type=Path, dir_okay=False)
FolderPath = click.Path(path_type=Path)


class RatiosType(click.ParamType):  # type: ignore[type-arg]
    """Shares of experts, as numbers or percentages."""

    name = "ratios"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[float, ...]:
        found = []
        for text in str(value).split(","):
            try:
                number = float(text.strip().removesuffix("%"))
            except ValueError:
                self.fail(f"{shown(text)} is not a ratio such as 0.25 or 25%", param, ctx)
            found.append(number / 100 if text.strip().endswith("%") else number)
        return tuple(found)


class CompressionType(click.ParamType):  # type: ignore[type-arg]
    """A share of the experts, or the word that lets a build find it."""

    name = "compression"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float | str:
        if value == WEIGHED:
            return WEIGHED
        try:
            return float(value)
        except ValueError:
            self.fail(f"{shown(value)} is neither a number such as 0.25 nor {WEIGHED}", param, ctx)
