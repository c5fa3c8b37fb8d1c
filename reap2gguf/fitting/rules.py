"""A type for every tensor as few rules: globs over the layers in which a tensor has the same."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType

_LAYER = re.compile(r"blk\.(\d+)\.(.+)")


def rules_of(types: Mapping[str, GGMLQuantizationType]) -> list[tuple[str, GGMLQuantizationType]]:
    """Globs and types of rules that give each of these tensors its type.

    The type that most layers have is the last rule of a tensor's name, for all layers; those of
    other layers come before it.
    """
    layers: dict[str, dict[int, GGMLQuantizationType]] = {}
    found = []
    for name, tensor_type in types.items():
        if match := _LAYER.fullmatch(name):
            layers.setdefault(match[2], {})[int(match[1])] = tensor_type
        else:
            found.append((name, tensor_type))
    for name, by_layer in layers.items():
        usual = Counter(by_layer.values()).most_common(1)[0][0]
        others = sorted({*by_layer.values()} - {usual}, key=lambda one: one.name)
        for tensor_type in others:
            numbers = [layer for layer, one in by_layer.items() if one is tensor_type]
            found += [(f"blk.{glob}.{name}", tensor_type) for glob in layer_globs(numbers)]
        found.append((f"blk.*.{name}", usual))
    return found


def layer_globs(layers: list[int]) -> Iterator[str]:
    """Globs that match these layer numbers and no others: one for each ten of them.

    >>> list(layer_globs([0, 1, 2, 5, 11, 30, 31]))
    ['[0-25]', '11', '3[01]']
    """
    tens: dict[int, list[int]] = {}
    for layer in sorted(layers):
        tens.setdefault(layer // 10, []).append(layer % 10)
    for ten, digits in tens.items():
        yield f"{ten or ''}{_digits(digits)}"


def _digits(digits: list[int]) -> str:
    """A glob for some of the ten digits, which are in ascending order."""
    if len(digits) == 1:
        return str(digits[0])
    if len(digits) == 10:
        return "[0-9]"
    runs: list[list[int]] = []
    for digit in digits:
        if runs and runs[-1][-1] == digit - 1:
            runs[-1].append(digit)
        else:
            runs.append([digit])
    parts = [f"{run[0]}-{run[-1]}" if len(run) > 2 else "".join(map(str, run)) for run in runs]
    return f"[{''.join(parts)}]"
