"""llama.cpp's SentencePiece tokenizer, written again in Python: what token ids it gives for a text.

As `llama_bpe.py` for byte-level BPE: a plan compares these ids with those of the tokenizers library
before anything is built. Source: `llm_tokenizer_spm_session` in src/llama-vocab.cpp. Written from
its behaviour, not its lines.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence

from reap2gguf.tokenizer.character_bpe import SPACE
from reap2gguf.tokenizer.special_split import SpecialTokens


class LlamaSpm:
    """A vocabulary as llama.cpp loads it: tokens by id with their types and scores.

    `space_prefix` says whether a space is put before each text, and after each special token.
    """

    def __init__(
        self,
        tokens: Sequence[str],
        types: Sequence[int],
        scores: Sequence[float],
        space_prefix: bool,
    ) -> None:
        self._ids = {text: index for index, text in enumerate(tokens)}
        self._scores = scores
        self._prefix = SPACE if space_prefix else ""
        self._special = SpecialTokens(tokens, types)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text; special tokens in it are recognised, none is added."""
        ids: list[int] = []
        prefix = self._prefix
        for piece in self._special.partition(text):
            if isinstance(piece, int):
                ids.append(piece)
                prefix = self._prefix
                continue
            for symbol in self._merged(prefix + piece.replace(" ", SPACE)):
                if symbol in self._ids:
                    ids.append(self._ids[symbol])
                else:
                    ids += [self._ids[f"<0x{byte:02X}>"] for byte in symbol.encode()]
            prefix = ""
        return ids

    def _merged(self, text: str) -> Iterator[str]:
        """Characters, two joined as long as they are a token: the best score first, then left."""
        symbols: list[str] = list(text)
        before = [index - 1 for index in range(len(symbols))]
        after = [index + 1 for index in range(len(symbols))]
        queue: list[tuple[float, int, int, int]] = []

        def offer(left: int, right: int) -> None:
            if left < 0 or right >= len(symbols):
                return
            joined = symbols[left] + symbols[right]
            index = self._ids.get(joined)
            if index is not None:
                heapq.heappush(queue, (-self._scores[index], left, right, len(joined)))

        for left in range(len(symbols) - 1):
            offer(left, left + 1)
        while queue:
            _, left, right, size = heapq.heappop(queue)
            one, other = symbols[left], symbols[right]
            if not one or not other or len(one) + len(other) != size:
                continue
            symbols[left], symbols[right] = one + other, ""
            after[left] = after[right]
            if after[right] < len(symbols):
                before[after[right]] = left
            offer(before[left], left)
            offer(left, after[left])
        return (symbol for symbol in symbols if symbol)
