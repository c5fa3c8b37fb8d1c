"""transformers' models of a config: its text model without weights, and the class that loads it.

AutoModelForCausalLM knows most architectures, but not every one that has images or sound as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reap2gguf.checkpoint.config import read_json
from reap2gguf.models.transformers_config import config_of_known_type, transformers_config

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Classes:
    """The names of an architecture's classes in transformers."""

    whole: str  # its `from_pretrained` loads a checkpoint, and it computes logits of text
    text: str = ""  # the text model without its head; empty where `whole` makes it of a config
    processor: str = "AutoTokenizer"  # what makes the input of `whole`


_MOST = Classes("AutoModelForCausalLM")
# by the name in config.json's `architectures`
_OTHERS: Mapping[str, Classes] = {
    "Qwen3VLMoeForConditionalGeneration": Classes(
        "AutoModelForImageTextToText", "Qwen3VLMoeTextModel", "AutoProcessor"
    ),
    "Qwen3OmniMoeForConditionalGeneration": Classes(
        "Qwen3OmniMoeThinkerForConditionalGeneration",
        "Qwen3OmniMoeThinkerTextModel",
        "AutoProcessor",
    ),
}


def classes_of(architecture: Any) -> Classes:
    """The classes of an architecture."""
    return _OTHERS.get(architecture, _MOST) if isinstance(architecture, str) else _MOST


def classes_for_all(architecture: Any, has_tower: bool) -> tuple[str, str]:
    """The names of what loads all that a folder holds: its model, and what makes its input."""
    classes = classes_of(architecture)
    if has_tower and not classes.text:
        return "AutoModelForImageTextToText", "AutoProcessor"
    return classes.whole, classes.processor


def whole_class(config: Mapping[str, Any]) -> Any:
    """The class whose `from_pretrained` loads a folder with this config.json, for text."""
    import transformers

    return getattr(transformers, classes_of(_architecture(config)).whole)


def load_whole(folder: Path, **how: Any) -> Any:
    """The model of a folder, weights included, loaded by its class; no code of it is run.

    `how`: further arguments of `from_pretrained`. Raises whatever transformers raises.
    """
    values = read_json(folder / "config.json")
    config = config_of_known_type(values)
    if config is not None:
        how["config"] = config
    loader = whole_class(values)
    return loader.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **how)


def text_model(config: Mapping[str, Any], dtype: torch.dtype) -> Any:
    """The text model without its head, on the meta device: vision towers are not run.

    Raises whatever transformers raises for a config that it cannot build.
    """
    import torch
    import transformers

    name = classes_of(_architecture(config)).text
    text = transformers_config(config).get_text_config()
    kind = getattr(transformers, name) if name else _causal_class(text)
    attention = "sdpa" if getattr(kind, "_supports_sdpa", True) else "eager"
    how: dict[str, Any] = {"dtype": dtype, "attn_implementation": attention}
    with torch.device("meta"):
        if name:
            model = kind._from_config(text, **how)
        else:
            auto = transformers.AutoModelForCausalLM
            model = auto.from_config(text, trust_remote_code=False, **how)
    return model.eval().base_model


def _causal_class(config: Any) -> Any:
    """The class that AutoModelForCausalLM makes of a config; None if it knows none."""
    import transformers

    return transformers.MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)


def _architecture(config: Mapping[str, Any]) -> Any:
    names = config.get("architectures")
    return names[0] if isinstance(names, list) and names else None
