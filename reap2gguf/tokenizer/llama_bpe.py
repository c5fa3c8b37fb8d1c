"""llama.cpp's byte-level BPE, written again in Python: what token ids it gives for a text.

A plan must know this before anything is built, without llama.cpp: `llama-cpp-python` is optional,
ends the whole process where a vocabulary breaks one of its assertions, and its libggml cannot be
loaded beside the one that quantizes. Tests hold this module to llama.cpp itself.

Source: `llama_vocab::impl` in src/llama-vocab.cpp. Written from its behaviour, not its lines.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise

from reap2gguf.tokenizer.byte_symbols import byte_symbols
from reap2gguf.tokenizer.pre_tokenizers import PreTokenizer, split_words
from reap2gguf.tokenizer.special_split import SpecialTokens

_UNRANKED = 2**62


class LlamaBpe:
    """A vocabulary as llama.cpp loads it; takes memory of the size of the vocabulary.

    `types` are those of the header, and `merges` are pairs in the order of their ranks.
    """

    def __init__(
        self,
        tokens: Sequence[str],
        types: Sequence[int],
        merges: Iterable[tuple[str, str]],
        pre_tokenizer: PreTokenizer,
    ) -> None:
        self._ids = {text: index for index, text in enumerate(tokens)}
        self._ranks: dict[tuple[str, str], int] = {}
        for rank, pair in enumerate(merges):
            self._ranks.setdefault(pair, rank)
        self._pre = pre_tokenizer
        self._special = SpecialTokens(tokens, types)
        self._known: dict[str, list[int]] = {}  # words that were merged before

    def encode(self, text: str) -> list[int]:
        """Token ids of a text; special tokens in it are recognised, none is added."""
        ids: list[int] = []
        for piece in self._special.partition(text):
            if isinstance(piece, int):
                ids.append(piece)
                continue
            for word in split_words(piece, self._pre.splits):
                if word not in self._known:
                    self._known[word] = list(self._merge(word))
                ids += self._known[word]
        return ids

    def _merge(self, word: str) -> Iterator[int]:
        """The ids of one word: its bytes, merged as long as a pair has a rank."""
        symbols = byte_symbols()
        parts = [symbols[byte] for byte in word.encode()]
        whole = "".join(parts)
        if self._pre.ignore_merges and whole in self._ids:
            yield self._ids[whole]
            return
        while len(parts) > 1:
            ranks = [self._ranks.get(pair, _UNRANKED) for pair in pairwise(parts)]
            best = min(ranks)
            if best == _UNRANKED:
                break
            at = ranks.index(best)
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        for part in parts:
            if part in self._ids:
                yield self._ids[part]
            else:  # llama.cpp looks up each byte of the symbols: only ASCII ones can be found
                yield from (self._ids[char] for char in part if char in self._ids and char < "\x80")
