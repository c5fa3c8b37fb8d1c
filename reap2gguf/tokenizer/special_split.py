"""How llama.cpp finds special tokens in a text, whatever tokenizer takes what is between them."""

from __future__ import annotations

from collections.abc import Sequence

from gguf import TokenType

from reap2gguf.tokenizer.special_names import HIDES_S, SPECIAL_BY_NAME

_SPECIAL_TYPES = (TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.UNKNOWN)


class SpecialTokens:
    """The special tokens of a vocabulary, with the types of its header."""

    def __init__(self, tokens: Sequence[str], types: Sequence[int]) -> None:
        self._ids = {text: index for index, text in enumerate(tokens)}
        hidden = "</s>" if any(text in self._ids for text in HIDES_S) else None
        special = [
            text
            for text, kind in zip(tokens, types, strict=True)
            if (kind in _SPECIAL_TYPES or text in SPECIAL_BY_NAME) and text != hidden
        ]
        # the longest first; which of two equally long ones comes first is not defined
        self._special = sorted(special, key=lambda text: -len(text.encode()))

    def partition(self, text: str) -> list[str | int]:
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
