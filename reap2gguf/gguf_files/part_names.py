"""The names of the parts of a GGUF file that is split, as llama.cpp has them."""

from __future__ import annotations

import re
from dataclasses import dataclass

_PART_NAME = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


@dataclass(frozen=True)
class PartName:
    """The name of a part, taken apart."""

    stem: str
    number: int  # from zero
    count: int


def part_name(stem: str, number: int, count: int) -> str:
    """The name of part `number` (from zero) of `count`.

    >>> part_name("model-Q4_K_M", 0, 3)
    'model-Q4_K_M-00001-of-00003.gguf'
    """
    return f"{stem}-{number + 1:05d}-of-{count:05d}.gguf"


def parse_part_name(name: str) -> PartName | None:
    """The reverse of `part_name`; None if the file is not called as a part."""
    match = _PART_NAME.fullmatch(name)
    if match is None:
        return None
    return PartName(match["stem"], int(match["number"]) - 1, int(match["count"]))
