"""The split patterns of tokenizers, and llama.cpp's names of them."""

from __future__ import annotations

from collections.abc import Mapping

# the two patterns of Qwen's tokenizers differ only in how they treat marks (\p{M})
_QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN35_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_PRE_TOKENIZERS: Mapping[tuple[str, ...], str] = {
    (_QWEN2_PATTERN,): "qwen2",
    (_QWEN35_PATTERN,): "qwen35",
}
