"""Models that answer: one interface for llama.cpp, transformers and vLLM. All answer greedily."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args

from reap2gguf.messages import one_line

if TYPE_CHECKING:
    from reap2gguf.evaluating.generation.prompts import Message, Prompt

FolderEngine = Literal["transformers", "vllm"]
FOLDER_ENGINES: tuple[FolderEngine, ...] = get_args(FolderEngine)


@dataclass(frozen=True)
class GeneratorOptions:
    """How a model runs and answers."""

    max_tokens: int  # of an answer
    context: int  # tokens of prompt and answer together
    threads: int
    gpu_layers: int = -1  # of a GGUF file; -1 is all of them, if llama.cpp was built for a GPU
    device: str = "auto"  # of a folder in transformers: auto, cpu or cuda


class Generator(Protocol):
    """A loaded model."""

    @property
    def has_template(self) -> bool:
        """Whether it has a chat template."""

    def render(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        """A conversation in its template. Raises UsageError if the template refuses it."""

    def complete(self, prompts: Sequence[Prompt]) -> Iterator[str]:
        """Its answers in the order of the prompts, each up to a text that ends it.

        A prompt that does not fit the context has the answer "".
        """

    def close(self) -> None:
        """Free its memory."""


def token_ids(tokenizer: Any, prompt: Prompt) -> list[int]:
    """A prompt as a folder's model reads it."""
    ids = [int(one) for one in tokenizer.encode(prompt.text)]
    begins = tokenizer.bos is not None and not prompt.is_rendered
    return [tokenizer.bos, *ids] if begins else ids


def reason_of(error: Exception) -> str:
    """An error of a library in one line."""
    return one_line(" ".join(str(error).split()) or type(error).__name__, 300)
