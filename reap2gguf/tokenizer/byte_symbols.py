"""The characters that stand for bytes in the tokens of byte-level BPE."""

from __future__ import annotations

from functools import cache


@cache
def byte_symbols() -> tuple[str, ...]:
    """The character that stands for each byte, as in GPT-2: 256 characters, none of them a space.

    >>> byte_symbols()[0x41], byte_symbols()[0x20]
    ('A', 'Ġ')
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (chr(0x100 + position) for position in range(256))
    return tuple(chr(byte) if byte in printable else next(others) for byte in range(256))
