"""What llama.cpp calls the split patterns that the tokenizers of a family have.

A pattern alone does not tell: llama3's has the names llama-bpe, glm4 and lfm2, of which each does
something else. So the family says which name its patterns have.
"""

from __future__ import annotations

from collections.abc import Mapping

# regular expressions by which a tokenizer.json splits text -> llama.cpp's name of that splitting
PreTokenizers = Mapping[tuple[str, ...], str]

# the two patterns of Qwen's tokenizers differ only in how they treat marks (\p{M})
_QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN35_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_PRE_TOKENIZERS: PreTokenizers = {
    (_QWEN2_PATTERN,): "qwen2",
    (_QWEN35_PATTERN,): "qwen35",
}

# by `model_type`, where a family has names of its own besides those that mean one thing only
_FAMILIES: Mapping[str, PreTokenizers] = {}


def pre_tokenizers_of(model_type: str) -> PreTokenizers:
    """The split patterns that tokenizers of a family may have, and llama.cpp's name of each."""
    return {**QWEN_PRE_TOKENIZERS, **_FAMILIES.get(model_type, {})}
