"""Pictures that are drawn in no time, for tests of what is around them.

matplotlib takes 1.5 s for those of a bundle, and the tests build hundreds of bundles.
"""

from __future__ import annotations

import base64
from contextlib import nullcontext
from typing import Any

import pytest

from reap2gguf.building import illustrate

_PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNkYPhfDwAChwGA60e6kgAAAABJRU5ErkJggg=="
)  # one pixel
_NAMES = ("saliency_picture", "usage_picture", "quality_picture", "bits_picture")
_DRAWN = {name: getattr(illustrate, name) for name in (*_NAMES, "own_settings")}


def _plain(*arguments: Any, **others: Any) -> bytes:
    return _PNG


def use() -> None:
    """Draw nothing in this process from now on; which pictures there are is found out as ever."""
    for name in _NAMES:
        setattr(illustrate, name, _plain)
    illustrate.own_settings = nullcontext  # type: ignore[assignment]


def draw(patch: pytest.MonkeyPatch) -> None:
    """Draw as the program does, until the patch ends."""
    for name, function in _DRAWN.items():
        patch.setattr(illustrate, name, function)
