"""A reader of samples with a function in the place of a chat template."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from reap2gguf.calibration.samples import SampleReader


class Rendering:
    """A renderer that is one function of messages and tools."""

    def __init__(self, render: Callable[..., str], reads_parts: bool = False) -> None:
        self._render, self._reads_parts = render, reads_parts

    def render_chat(self, messages: Any, tools: Any = None, /) -> str:
        return self._render(messages, tools)

    def reads_parts(self) -> bool:
        return self._reads_parts

    def names_role(self, role: str) -> bool:
        return True


def reading(render: Callable[..., str], reads_parts: bool = False) -> SampleReader:
    return SampleReader(Rendering(render, reads_parts))
