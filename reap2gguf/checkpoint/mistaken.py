"""What a folder without `config.json` is, so that the error says what to pass instead of it."""

from __future__ import annotations

from pathlib import Path

from reap2gguf.checkpoint.config import read_json
from reap2gguf.errors import CheckpointError
from reap2gguf.messages import shown

ADAPTER_CONFIG = "adapter_config.json"


def what_to_pass(folder: Path) -> str:
    """What the folder is, and what the user has to pass in its place."""
    if (folder / ADAPTER_CONFIG).is_file():
        return (
            f"this is an adapter of {_base_model(folder)}, not a model; merge it into that model "
            "(PEFT's merge_and_unload, then save_pretrained) and pass the merged folder"
        )
    if any(folder.glob("*.gguf")):
        return "it holds GGUF files; pass one of them, of several parts the first"
    if (folder / "snapshots").is_dir():
        return (
            "this is a model's folder in the Hub's cache; pass owner/name, or the folder of a "
            "commit in snapshots/"
        )
    return "this is not a Hugging Face checkpoint"


def _base_model(folder: Path) -> str:
    """The base model that an adapter names."""
    try:
        name = read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
    except CheckpointError:
        name = None  # the message that is being made says what is wrong without it
    return shown(name) if isinstance(name, str) and name else "another model"
