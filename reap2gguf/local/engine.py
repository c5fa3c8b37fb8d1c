"""Run a GGUF file with llama-cpp-python, in a process of its own.

llama.cpp ends its process where a file contradicts itself, and a chat template may never end. So
`engine_process.py` runs the model, and the template is rendered by `tokenizer.templates` with its
limits; whatever happens there is one line here.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from reap2gguf.gguf_files.reader import read_gguf_header
from reap2gguf.local.header_check import check_header, usable_context
from reap2gguf.local.llama_process import Advice, LlamaProcess
from reap2gguf.local.prompts import Prompts

if TYPE_CHECKING:
    from reap2gguf.local.running import AnswerOptions, EngineOptions

Message = Mapping[str, str]
_ADVICE = Advice(
    without_llama="build llama.cpp and pass --llama-cpp DIR",
    less_memory="pass a smaller --context or --gpu-layers 0",
)


class Engine:
    """A loaded model. It answers one question at a time: it has one context."""

    def __init__(self, path: Path, options: EngineOptions) -> None:
        """Load a model.

        Raises ArtifactError if the file is broken or llama.cpp refuses it, UsageError if its chat
        template is broken, and DependencyError if llama-cpp-python does not load.
        """
        header = read_gguf_header(path)
        check_header(path, header)
        self._prompts = Prompts(path, header)
        self.has_template = self._prompts.has_template
        self.context = usable_context(header, options.context)
        self.n_tokens = 0  # that the model has read so far: of the prompt and of its answer
        setup = {
            "context": self.context,
            "stop": self._prompts.stop,
            "threads": options.threads,
            "gpu_layers": options.gpu_layers,
        }
        self._process = LlamaProcess(path, "reap2gguf.local.engine_process", setup, _ADVICE)

    def close(self) -> None:
        """Free the model's memory."""
        self._process.close()
        self._prompts.close()

    def pieces(self, messages: Sequence[Message], options: AnswerOptions) -> Generator[str]:
        """An answer piece by piece; a model without a chat template continues the text.

        Close the iterator to stop the answer. Raises UsageError if the messages and the answer do
        not fit the context, or if the template refuses the messages, and ArtifactError if
        llama.cpp ends.
        """
        request = {
            "prompt": self._prompts.render(messages),
            "is_chat": self.has_template,
            "temperature": options.temperature,
            "max_tokens": options.max_tokens,
            "seed": options.seed,
        }
        self._process.send(request)
        while "piece" in (answer := self._process.receive()):
            self.n_tokens = answer["n_tokens"]
            try:
                yield answer["piece"]
            except GeneratorExit:
                self._process.send({})  # stop
                while "piece" in self._process.receive():
                    pass
                raise
        if "problem" in answer:
            raise self._process.error(answer)
        self.n_tokens = answer["n_tokens"]
