"""Counts of a plan's weights, each taken once: a large model has tens of thousands of tensors."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING

from reap2gguf.building.exact import active_parameters, exact_recipes
from reap2gguf.observing.budget import layer_bytes
from reap2gguf.observing.linear_attention import has_linear_attention

if TYPE_CHECKING:
    from reap2gguf.building.plan import Plan


class Sizes:
    """What a plan's tensors add up to, found when it is asked for."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._layers: dict[tuple[int, bool], Mapping[int, int]] = {}
        self._exact: dict[bool, frozenset[str]] = {}

    @cached_property
    def active(self) -> int:
        """Parameters that one token uses, without the embedding."""
        return active_parameters(self._plan)

    @property
    def in_layers(self) -> int:
        """The same without output matrices, which calibration passes do not compute."""
        model, tensors = self._plan.model, self._plan.checkpoint.tensors
        heads = {model.head_name, model.mtp_head_name} - {model.embedding_name}
        return self.active - sum(tensors[name].n_elements for name in heads if name in tensors)

    @cached_property
    def has_linear_attention(self) -> bool:
        """Whether any layer's attention is a Gated DeltaNet, or Kimi Delta Attention."""
        return has_linear_attention(self._plan.checkpoint.tensors)

    def layers(self, itemsize: int, on_gpu: bool) -> Mapping[int, int]:
        """Memory of each layer's weights, as a calibration pass holds them."""
        key = (itemsize, on_gpu)
        if key not in self._layers:
            tensors = self._plan.checkpoint.tensors
            self._layers[key] = layer_bytes(self._plan.model, tensors, itemsize, on_gpu)
        return self._layers[key]

    def exact(self, on_gpu: bool) -> frozenset[str]:
        """The recipes whose files are verified by quantizing again."""
        if on_gpu not in self._exact:
            self._exact[on_gpu] = exact_recipes(self._plan, on_gpu, self.active)
        return self._exact[on_gpu]
