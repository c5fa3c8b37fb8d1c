"""What llama.cpp puts before each text, where a `tokenizer.json` leaves it to templates."""

from __future__ import annotations

from pathlib import Path

from reap2gguf.checkpoint.config import read_optional
from reap2gguf.models.tokenizer_families import tokenizer_family
from reap2gguf.tokenizer.character_bpe import is_sentencepiece
from reap2gguf.tokenizer.tokenizer_files import read_tokenizer_json


def forced_bos(folder: Path) -> str | None:
    """The token that llama.cpp puts before each text, though `tokenizer.json` may not; or None.

    The published files of Gemma-4 leave it to chat templates, but the models need it.
    """
    model_type = str(read_optional(folder, "config.json").get("model_type"))
    if not tokenizer_family(model_type.removesuffix("_text")).gemma:
        return None
    if not is_sentencepiece(read_tokenizer_json(folder)):
        return None
    named = read_optional(folder, "tokenizer_config.json").get("bos_token")
    text = named.get("content") if isinstance(named, dict) else named
    return text if isinstance(text, str) else None
