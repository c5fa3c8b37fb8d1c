"""The first half of an expert, with a gate or without one, by the code of transformers' module."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def first_name(experts: Any) -> str:
    """The parameter that the experts' inputs are multiplied with: without a gate it is another."""
    return "gate_up_proj" if experts.has_gate else "up_proj"


def first_matrices(experts: Any) -> Tensor:
    """What the experts' inputs are multiplied with: (E, 2F, H), or (E, F, H) without a gate."""
    weights: Tensor = getattr(experts, first_name(experts))
    return weights


def activated(experts: Any, products: Tensor) -> Tensor:
    """What the down matrices multiply, (S, F), by the module's own code."""
    found: Tensor = (experts._apply_gate if experts.has_gate else experts.act_fn)(products)
    return found
