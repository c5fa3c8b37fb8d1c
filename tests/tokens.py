"""The example's tokenizer, whole or with its first tokens only, for tiny models."""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
EXAMPLE = REPOSITORY / "examples" / "tiny-qwen3-moe"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
FULL_VOCAB = 4096  # of the example
# Reading and writing 4096 tokens, and their embeddings, took half of the time of a tiny build.
SMALL_VOCAB = 512
_FEWEST = 256 + 3  # bytes and special tokens


def n_tokens(vocab: int) -> int:
    """The tokens of the tokenizer that `write_tokenizer` writes for a model of `vocab` ids."""
    return vocab if _FEWEST <= vocab < FULL_VOCAB else FULL_VOCAB


def special_tokens(vocab: int) -> dict[str, int]:
    """Keys of a config for the special tokens; none for a vocabulary that does not have them."""
    keys = ("bos_token_id", "eos_token_id", "pad_token_id")
    return dict.fromkeys(keys, n_tokens(vocab) - 3) if vocab >= n_tokens(vocab) else {}


def write_tokenizer(folder: Path, vocab: int) -> None:
    """Write the tokenizer of a model of `vocab` ids; its special tokens have the last ids.

    A vocabulary that is too small for bytes and special tokens gets the whole tokenizer.
    """
    for name in TOKENIZER_FILES:
        shutil.copyfile(EXAMPLE / name, folder / name)
    if n_tokens(vocab) < FULL_VOCAB:
        (folder / "tokenizer.json").write_text(_with_first_tokens(vocab), encoding="utf-8")


@cache
def _with_first_tokens(n_tokens: int) -> str:
    whole = json.loads((EXAMPLE / "tokenizer.json").read_text(encoding="utf-8"))
    added, model = whole["added_tokens"], whole["model"]
    n_plain = n_tokens - len(added)
    model["vocab"] = {token: i for token, i in model["vocab"].items() if i < n_plain}
    model["merges"] = [pair for pair in model["merges"] if "".join(pair) in model["vocab"]]
    for number, token in enumerate(added):
        token["id"] = n_plain + number
    return json.dumps(whole, indent=2, ensure_ascii=False)
