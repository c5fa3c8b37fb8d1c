"""Mutations that know the formats, so that what lies behind the first check is reached too."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from typing import Any

from reap2gguf.checkpoint.safetensors_header import ITEM_BYTES

Mutator = Callable[[bytes, random.Random], bytes]
SIZES = (0, 1, 2, 3, 4, 7, 8, 31, 32, 255, 2**16, 2**31, 2**47, 2**48 - 1, 2**48, 2**63, 2**64, -1)
ODD_VALUES = (None, True, 0.5, 1e300, "", "F32", "\ud800", "a\nb", [], {}, [[]], 10**300, [None])
_END = re.compile(rb"\[\s*\d{1,4}\s*,\s*(\d{1,4})\s*\]")


def safetensors(content: bytes, dice: random.Random) -> bytes:
    """Another value in the header, or else the length and the data that the header wants."""
    if dice.random() < 0.5:
        try:
            header = json.loads(content[8:][: int.from_bytes(content[:8], "little")])
        except (ValueError, RecursionError):
            header = None
        if isinstance(header, dict):
            _change_header(header, dice)
            text = json.dumps(header, ensure_ascii=dice.random() < 0.9)
            content = bytes(8) + text.encode("utf-8", "surrogatepass")
    return _mend_safetensors(content)


def _change_header(header: dict[str, Any], dice: random.Random) -> None:
    name = dice.choice([*header, "w", "\U0001f600", "__metadata__"])
    entry = header.setdefault(name, {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]})
    if not isinstance(entry, dict) or dice.random() < 0.1:
        header[name] = dice.choice(ODD_VALUES)
    else:
        key = dice.choice(["dtype", "shape", "shape", "shape", "data_offsets", "other"])
        shape = [dice.choice(SIZES) for _ in range(dice.choice([0, 1, 1, 2, 2, 3, 8, 9]))]
        good = {"dtype": dice.choice(list(ITEM_BYTES)), "shape": shape, "data_offsets": shape[:2]}
        entry[key] = dice.choice(ODD_VALUES) if dice.random() < 0.1 else good.get(key, 0)
    if dice.random() < 0.8:
        _lay_out(header)


def _lay_out(header: dict[str, Any]) -> None:
    """Offsets one after another, where the sizes allow it."""
    position = 0
    for entry in header.values():
        try:
            size = ITEM_BYTES[entry["dtype"]]
            for length in entry["shape"]:
                size *= length
        except (KeyError, TypeError):
            continue
        if isinstance(size, int) and 0 <= size < 1000:
            entry["data_offsets"] = [position, position + size]
            position += size


def _mend_safetensors(content: bytes) -> bytes:
    body = content[8:]
    end = body.rfind(b"}") + 1
    n_bytes = max((int(match[1]) for match in _END.finditer(body, 0, end)), default=0)
    data = body[end:][:n_bytes].ljust(n_bytes, b"\0")
    return end.to_bytes(8, "little") + body[:end] + data


def gguf(content: bytes, dice: random.Random) -> bytes:
    """Magic and version, and at times another number somewhere, or more bytes at the end."""
    content = b"GGUF\x03\0\0\0" + content[8:].ljust(16, b"\0")
    if dice.random() < 0.3:
        content = _with_number(content, dice, 8, dice.choice([4, 8]))
    return content + bytes(dice.choice([0, 0, 0, 32, 512]))


def imatrix_dat(content: bytes, dice: random.Random) -> bytes:
    """A plausible count of entries, and at times another number somewhere."""
    content = content[:1] + b"\0\0\0" + content[4:]
    return _with_number(content, dice, 4, 4) if dice.random() < 0.3 else content


def _with_number(content: bytes, dice: random.Random, first: int, width: int) -> bytes:
    place = dice.randrange(first, max(len(content), first + 1))
    number = dice.choice([*SIZES, len(content), dice.randrange(256)]) % 2 ** (8 * width)
    return content[:place] + number.to_bytes(width, "little") + content[place + width :]


MUTATORS: dict[str, Mutator] = {
    "safetensors": safetensors,
    "gguf": gguf,
    "imatrix-gguf": gguf,
    "imatrix-dat": imatrix_dat,
}
