"""The keys of config.json that say how a model is quantized, and the config without them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

QUANTIZATION_KEYS = ("quantization_config", "compression_config")
BLOCKS = "MXFP4"  # of which a GGUF file may hold the very blocks that a checkpoint has
# among the caveats of a model whose safetensors are not stored as the source's are
WRITTEN_AS_BF16 = "the safetensors hold the decoded values of a quantized source, rounded to BF16"
# how a caveat begins of a model that is read from a GGUF file of few bits
READ_FROM_GGUF = "the source is a GGUF file of"
ADVICE = (
    "pass the BF16 checkpoint that it was made from, or convert this one to BF16 first: "
    "docs/quantized-sources.md shows how"
)


def sections_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """What stands under the keys that say how a model is quantized, nested ones included."""
    found = {}
    sections = {"": config} | {k: v for k, v in config.items() if isinstance(v, Mapping)}
    for name, section in sections.items():
        for key in QUANTIZATION_KEYS:
            if name != key and (value := section.get(key)) is not None:
                found[f"{name}.{key}" if name else key] = value
    return found


def without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config without the keys that say that its model is quantized."""
    return {
        key: without_quantization(value) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if key not in QUANTIZATION_KEYS
    }


def with_quantization(config: Mapping[str, Any], original: Mapping[str, Any]) -> dict[str, Any]:
    """A config with the keys that `without_quantization` took from `original`, in their places.

    Keys that only `config` has come last, as `config` has them.
    """
    found: dict[str, Any] = {}
    for key, value in original.items():
        if key in QUANTIZATION_KEYS:
            found[key] = value
        elif key in config:
            both = isinstance(value, Mapping) and isinstance(config[key], Mapping)
            found[key] = with_quantization(config[key], value) if both else config[key]
    return found | {key: value for key, value in config.items() if key not in found}
