"""The `quantization_config` of a pruned model: lists of modules name experts by their numbers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from reap2gguf.checkpoint.quantized.keys import QUANTIZATION_KEYS, with_quantization
from reap2gguf.errors import UnsupportedModelError
from reap2gguf.messages import shown

if TYPE_CHECKING:
    from reap2gguf.models.contract import MoeModel
    from reap2gguf.pruning.select import Kept

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
_EXPERT = re.compile(r"(?<=\bexperts\.)\d+(?=\.|$)")
_PATTERN = "re:"  # what a regular expression of compressed-tensors begins with
# one expert or some, and not `\d+` or `[0-9]+`, which are any
_NUMBER_IN_PATTERN = re.compile(r"experts[^\w\[(]{0,3}(\[(?!0-9\]\+)\d|\((\?:)?\d|\d)")


def pruned_quantization(
    config: Mapping[str, Any], source: Mapping[str, Any], model: MoeModel, kept: Kept
) -> dict[str, Any]:
    """A pruned config with what the source's says of quantized weights, of the experts that remain.

    Names of modules are rewritten wherever they stand in lists: in `modules_to_not_convert`,
    `ignore` and `targets`. Raises UnsupportedModelError for a pattern that names experts by number.
    """
    return {
        key: _rewritten(value, model, kept)
        if key in QUANTIZATION_KEYS
        else _nested(value, model, kept)
        for key, value in with_quantization(config, source).items()
    }


def _nested(value: Any, model: MoeModel, kept: Kept) -> Any:
    """A section of the config; the text model's may have the key too."""
    if not isinstance(value, Mapping) or not any(key in value for key in QUANTIZATION_KEYS):
        return value
    return {
        key: _rewritten(part, model, kept) if key in QUANTIZATION_KEYS else part
        for key, part in value.items()
    }


def _rewritten(value: Any, model: MoeModel, kept: Kept) -> Any:
    """A value of JSON in which lists name only modules that remain, by their new numbers."""
    if isinstance(value, Mapping):
        return {key: _rewritten(part, model, kept) for key, part in value.items()}
    if not isinstance(value, list):
        return value
    found = []
    for item in value:
        new = _module(item, model, kept) if isinstance(item, str) else _rewritten(item, model, kept)
        if new is not None:
            found.append(new)
    return found


def _module(name: str, model: MoeModel, kept: Kept) -> str | None:
    """The name of a module in the pruned model; None if it is of an expert that is removed."""
    if name.startswith(_PATTERN):
        if _NUMBER_IN_PATTERN.search(name):
            raise UnsupportedModelError(
                f"{model.reader.where}: quantization_config names experts by the pattern "
                f"{shown(name)}, which has other numbers after pruning; pass --dequantize bf16"
            )
        return name
    layer, expert = _layer_of(name, model), _EXPERT.search(name)
    if layer is None or layer not in kept or expert is None:
        return name
    ids = kept[layer]
    if int(expert[0]) not in ids:
        return None
    return name[: expert.start()] + str(ids.index(int(expert[0]))) + name[expert.end() :]


def _layer_of(name: str, model: MoeModel) -> int | None:
    """The block that a module is in."""
    block = model.facts.mtp_layer
    if block is not None and name.startswith(model.block_prefix(block)):
        return block
    match = _LAYER.search(name)
    return None if match is None else int(match[1])
