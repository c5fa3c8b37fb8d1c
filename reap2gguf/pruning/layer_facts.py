"""What is kept in a layer's file of new weights, beside these (`layer_files.py`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self


@dataclass(frozen=True)
class Facts:
    """How a layer was made; it goes to JSON and back."""

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """The facts in a layer's file. Raises KeyError, TypeError or ValueError for others."""
        return cls(**values)
