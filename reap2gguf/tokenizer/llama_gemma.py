"""llama.cpp's tokenizer of Gemma-4, written again in Python: what token ids it gives for a text.

As `llama_bpe.py` for byte-level BPE: a plan compares these ids with those of the tokenizers library
before anything is built. Source: `llama_vocab::impl` in src/llama-vocab.cpp, for the pre-tokenizer
`gemma4`. Written from its behaviour, not its lines.
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Iterable, Iterator, Sequence

from reap2gguf.tokenizer.character_bpe import SPACE
from reap2gguf.tokenizer.special_split import SpecialTokens

_LINES = re.compile(r"[^\n]+|\n+")


class LlamaGemma:
    """A vocabulary as llama.cpp loads it; `merges` are pairs in the order of their ranks."""

    def __init__(
        self, tokens: Sequence[str], types: Sequence[int], merges: Iterable[tuple[str, str]]
    ) -> None:
        self._ids = {text: index for index, text in enumerate(tokens)}
        self._ranks = {pair: rank for rank, pair in enumerate(merges)}
        self._special = SpecialTokens(tokens, types)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text; special tokens in it are recognised, none is added."""
        ids: list[int] = []
        for piece in self._special.partition(text):
            if isinstance(piece, int):
                ids.append(piece)
                continue
            for word in _LINES.findall(piece.replace(" ", SPACE)):
                ids += self._word(word)
        return ids

    def _word(self, word: str) -> Iterator[int]:
        """The ids of one line, or of the line breaks between two."""
        if not word.strip("\n") and word in self._ids:
            yield self._ids[word]
            return
        for symbol in self._merged(word):
            if symbol in self._ids:
                yield self._ids[symbol]
                continue
            for byte in symbol.encode():
                yield self._ids[f"<0x{byte:02X}>"]

    def _merged(self, word: str) -> Iterator[str]:
        """Characters, two joined as long as a pair has a rank: the lowest first, then left."""
        symbols: list[str] = list(word)
        before = [index - 1 for index in range(len(symbols))]
        after = [index + 1 for index in range(len(symbols))]
        queue: list[tuple[int, int, int, str, str]] = []

        def offer(left: int, right: int) -> None:
            if left < 0 or right >= len(symbols):
                return
            pair = symbols[left], symbols[right]
            if (rank := self._ranks.get(pair)) is not None:
                heapq.heappush(queue, (rank, left, right, *pair))

        for left in range(len(symbols) - 1):
            offer(left, left + 1)
        while queue:
            _, left, right, *pair = heapq.heappop(queue)
            # either may have been joined with another since
            if [symbols[left], symbols[right]] != pair or after[left] != right:
                continue
            symbols[left], symbols[right] = "".join(pair), ""
            after[left] = after[right]
            if after[right] < len(symbols):
                before[after[right]] = left
            offer(before[left], left)
            offer(left, after[left])
        return (symbol for symbol in symbols if symbol)
