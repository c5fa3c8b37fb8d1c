"""Tokenizes a text of hard cases as transformers does and as llama.cpp does, and compares the ids.

The other checks of this package compare a tokenizer with forms that are known. This one needs no
list: it shows in less than a second that the two programs agree, whatever the files say.
All texts are in NFC, since llama.cpp does not normalize; see `caveats`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gguf import TokenType
from tokenizers import Tokenizer as Library

from reap2gguf.checkpoint.config import MAX_TOKENIZER_BYTES, read_json
from reap2gguf.errors import CheckpointError, UnsupportedModelError
from reap2gguf.messages import shown
from reap2gguf.tokenizer.added_tokens import AddedToken, is_nfc
from reap2gguf.tokenizer.byte_symbols import byte_symbols
from reap2gguf.tokenizer.character_bpe import SPACE
from reap2gguf.tokenizer.llama_bpe import LlamaBpe
from reap2gguf.tokenizer.llama_gemma import LlamaGemma
from reap2gguf.tokenizer.llama_spm import LlamaSpm
from reap2gguf.tokenizer.panics import panics_as
from reap2gguf.tokenizer.pre_tokenizers import PRE_TOKENIZERS, is_settled, split_words
from reap2gguf.tokenizer.sentencepiece import SPACE_FIRST, SpmVocabulary
from reap2gguf.tokenizer.special_names import SPECIAL_BY_NAME
from reap2gguf.tokenizer.tokenizer_files import load_library

if TYPE_CHECKING:
    from reap2gguf.tokenizer.gemma import GemmaVocabulary
    from reap2gguf.tokenizer.vocabulary import Vocabulary

HARD_CASES = (
    # languages
    "The quick brown fox: naïve café, Übergröße, garçon, coöperate, Ærøskøbing, İstanbul ışık.",
    "Съешь же ещё этих мягких французских булок. Ξεσκεπάζω την ψυχοφθόρα βδελυγμία.",
    "我想在apple工作1314151天～，今天天气很好。",
    "日本語のテキスト、カタカナとひらがな。한국어 문장입니다!",
    "אני יכול לאכול זכוכית בְּרֵאשִׁית بِسْمِ ٱللَّٰهِ مرحبا بالعالم فارسی",
    "मैं हिन्दी बोलता हूँ বাংলা ভাষা தமிழ் మాతృభాష ಕನ್ನಡ",
    "ภาษาไทยไม่มีช่องว่าง កាន់តែពិសេសអាច မြန်မာ བོད་ཡིག",
    "Tiếng Việt có dấu: ếỗựặ. ქართული Հայերեն አማርኛ ᏣᎳᎩ ᚠᚢᚦ ሰላም",
    # marks that have no composed form, alone and after what they cannot join
    "x\u0301q\u0323w\u0304 q\u0302\u0303 \u0301 1\u0301 !\u0301 \u20dd a\u20dd \u0e33\u0e4d",
    # numbers of all kinds, and long runs
    "3 33 333 3333 33333 333333 3.14 1,000,000 -7e-9 0x1F ½ ² Ⅷ ٣٤٥ १२३ 一二三 ①② 1a2b3c",
    "7" * 70 + " " + "a" * 70 + " " + "=" * 70 + "A" * 33 + "é" * 33 + "好" * 33,
    # contractions, in both cases and cut off
    "I'm you're he's we've they'll she'd don't 'tis I'M YOU'RE HE'S WE'VE THEY'LL SHE'D DON'T 'Re",
    "'s'S's 'sa 're'r 'l 'll 'L'LL 've'v ' '' ''s x'x'd'D'm'M't'T ’s don’t 'é '1 '\n's",
    # spaces, lines and tabs
    " a  b   c    d \t e\t\tf \t\t g\u00a0h \u00a0i\u2003\u2003j\u3000k \u200bl\u2028m\u2029n\x85o",
    "a\nb\n\nc\n\n\nd\r\ne\r\r\nf\n\rg \n h\n \n i \r\n \t j!\n!\r\n?\n\n ! \n  \n   \n    k  ",
    "   lead",
    "trail   ",
    " ",
    "  ",
    "\n",
    "\n ",
    " \n",
    "\r",
    "\t",
    "\x0b\x0c\x1c\x1f x\x00y\x7f",
    # code and markup
    'def f(x: int) -> str:\n    return f"{x!r:>{8}}"  # a comment\n\n\nclass A(B): pass\n',
    "for(int i=0;i<n;++i){a[i]+=b[i]*2;}\n\tif (x && !y || z) { return *p->q; } // ok\r\n",
    '<div class="a">&amp;</div> {"k": [1, null, true]} https://example.org/a_b?c=d&e=%20#f \\n',
    "SELECT * FROM t WHERE a <> 'it''s' AND b >= 1.0; -- $x @y #z ^~`|\\/ _under_score CamelCase",
    # emoji: joined, with variation selectors, skin tones, flags
    "🚀 (normal) 😶\u200d🌫️ ✅ 🦙🦙 👩\u200d👩\u200d👧\u200d👦 🏳️\u200d🌈 👍🏽 🇩🇪🇯🇵 ☺️ ©️ 1️⃣ ‼",
    # private use, noncharacters, format characters, the last code points
    "\ue000\uf8ff a\ue001b \U000f0000\U0010fffd \ufdd0\uffff\U0001ffff\U0010ffff \ufeff\u2060",
    "∑∫√≠ €£¥₿ «»„“”… – — • § ¶ ℃",
    "𝔘𝔫𝔦 𝒞 ＦＵＬＬ ｶﾀ ﬁ",
    "ǅ ʰ ª º ͵",
)
_MOST_TOKENS = 400  # of the vocabulary, drawn evenly
_MOST_ADDED = 60
_LONGEST = 200  # characters of an added token that are put into other text


def check_against_library(vocabulary: Vocabulary, path: Path, pre: str) -> None:
    """Refuse a tokenizer whose ids differ between the tokenizers library and llama.cpp.

    `path` is the `tokenizer.json` that `vocabulary` is of, `pre` llama.cpp's name of its
    pre-tokenizer. Raises CheckpointError if the library cannot load the file or numbers its tokens
    otherwise, and UnsupportedModelError that names the first text with other words or ids.
    """
    library = load_library(path.parent)
    with panics_as(CheckpointError, f"{path}: no usable tokenizer"):
        n_tokens = library.get_vocab_size(with_added_tokens=True)
        ids = {token.text: library.token_to_id(token.text) for token in vocabulary.added}
    _check_ids(vocabulary, ids, n_tokens, path)
    _check_joined(vocabulary, pre, path)
    for text in HARD_CASES:
        if PRE_TOKENIZERS[pre].differs is None:
            _compare(text, _words(library, text, path), _llama_words(text, pre), path)
    ours = LlamaBpe(vocabulary.tokens, vocabulary.types, vocabulary.merges, PRE_TOKENIZERS[pre])
    texts = [*HARD_CASES, *_from_vocabulary(vocabulary), *_with_added(vocabulary.added)]
    other = vocabulary.unreached if PRE_TOKENIZERS[pre].differs else frozenset()
    for text in [*texts, "\n".join(texts)]:
        if PRE_TOKENIZERS[pre].differs and _words(library, text, path) != _llama_words(text, pre):
            continue  # the user is told where
        with panics_as(CheckpointError, f"{path}: the tokenizer fails on a text"):
            theirs = library.encode(text, add_special_tokens=False).ids
        if other.isdisjoint(theirs):
            _compare(text, theirs, ours.encode(text), path)


def check_spm_against_library(vocabulary: SpmVocabulary, path: Path) -> None:
    """Refuse a SentencePiece tokenizer of which the library and llama.cpp make different ids.

    Compared is how characters are joined, with a space put before each text as llama.cpp does it;
    the user is told where the file does that otherwise. Raises as `check_against_library` does.
    """
    description = read_json(path, MAX_TOKENIZER_BYTES) | SPACE_FIRST[vocabulary.space_prefix]
    with panics_as(CheckpointError, f"{path}: no usable tokenizer"):
        library = Library.from_str(json.dumps(description))
        library.no_padding()
        library.no_truncation()
        n_tokens = library.get_vocab_size(with_added_tokens=True)
        ids = {token.text: library.token_to_id(token.text) for token in vocabulary.added}
    _check_ids(vocabulary, ids, n_tokens, path)
    ours = LlamaSpm(vocabulary.tokens, vocabulary.types, vocabulary.scores, vocabulary.space_prefix)
    _compare_texts(vocabulary, library, ours, path)


def check_gemma_against_library(vocabulary: GemmaVocabulary, path: Path) -> None:
    """The same of a tokenizer of Gemma-4."""
    library = load_library(path.parent)
    with panics_as(CheckpointError, f"{path}: no usable tokenizer"):
        n_tokens = library.get_vocab_size(with_added_tokens=True)
        ids = {token.text: library.token_to_id(token.text) for token in vocabulary.added}
    _check_ids(vocabulary, ids, n_tokens, path)
    ours = LlamaGemma(vocabulary.tokens, vocabulary.types, vocabulary.merges)
    _compare_texts(vocabulary, library, ours, path)


def _compare_texts(
    vocabulary: SpmVocabulary | GemmaVocabulary,
    library: Library,
    ours: LlamaSpm | LlamaGemma,
    path: Path,
) -> None:
    """Compare the ids of hard cases, of tokens of the vocabulary and of added tokens."""
    normal = [
        text.replace(SPACE, " ")
        for text, kind in zip(vocabulary.tokens, vocabulary.types, strict=True)
        if kind == TokenType.NORMAL
    ]
    drawn = [text for text in normal[:: len(normal) // _MOST_TOKENS + 1] if is_settled(text)]
    texts = [*HARD_CASES, *drawn, " ".join(drawn), *_with_added(vocabulary.added)]
    for text in [*texts, "\n".join(texts)]:
        with panics_as(CheckpointError, f"{path}: the tokenizer fails on a text"):
            theirs = library.encode(text, add_special_tokens=False).ids
        _compare(text, theirs, ours.encode(text), path)


def _check_ids(
    vocabulary: Vocabulary | SpmVocabulary | GemmaVocabulary,
    in_library: dict[str, int | None],
    n_tokens: int,
    path: Path,
) -> None:
    """Compare the ids of added tokens with those that the library gives them.

    It numbers them by itself, one after another, and takes no notice of their ids.
    """
    for token in vocabulary.added:
        if in_library[token.text] != token.index:
            raise CheckpointError(
                f"{path}: token {shown(token.text)} has the id {token.index}, and the tokenizers "
                f"library gives it {in_library[token.text]}: ids of added tokens must follow the "
                "vocabulary without gaps, in order; load the tokenizer with transformers and save "
                "it with save_pretrained()"
            )
    expected = len(vocabulary.types) - vocabulary.types.count(TokenType.UNUSED)
    if n_tokens != expected:
        raise CheckpointError(
            f"{path}: the tokenizers library finds {n_tokens:,} tokens, expected {expected:,}; "
            "load the tokenizer with transformers and save it with save_pretrained()"
        )


def _check_joined(vocabulary: Vocabulary, pre: str, path: Path) -> None:
    """Refuse a token that llama.cpp could make where the library splits text before it."""
    pattern = PRE_TOKENIZERS[pre].joins
    if pattern is None:
        return
    bytes_of = {symbol: byte for byte, symbol in enumerate(byte_symbols())}
    for left, right in vocabulary.merges:
        text = bytes(bytes_of[symbol] for symbol in left + right).decode(errors="replace")
        n_together = len(split_words(text, (f"(?:{pattern})+",)))
        if n_together == 1 < len(split_words(text, (pattern,))):
            raise UnsupportedModelError(
                f"{path}: has the token {shown(text)}, but splits text by {pattern} before, which "
                f"llama.cpp's {pre} does not, expected no such token; use the tokenizer.json of "
                "the model that this one was made from"
            )


def _words(library: Library, text: str, path: Path) -> list[str]:
    """The words that the library merges each by itself, in symbols of bytes."""
    with panics_as(CheckpointError, f"{path}: the tokenizer fails on a text"):
        if library.normalizer is not None:
            text = library.normalizer.normalize_str(text)
        if library.pre_tokenizer is None:
            return [text]
        return [word for word, _ in library.pre_tokenizer.pre_tokenize_str(text)]


def _llama_words(text: str, pre: str) -> list[str]:
    """The words of llama.cpp, in symbols of bytes, split where only the library splits too."""
    kind = PRE_TOKENIZERS[pre]
    splits = kind.splits if kind.joins is None else (*kind.splits, kind.joins)
    return [_as_symbols(word) for word in split_words(text, splits)]


def _as_symbols(word: str) -> str:
    symbols = byte_symbols()
    return "".join(symbols[byte] for byte in word.encode())


def _from_vocabulary(vocabulary: Vocabulary) -> Iterator[str]:
    """Texts of some tokens of the vocabulary, each alone and all after one another."""
    bytes_of = {symbol: byte for byte, symbol in enumerate(byte_symbols())}
    normal = [
        text
        for text, kind in zip(vocabulary.tokens, vocabulary.types, strict=True)
        if kind == TokenType.NORMAL
    ]
    found = []
    for token in normal[:: len(normal) // _MOST_TOKENS + 1]:
        text = bytes(bytes_of[symbol] for symbol in token).decode(errors="replace")
        known = "\ufffd" not in text and is_nfc(text) and is_settled(text)
        if known and text not in SPECIAL_BY_NAME:  # see ORDINARY_IN_QWEN
            found.append(text)
    yield from found
    # a space between: a mark at the beginning of one would join the end of another
    yield " ".join(found)


def _with_added(added: list[AddedToken]) -> Iterator[str]:
    """Texts with added tokens in them: between words and spaces, twice, and cut off."""
    for token in added[:: len(added) // _MOST_ADDED + 1]:
        it = token.text
        text = f"a{it}b {it} 1{it}{it}\n{it}\n {it[:-1]} {it[1:]} '{it}s  {it}"
        if len(it) <= _LONGEST and is_nfc(text):
            yield text


def _compare(text: str, theirs: list[Any], ours: list[Any], path: Path) -> None:
    """Refuse a text of which transformers and llama.cpp make other words, or other ids."""
    if theirs == ours:
        return
    shared = zip(theirs, ours, strict=False)
    at = next((i for i, (a, b) in enumerate(shared) if a != b), min(len(theirs), len(ours)))
    raise UnsupportedModelError(
        f"{path}: llama.cpp would tokenize {shown(text)} as {shown(ours[at : at + 4])} where "
        f"transformers has {shown(theirs[at : at + 4])} (position {at}), so nothing is written; "
        "use the tokenizer.json of the model that this one was made from"
    )
