"""Small tokenizers, llama.cpp's ids of a text, and a text of mixed languages."""

from __future__ import annotations

import ctypes
import json
import random
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import llama_cpp
from gguf import GGUFWriter

from reap2gguf.models.tokenizer_families import TokenizerFamily
from reap2gguf.tokenizer.byte_symbols import byte_symbols
from reap2gguf.tokenizer.gguf_keys import add_tokenizer

QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN35 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SMALL_SIZE = 257  # tokens of `tokenizer`: a, b, ab and the other bytes


def tokenizer(pattern: str = QWEN2, added: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    """A `tokenizer.json` as transformers writes it, of a (0), b (1), ab (2) and the other bytes."""
    others = [symbol for symbol in byte_symbols() if symbol not in "ab"]
    vocab = {text: index for index, text in enumerate(["a", "b", "ab", *others])}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added or [],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [split(pattern), byte_level(use_regex=False)],
        },
        "post_processor": None,
        "decoder": byte_level(),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": [["a", "b"]],
        },
    }


def split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def byte_level(use_regex: bool = True) -> dict[str, Any]:
    flags = {"add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}
    return {"type": "ByteLevel", **flags}


def added(index: Any, content: str, special: bool = False, **flags: bool) -> dict[str, Any]:
    """An entry of `added_tokens`."""
    usual = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": index, "content": content, **usual, "special": special, **flags}


def write(folder: Path, description: dict[str, Any]) -> Path:
    """Write `tokenizer.json` and a config with an end of text; the folder."""
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(description))
    (folder / "config.json").write_text('{"eos_token_id": 0}')
    return folder


@llama_cpp.llama_log_callback
def _silent(level: int, text: bytes, data: ctypes.c_void_p) -> None:
    """Print nothing."""


class LlamaCpp:
    """The tokenizer of a GGUF file that holds nothing else, in llama.cpp."""

    def __init__(self, vocabulary: Any, n_tokens: int) -> None:
        self._vocabulary, self.n_tokens = vocabulary, n_tokens

    def encode(self, text: str, add_special: bool = False) -> list[int]:
        data = text.encode()
        ids = (llama_cpp.llama_token * (len(data) + 8))()
        n = llama_cpp.llama_tokenize(
            self._vocabulary, data, len(data), ids, len(ids), add_special, True
        )
        assert n >= 0
        return list(ids[:n])

    def ends_at(self, index: int) -> bool:
        """Whether an answer ends at that token."""
        return bool(llama_cpp.llama_vocab_is_eog(self._vocabulary, index))


@contextmanager
def llama_cpp_tokenizer(
    folder: Path, vocab_size: int, family: TokenizerFamily
) -> Iterator[LlamaCpp]:
    """What llama.cpp makes of the tokenizer in `folder` as this package writes it."""
    writer = GGUFWriter(folder / "vocabulary.gguf", "qwen3moe")
    add_tokenizer(writer, folder, vocab_size, family)
    with loaded_by_llama_cpp(writer, folder / "vocabulary.gguf") as llama:
        yield llama


@contextmanager
def loaded_by_llama_cpp(writer: GGUFWriter, path: Path) -> Iterator[LlamaCpp]:
    """The file of a writer that has the keys of a tokenizer, loaded by llama.cpp."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    llama_cpp.llama_log_set(_silent, ctypes.c_void_p(0))
    parameters = llama_cpp.llama_model_default_params()
    parameters.vocab_only = True
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), parameters)
    assert model, f"llama.cpp does not load {path}"
    try:
        vocabulary = llama_cpp.llama_model_get_vocab(model)
        yield LlamaCpp(vocabulary, llama_cpp.llama_vocab_n_tokens(vocabulary))
    finally:
        llama_cpp.llama_model_free(model)
        path.unlink()


_RANGES = (
    (0x41, 0x5A), (0x61, 0x7A), (0x61, 0x7A), (0xC0, 0x24F), (0x370, 0x3FF), (0x400, 0x4FF),
    (0x531, 0x586), (0x5D0, 0x5EA), (0x5B0, 0x5BD), (0x620, 0x655), (0x905, 0x94D), (0x985, 0x9CD),
    (0xE01, 0xE4E), (0x10D0, 0x10F0), (0x1200, 0x1240), (0x1780, 0x17D3), (0x1E00, 0x1EFF),
    (0x3041, 0x3096), (0x30A1, 0x30FA), (0x4E00, 0x9FA5), (0xAC00, 0xD7A3), (0x20000, 0x2A6D6),
    (0x300, 0x36F), (0x2190, 0x22FF), (0x2600, 0x26FF), (0x1F300, 0x1F5FF), (0x1F600, 0x1F64F),
    (0x660, 0x669), (0x2150, 0x218B), (0xFF10, 0xFF19), (0xE000, 0xE0FF), (0xFDD0, 0xFDEF),
    (0x1F1E6, 0x1F1FF), (0x2010, 0x2027), (0x21, 0x2F), (0x3A, 0x40), (0x5B, 0x60), (0, 0x1F),
)  # fmt: skip
_PIECES = (
    "def f(x):\n    return x + 1\n", "for (int i = 0; i < n; ++i) {\n\ta[i]++;\n}\r\n", "<div>",
    '"k": [1, 2],', "I'm", "you'RE", "WE'LL", "don't", "'tis", "it's", "'D", "''", "3.14159",
    "http://a.b/c?d=e", "👩\u200d👩\u200d👧",
    "🏳️\u200d🌈", "👍🏽", "1️⃣", "\u200b", "\ufeff", "\u00ad",
    "<|im_start|>user\nhi<|im_end|>\n", "<|endoftext|>", "<|im_end", "<tool>", "1,000", "0xFF",
    "the quick brown fox", "The function returns a list of values",
)  # fmt: skip
_SPACES = (
    " ", " ", " ", " ", "  ", "    ", "\n", "\n\n", "\r\n", "\t", " \n", "\n ", "\u00a0",
    "\u3000", "\x0b",
)  # fmt: skip


def mixed_text(seed: int, length: int) -> str:
    """At least `length` characters of many languages, code, numbers, emoji and spaces, in NFC."""
    draw = random.Random(seed)
    parts: list[str] = []
    size = 0
    while size < length:
        kind = draw.randrange(10)
        if kind < 6:
            low, high = draw.choice(_RANGES)
            characters = (chr(draw.randint(low, high)) for _ in range(draw.randint(1, 8)))
            part = "".join(c for c in characters if _is_settled(c))
        elif kind < 7:
            part = str(draw.randrange(10 ** draw.randint(1, 12)))
        elif kind < 8:
            part = draw.choice("ab=-_#.a7é好 \n\t") * draw.randint(2, 40)
        else:
            part = draw.choice(_PIECES)
        parts += [part, draw.choice(_SPACES) if draw.random() < 0.7 else ""]
        size += len(parts[-1]) + len(part)
    return unicodedata.normalize("NFC", "".join(parts))


def _is_settled(char: str) -> bool:
    """Whether a character is assigned, or never will be: new versions of Unicode add others."""
    return unicodedata.category(char) != "Cn" or 0xFDD0 <= ord(char) <= 0xFDEF
