"""A GGUF file in llama.cpp, in a process of its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from reap2gguf.errors import UsageError
from reap2gguf.local.engine import Engine
from reap2gguf.local.running import AnswerOptions, EngineOptions

if TYPE_CHECKING:
    from reap2gguf.evaluating.generation.generators import GeneratorOptions
    from reap2gguf.evaluating.generation.prompts import Message, Prompt


class LlamaGenerator:
    """One prompt at a time: the file has one context."""

    def __init__(self, path: Path, options: GeneratorOptions) -> None:
        """Load it. Raises as `reap2gguf.local.engine.Engine` does."""
        self._engine = Engine(
            path, EngineOptions(options.context, options.threads, options.gpu_layers)
        )
        self._answers = AnswerOptions(temperature=0.0, max_tokens=options.max_tokens, seed=0)

    @property
    def has_template(self) -> bool:
        return self._engine.has_template

    def render(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        return self._engine.render(messages, add_generation_prompt)

    def complete(self, prompts: Sequence[Prompt]) -> Iterator[str]:
        return map(self._answer, prompts)

    def _answer(self, prompt: Prompt) -> str:
        text = ""
        # a text that ends an answer may begin in one piece and end in the next
        longest = max(map(len, prompt.stops), default=0)
        pieces = self._engine.continuation(prompt.text, prompt.is_rendered, self._answers)
        try:
            with closing(pieces):
                for piece in pieces:
                    text += piece
                    if any(stop in text[-len(piece) - longest :] for stop in prompt.stops):
                        break
        except UsageError as error:
            if "context window" not in str(error):
                raise
            return ""
        return prompt.cut(text)

    def close(self) -> None:
        self._engine.close()
