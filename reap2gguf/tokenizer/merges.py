"""The merges of a BPE model, as pairs of tokens in the order of their ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from reap2gguf.errors import CheckpointError
from reap2gguf.messages import shown
from reap2gguf.tokenizer.advice import RESAVE, RESAVE_ALL

Merge = tuple[str, str]


def merges_of(model: dict[str, Any], where: Path) -> list[Merge]:
    """The merges of a BPE model as pairs; CheckpointError if they are none."""
    merges = model.get("merges")
    if merges == []:
        raise CheckpointError(f"{where}: no merges; llama.cpp's byte-level BPE needs them")
    if not isinstance(merges, list):
        raise CheckpointError(f"{where}: merges are not a list of pairs of tokens; {RESAVE}")
    if len({type(merge) for merge in merges}) > 1:
        raise CheckpointError(f"{where}: merges have two forms, expected one; {RESAVE}")
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
    if not all(
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(part, str) for part in pair)
        for pair in pairs
    ):
        raise CheckpointError(f"{where}: merges are not a list of pairs of tokens; {RESAVE}")
    return [(left, right) for left, right in pairs]


def checked_merges(tokenizer: dict[str, Any], vocab: dict[str, int], path: Path) -> list[Merge]:
    """The same, each of two tokens of a vocabulary, which make one; CheckpointError if not."""
    merges = merges_of(tokenizer["model"], path)
    for rank, (left, right) in enumerate(merges):
        for text in (left, right, left + right):
            if text not in vocab:
                raise CheckpointError(
                    f"{path}: merge {rank} joins {shown(left)} and {shown(right)}, but "
                    f"{shown(text)} is not in the vocabulary; {RESAVE_ALL}"
                )
    return merges
