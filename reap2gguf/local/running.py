"""How to run a model and choose an answer, whichever program does it."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

from reap2gguf.resources import install_command

INSTALL = install_command("llama")


@dataclass(frozen=True)
class EngineOptions:
    """How to run a model, here or by another program."""

    context: int  # tokens; the model's own context length is the limit
    threads: int
    gpu_layers: int  # -1 is all of them, if llama.cpp was built for a GPU


@dataclass(frozen=True)
class AnswerOptions:
    """How to choose the tokens of an answer."""

    temperature: float = 0.8
    max_tokens: int | None = None  # None: until the context is full
    seed: int | None = None
    system: str | None = None  # the system prompt


def is_installed() -> bool:
    """Whether llama-cpp-python is installed, without loading it."""
    return importlib.util.find_spec("llama_cpp") is not None
