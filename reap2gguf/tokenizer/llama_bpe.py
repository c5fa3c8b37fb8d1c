"""llama.cpp's byte-level BPE, written again in Python: what token ids it gives for a text.

A plan must know this before anything is built, without llama.cpp: `llama-cpp-python` is optional,
ends the whole process where a vocabulary breaks one of its assertions, and its libggml cannot be
loaded beside the one that quantizes. Tests hold this module to llama.cpp itself.

Source: `llama_vocab::impl` in src/llama-vocab.cpp. Written from its behaviour, not its lines.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise

from gguf import TokenType

from reap2gguf.tokenizer.byte_symbols import byte_symbols
from reap2gguf.tokenizer.pre_tokenizers import PreTokenizer, split_words
from reap2gguf.tokenizer.vocabulary import HIDES_S, SPECIAL_BY_NAME

_UNRANKED = 2**62
_SPECIAL_TYPES = (TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.UNKNOWN)


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
        hidden = "</s>" if any(text in self._ids for text in HIDES_S) else None
        special = [
            text
            for text, kind in zip(tokens, types, strict=True)
            if (kind in _SPECIAL_TYPES or text in SPECIAL_BY_NAME) and text != hidden
        ]
        # the longest first; which of two equally long ones comes first is not defined
        self._special = sorted(special, key=lambda text: -len(text.encode()))
        self._known: dict[str, list[int]] = {}  # words that were merged before

    def encode(self, text: str) -> list[int]:
        """Token ids of a text; special tokens in it are recognised, none is added."""
        ids: list[int] = []
        for piece in self._partition(text):
            if isinstance(piece, int):
                ids.append(piece)
                continue
            for word in split_words(piece, self._pre.splits):
                if word not in self._known:
                    self._known[word] = list(self._merge(word))
                ids += self._known[word]
        return ids

    def _partition(self, text: str) -> list[str | int]:
        """Text between special tokens, and their ids: each token takes what earlier ones left."""
        pieces: list[str | int] = [text] if text else []
        for special in self._special:
            if special not in text:
                continue
            index = self._ids[special]
            cut: list[str | int] = []
            for piece in pieces:
                if isinstance(piece, int) or special not in piece:
                    cut.append(piece)
                    continue
                first, *others = piece.split(special)
                cut.append(first)
                for other in others:
                    cut += [index, other]
            pieces = [piece for piece in cut if piece != ""]
        return pieces

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
