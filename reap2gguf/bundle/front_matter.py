"""The YAML at the head of a card, which the Hub reads."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData

from reap2gguf.bundle.manifest import Manifest

_FRONT_MATTER = re.compile(r"---\n.*?\n---\n\n", re.DOTALL)
_MAX_CARD_BYTES = 2**20  # of the source; one of pictures says nothing here


def front_matter(card: str) -> str:
    """The front matter of a card that this module wrote, with the line after it; or nothing."""
    match = _FRONT_MATTER.match(card)
    return match[0] if match else ""


def new_front_matter(manifest: Manifest, source_card: Path, library: str) -> str:
    """YAML for the Hub, the licence taken over from the source's own card."""
    inherited = _source_data(source_card)
    values: dict[str, Any] = {
        key: inherited[key]
        for key in ("language", "license", "license_name", "license_link")
        if inherited.get(key) is not None
    }
    if "/" in manifest.source.label:
        values["base_model"] = manifest.source.label
        values["base_model_relation"] = "quantized" if library == "gguf" else "finetune"
    tags = ["reap", "moe", "expert-pruning", "pruned"]
    data = ModelCardData(
        library_name=library,
        pipeline_tag=inherited.get("pipeline_tag") or "text-generation",
        tags=[*tags, "gguf", "imatrix"] if library == "gguf" else tags,
        **values,
    )
    return f"---\n{data.to_yaml()}\n---\n\n"


def with_base_model(front: str, repo: str) -> str:
    """Front matter of GGUF files, naming the repository of the safetensors they were made from."""
    data = ModelCard(front).data
    data["base_model"], data["base_model_relation"] = repo, "quantized"
    return f"---\n{data.to_yaml()}\n---\n\n"


def _source_data(source_card: Path) -> dict[str, Any]:
    if not source_card.is_file() or source_card.stat().st_size > _MAX_CARD_BYTES:
        return {}
    text = source_card.read_text(encoding="utf-8", errors="replace")
    try:
        data: Any = ModelCard(text, ignore_metadata_errors=True).data
        found = dict(data.to_dict())
    except (ValueError, TypeError, AttributeError, RecursionError, yaml.YAMLError):
        # a card without readable front matter has no licence to inherit
        return {}
    return {key: value for key, value in found.items() if _is_words(value)}


def _is_words(value: Any) -> bool:
    """A short text, or a list of some: what a licence or a language may be."""
    words = value if isinstance(value, list) else [value]
    return len(words) <= 100 and all(isinstance(w, str) and len(w) <= 500 for w in words)
