"""The front matter of a card: the YAML block at its top, which the Hub reads."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from huggingface_hub import ModelCard, ModelCardData

from reap2gguf.bundle.manifest import NO_METHOD
from reap2gguf.files import read_entry

if TYPE_CHECKING:
    from reap2gguf.bundle.manifest import Manifest

_FRONT_MATTER = re.compile(r"---\n.*?\n---\n\n", re.DOTALL)
_MAX_CARD_BYTES = 2**20  # a larger one, full of embedded pictures, is not read


def front_matter(card: str) -> str:
    """The front matter of a card that this module wrote, with the empty line after it, or ""."""
    match = _FRONT_MATTER.match(card)
    return match[0] if match else ""


def new_front_matter(manifest: Manifest, source_card: Path, library: str) -> str:
    """Front matter for a new card; language and licence are those of the source's card."""
    inherited = _source_data(source_card)
    values: dict[str, Any] = {
        key: inherited[key]
        for key in ("language", "license", "license_name", "license_link")
        if inherited.get(key) is not None
    }
    if "/" in manifest.source.label:
        values["base_model"] = manifest.source.label
        if library == "gguf":
            values["base_model_relation"] = "quantized"
        elif manifest.pruning.method != NO_METHOD:  # else it is a copy, which has no name there
            values["base_model_relation"] = "finetune"
    was_pruned = manifest.pruning.method != NO_METHOD or manifest.source.earlier is not None
    tags = ["reap", "moe", "expert-pruning", "pruned"] if was_pruned else ["moe"]
    data = ModelCardData(
        library_name=library,
        pipeline_tag=inherited.get("pipeline_tag") or "text-generation",
        tags=[*tags, "gguf", "imatrix"] if library == "gguf" else tags,
        **values,
    )
    return f"---\n{data.to_yaml()}\n---\n\n"


def with_base_model(front: str, repo: str) -> str:
    """The front matter of a GGUF card with the repository of its safetensors as base model."""
    data = ModelCard(front).data
    data["base_model"], data["base_model_relation"] = repo, "quantized"
    return f"---\n{data.to_yaml()}\n---\n\n"


def _source_data(source_card: Path) -> dict[str, Any]:
    try:
        raw = read_entry(source_card, _MAX_CARD_BYTES)
    except OSError:
        return {}  # it is missing, or too large
    text = raw.decode("utf-8", errors="replace").replace("\r\n", "\n")
    try:
        data: Any = ModelCard(text, ignore_metadata_errors=True).data
        found = dict(data.to_dict())
    except (ValueError, TypeError, AttributeError, RecursionError, yaml.YAMLError):
        # without readable front matter there is no licence to take over
        return {}
    return {key: value for key, value in found.items() if _is_short_text(value)}


def _is_short_text(value: Any) -> bool:
    """Whether a value is a short string or a list of them, as a licence or a language is."""
    texts = value if isinstance(value, list) else [value]
    return len(texts) <= 100 and all(isinstance(t, str) and len(t) <= 500 for t in texts)
