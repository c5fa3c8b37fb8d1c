"""What a model calls its decoder layers with, besides the hidden states.

That is recorded from the model's own forward: rotary embeddings, masks, and what layers hand to one
another.
"""

from __future__ import annotations

import inspect
from collections.abc import MutableMapping
from typing import Any

import torch
from torch import Tensor

Arguments = dict[str, Any]


class Recorded(Exception):
    """The last recorder was called; the rest of the forward is not needed."""


class Recorder(torch.nn.Module):
    """Takes the place of a decoder layer and records its arguments, by their names."""

    def __init__(self, layer: torch.nn.Module, is_last: bool) -> None:
        super().__init__()
        self.is_last = is_last
        self._replaced = [layer]  # in a list, it is no part of this module
        self._names = list(inspect.signature(layer.forward).parameters)[1:]
        self.hidden: Tensor | None = None
        self.arguments: Arguments = {}

    def __getattr__(self, name: str) -> Any:
        """What a model asks of its layers besides calling them, such as their kind."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_replaced"][0], name)

    def forward(self, hidden_states: Tensor, *others: Any, **arguments: Any) -> Tensor:
        named = dict(zip(self._names, others, strict=False))
        self.hidden, self.arguments = hidden_states, {**named, **arguments}
        if self.is_last:
            raise Recorded
        return hidden_states


def unshared(arguments: Arguments) -> Arguments:
    """The same arguments, with new ones for those that a layer writes to.

    Some models hand keys and values from layer to layer in a mapping. They would be kept for as
    long as the arguments are, and threads would write to one.
    """
    return {
        name: type(value)() if isinstance(value, MutableMapping) else value
        for name, value in arguments.items()
    }
