"""What a user should know of a tokenizer that is accepted: where programs still make other ids."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from reap2gguf.checkpoint.config import read_json
from reap2gguf.tokenizer.vocabulary import ORDINARY_IN_QWEN

if TYPE_CHECKING:
    from reap2gguf.tokenizer.vocabulary import Vocabulary

NFC_CAVEAT = (
    "transformers puts text into Unicode's form NFC first and llama.cpp does not: text in another "
    "form, such as e and U+0301 for é, gets other token ids there"
)
ORDINARY_CAVEAT = (
    f"the text {ORDINARY_IN_QWEN} is one token for llama.cpp, which takes that token of the "
    "vocabulary for a special one, and several tokens for transformers"
)
# transformers 5 builds these classes from the vocabulary and merges alone, and splits text in the
# class's own way, here by llama.cpp's name of it
_OWN_SPLITTING = {"Qwen2Tokenizer": "qwen2", "Qwen3_5Tokenizer": "qwen35"}
# these do what tokenizer.json says; a Llama one with byte-level text is loaded as the first
_AS_THE_FILE = ("TokenizersBackend", "PreTrainedTokenizer", "PythonBackend", "LlamaTokenizer")
# it takes this class whatever tokenizer_config.json says
_ALWAYS = {
    "qwen3_5_moe": "Qwen3_5Tokenizer",
    "qwen3_5_moe_text": "Qwen3_5Tokenizer",
}
_WITHOUT_A_NAME = "Qwen2Tokenizer"  # where neither config names a class


def tokenizer_caveats(folder: Path, pre: str, vocabulary: Vocabulary) -> tuple[str, ...]:
    """Differences that remain, one sentence each.

    `pre` is llama.cpp's name of the pre-tokenizer, `vocabulary` that of tokenizer.json. Raises
    CheckpointError if a config cannot be read.
    """
    found = [NFC_CAVEAT] if vocabulary.normalizes else []
    if vocabulary.hides_ordinary:
        found.append(ORDINARY_CAVEAT)
    name = _class_in_transformers(_optional(folder, "config.json"), folder)
    own = _OWN_SPLITTING.get(name)
    how = f"like {own}" if own else "in a way that is not known here"
    if name not in _AS_THE_FILE and own != pre:
        found.append(
            f"transformers 5 loads the tokenizer as {name}, which splits text {how}, but "
            f"tokenizer.json splits it like {pre}; calibration and GGUF follow tokenizer.json; if "
            "that was saved by mistake, use the one of the base model"
        )
    return tuple(found)


def _class_in_transformers(config: dict[str, Any], folder: Path) -> str:
    """The name of the class that transformers 5 takes for a tokenizer of Qwen's."""
    model_type = config.get("model_type")
    if isinstance(model_type, str) and model_type in _ALWAYS:
        return _ALWAYS[model_type]
    settings = _optional(folder, "tokenizer_config.json")
    name = settings.get("tokenizer_class") or config.get("tokenizer_class") or _WITHOUT_A_NAME
    name = str(name).removesuffix("Fast")
    return name if name.isidentifier() else "another class"  # it is printed on the model card


def _optional(folder: Path, name: str) -> dict[str, Any]:
    path = folder / name
    return read_json(path) if path.is_file() else {}
