"""What tokenizers a family of models has, and what llama.cpp calls their ways of splitting text.

A pattern alone does not tell: llama3's has the names llama-bpe, glm4 and lfm2, of which each does
something else. So the family says which name its patterns have. Sources: llama.cpp's converter
(conversion/*.py) for the names and the special tokens, and the tokenizer.json files of published
models for the patterns.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

# The steps by which a tokenizer.json splits text, each as a regular expression (`split_patterns` in
# tokenizer/steps.py) -> llama.cpp's name of that splitting
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
# as Qwen's, but up to three digits are one word
_LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_STEPS = (_LLAMA3_PATTERN,)
# what a ByteLevel step splits by, if it does
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
ONE_DIGIT, ALL_DIGITS = r"\p{N}", r"\p{N}+"  # a Digits step: each by itself, or together
_DEEPSEEK_V3_PATTERN = (
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+"
    r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEEPSEEK_V3_STEPS = (r"\p{N}{1,3}", "[一-龥\u3040-ゟ゠-ヿ]+", _DEEPSEEK_V3_PATTERN)
# letters of the scripts that have upper and lower case, as the tokenizers of DeepSeek list them
DEEPSEEK_LETTERS = (
    "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-"
    "ὅὈ-Ὅὐ-ὗὙὛὝὟ-\u1f7dᾀ-ᾴᾶ-ᾼ\u1fbeῂ-ῄῆ-ῌῐ-\u1fd3ῖ-\u1fdbῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤ\u2126ℨ\u212a-ℭ"
    "ℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃"
)
DEEPSEEK_LLM_STEPS = (
    r"[\r\n]",
    rf"\s?[{DEEPSEEK_LETTERS}]+",
    "\\s?[!-/:-~！-／：-～‘-‟\u3000-。]+",
    r"\s+$",
    "[一-龥ࠀ-一가-\ud7ff]+",
    ONE_DIGIT,
)
_KIMI_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_KIMI_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_KIMI_END = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_KIMI_PATTERN = (
    r"[\p{Han}]+"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_KIMI_UPPER}*{_KIMI_LOWER}+{_KIMI_END}"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_KIMI_UPPER}+{_KIMI_LOWER}*{_KIMI_END}"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
KIMI_STEPS = (_KIMI_PATTERN,)
# that of GPT-4o
_O200K_LOWER, _O200K_UPPER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]", r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_O200K_PATTERN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_O200K_UPPER}*{_O200K_LOWER}+{_KIMI_END}"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_O200K_UPPER}+{_O200K_LOWER}*{_KIMI_END}"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
O200K_STEPS = (_O200K_PATTERN,)
# that of Mistral's Tekken: the same without contractions, and every digit is a word
_TEKKEN_PATTERN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_O200K_UPPER}*{_O200K_LOWER}+"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_O200K_UPPER}+{_O200K_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN_STEPS = (_TEKKEN_PATTERN,)


@dataclass(frozen=True)
class TokenizerFamily:
    """What the tokenizers of a family may be.

    Attributes:
        pre_tokenizers: The ways of splitting text that they may have, with llama.cpp's names.
        added_special: llama.cpp's name of a splitting -> special tokens by their kind, such as
            `eot`, that a header names where the checkpoint's files name none of that kind.
        replaced_special: Special tokens by kind that a header names whatever the files say.
        prefix: Tokens that a tokenizer.json may put before a text, of which llama.cpp puts the
            first, as it knows no more than one.
        space_prefix: Whether a header repeats `add_prefix_space` of tokenizer_config.json, as
            llama.cpp's converter does for Llama and what it derives from it.
        sentencepiece: Whether they may also be SentencePiece models, which split no text.
        gemma: Whether they may also be such models with ranks of merges, as Gemma-4 has them.
        end_by_name: Whether the end of a text is the `eos_token` of tokenizer_config.json, and not
            the id in config.json, where the vocabulary is a file of ranks.
        may_overlap: Whether published ones have added tokens that overlap in a text, such as
            `]~b]` and `]!d~[`: their users are told of it, and others are refused.
    """

    pre_tokenizers: PreTokenizers
    added_special: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    replaced_special: Mapping[str, str] = field(default_factory=dict)
    prefix: tuple[str, ...] = ()
    space_prefix: bool = False
    sentencepiece: bool = False
    gemma: bool = False
    end_by_name: bool = False
    may_overlap: bool = False


QWEN = TokenizerFamily(QWEN_PRE_TOKENIZERS)
# <|endoftext|> as the end of a turn makes answers endless, so llama.cpp's converter names others
_GLM_SPECIAL = {
    "bos": "[gMASK]",
    "eot": "<|user|>",
    "unk": "<|endoftext|>",
    "eom": "<|observation|>",
}
_GLM = TokenizerFamily({LLAMA3_STEPS: "glm4"}, {"glm4": _GLM_SPECIAL}, prefix=("[gMASK]", "<sop>"))
_DEEPSEEK = TokenizerFamily(
    {
        DEEPSEEK_V3_STEPS: "deepseek-v3",
        DEEPSEEK_LLM_STEPS: "deepseek-llm",
        KIMI_STEPS: "kimi-k2",
    }
)
_GRANITE = TokenizerFamily({(ONE_DIGIT, GPT2_PATTERN): "refact"}, space_prefix=True)
# by `model_type`, where a family has more than what means one thing only
_FAMILIES: Mapping[str, TokenizerFamily] = {
    "gemma4": TokenizerFamily({}, gemma=True),
    "glm4_moe": _GLM,
    "glm4_moe_lite": _GLM,
    "gpt_oss": TokenizerFamily({O200K_STEPS: "gpt-4o"}),
    "lfm2_moe": TokenizerFamily({LLAMA3_STEPS: "lfm2"}),
    "deepseek_v2": _DEEPSEEK,
    "deepseek_v3": _DEEPSEEK,
    "kimi_linear": TokenizerFamily({KIMI_STEPS: "kimi-k2"}, end_by_name=True),
    "ernie4_5_moe": TokenizerFamily({}, space_prefix=True, sentencepiece=True),
    "olmoe": TokenizerFamily({(GPT2_PATTERN,): "olmo"}),
    "granitemoe": _GRANITE,
    "granitemoeshared": _GRANITE,
    "minimax_m2": TokenizerFamily({O200K_STEPS: "minimax-m2"}, may_overlap=True),
    "mixtral": TokenizerFamily({}, space_prefix=True, sentencepiece=True),
    # llama.cpp's converter says pixtral, under which llama.cpp splits as llama3's pattern does
    "nemotron_h": TokenizerFamily({TEKKEN_STEPS: "tekken"}),
    "qwen3_omni_moe": TokenizerFamily(
        {}, replaced_special={"bos": "<|im_end|>", "eos": "<|im_end|>"}
    ),
}


def tokenizer_family(model_type: str) -> TokenizerFamily:
    """What the tokenizers of models of a `model_type` may be: its own ways, and those of Qwen."""
    own = _FAMILIES.get(model_type, QWEN)
    return replace(own, pre_tokenizers={**QWEN_PRE_TOKENIZERS, **own.pre_tokenizers})


def known_patterns() -> frozenset[tuple[str, ...]]:
    """The ways of splitting text that the tokenizers of any family have."""
    own = (pattern for family in _FAMILIES.values() for pattern in family.pre_tokenizers)
    return frozenset([*QWEN_PRE_TOKENIZERS, *own])
