"""A tokenizer that is published as `tiktoken.model`: byte sequences with ranks, and no merges.

Kimi and Moonlight have one, and a Python file that loads it, which is never run here. What that
file does is known: it splits text by one pattern, and gives the ids after the ranks to special
tokens. A `tokenizer.json` that gives the same ids is made of these. Its merges are those that
llama.cpp's converter finds: the two parts that a token falls into when it is merged by the ranks
below its own.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from reap2gguf.errors import CheckpointError
from reap2gguf.messages import shown
from reap2gguf.models.tokenizer_families import KIMI_STEPS
from reap2gguf.tokenizer.byte_symbols import byte_symbols

_LONGEST = 1024  # bytes of a token; Kimi's longest has 256


def tokenizer_of_ranks(
    data: bytes, special: Mapping[int, str], n_special: int, where: Path
) -> dict[str, Any]:
    """A `tokenizer.json` of the contents of a file of ranks.

    `special` are texts of special tokens by id; of the `n_special` ids after the ranks, those that
    it does not have are reserved. Takes about two seconds for 200,000 tokens. Raises
    CheckpointError that names the line of the file `where` that is none of a rank.
    """
    ranks = read_ranks(data, where)
    symbols = byte_symbols()
    texts = {token: "".join(symbols[byte] for byte in token) for token in ranks}
    first = len(ranks)
    added = {
        index: special.get(index, f"<|reserved_token_{index}|>")
        for index in range(first, first + n_special)
    }
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    splits = [
        {"type": "Split", "pattern": {"Regex": step}, "behavior": "Isolated", "invert": False}
        for step in KIMI_STEPS
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": index, "content": text, **flags, "special": True}
            for index, text in added.items()
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [*splits, {**byte_level, "use_regex": False}],
        },
        "post_processor": None,
        "decoder": {**byte_level, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,
            "vocab": {texts[token]: rank for token, rank in ranks.items()},
            "merges": [[texts[left], texts[right]] for left, right in merges_of_ranks(ranks)],
        },
    }


def read_ranks(data: bytes, where: Path) -> dict[bytes, int]:
    """The rank of each token of lines `base64 rank`, which are 0, 1, 2 ...; raises as above."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(data.splitlines(), 1):
        if not line:
            continue
        encoded, _, rank = line.partition(b" ")
        try:
            token = base64.b64decode(encoded, validate=True)
            expected = len(ranks)
            if not 0 < len(token) <= _LONGEST or token in ranks or int(rank) != expected:
                raise ValueError(f"expected a new token and the rank {expected}")
        except (ValueError, binascii.Error) as error:
            found = shown(line.decode(errors="replace"))
            raise CheckpointError(f"{where}: line {number} is {found} ({error})") from error
        ranks[token] = len(ranks)
    if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise CheckpointError(
            f"{where}: no token for the byte 0x{missing[0]:02X}, expected one for each byte"
        )
    return ranks


def merges_of_ranks(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The pair that each token of several bytes is merged of last, in the order of the ranks.

    A token that falls into more than two parts has none.
    """
    found = []
    for token, rank in ranks.items():
        if len(token) > 1:
            parts = _parts(token, rank, ranks)
            if len(parts) == 2:
                found.append((parts[0], parts[1]))
    return found


def _parts(token: bytes, rank: int, ranks: dict[bytes, int]) -> list[bytes]:
    """What a token falls into if only tokens of lower ranks are merged, the lowest first."""
    parts = [token[at : at + 1] for at in range(len(token))]
    while len(parts) > 1:
        best, where = rank, -1
        for at, (left, right) in enumerate(pairwise(parts)):
            found = ranks.get(left + right, rank)
            if found < best:
                best, where = found, at
        if where < 0:
            break
        parts[where : where + 2] = [parts[where] + parts[where + 1]]
    return parts
