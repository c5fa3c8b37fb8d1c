"""A checkpoint's tokenizer as transformers loads it; no code of the checkpoint is run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from reap2gguf.checkpoint.config import read_optional
from reap2gguf.errors import CheckpointError
from reap2gguf.models.transformers_config import config_of_known_type
from reap2gguf.tokenizer.panics import panics_as
from reap2gguf.tokenizer.tokenizer_files import (
    RANKS_FILE,
    check_template_files,
    load_library,
    loaded_templates,
    tokenizer_path,
)


def load_in_transformers(folder: Path) -> Any:
    """The tokenizer of a folder, with its special tokens and chat templates.

    One that only code of the checkpoint can load is made of its ranks. Raises CheckpointError if
    there is no usable tokenizer.
    """
    check_template_files(folder)
    if tokenizer_path(folder).name == RANKS_FILE:
        return _of_ranks(folder)
    from transformers import AutoTokenizer

    how: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    config = config_of_known_type(read_optional(folder, "config.json"))
    if config is not None:
        how["config"] = config
    with panics_as(CheckpointError, f"{folder}: no usable tokenizer"):
        return AutoTokenizer.from_pretrained(folder, **how)


def _of_ranks(folder: Path) -> Any:
    from transformers import PreTrainedTokenizerFast

    library, config = load_library(folder), read_optional(folder, "tokenizer_config.json")
    named = {
        key: value.get("content") if isinstance(value, dict) else value
        for key, value in config.items()
        if key in ("bos_token", "eos_token", "unk_token", "pad_token")
    }
    special = {key: text for key, text in named.items() if isinstance(text, str)}
    with panics_as(CheckpointError, f"{folder}: no usable tokenizer"):
        found = PreTrainedTokenizerFast(tokenizer_object=library, **special)
        found.chat_template = loaded_templates(folder)
    return found
