"""The chat template of a GGUF file: an untrusted program, rendered in a process of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reap2gguf.errors import CalibrationError, UsageError
from reap2gguf.tokenizer.templates import ChatTemplate

if TYPE_CHECKING:
    from reap2gguf.gguf_files.reader import GgufHeader

_KEY = "tokenizer.chat_template"
_ADVICE = "use a file with another chat template"


class Prompts:
    """Turns messages into prompts, with the chat template of a file if it has one."""

    def __init__(self, path: Path, header: GgufHeader, now: datetime | None = None) -> None:
        """Compile the templates of a file. `now` is the time that they may ask for.

        llama-cpp-python compiles all of them without a limit when it loads the file. Raises
        UsageError for one that is no template, or exceeds a limit.
        """
        self._path = path
        self.has_template = isinstance(header.metadata.get(_KEY), str)
        templates = {
            key.removeprefix(f"{_KEY}.") if key != _KEY else "default": text
            for key, text in header.metadata.items()
            if (key == _KEY or key.startswith(f"{_KEY}.")) and isinstance(text, str)
        }
        self.stop = _token_text(header, "eos")  # the text that ends an answer; may be empty
        tokens = {"bos_token": _token_text(header, "bos"), "eos_token": self.stop}
        self._template = ChatTemplate(templates, tokens, now=now or datetime.now(), advice=_ADVICE)
        try:
            self._template.check()
        except CalibrationError as error:
            self._template.close()
            raise UsageError(f"{path}: {error}") from error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt for the next answer; without a template, the contents of the messages.

        Raises UsageError if the template refuses the messages or exceeds a limit.
        """
        if not self.has_template:
            return "\n".join(str(message["content"]) for message in messages)
        try:
            return self._template.render(
                messages, tools, add_generation_prompt=True, variables=variables
            )
        except CalibrationError as error:
            raise UsageError(f"{self._path}: {error}") from error

    def close(self) -> None:
        """End the process that renders."""
        self._template.close()


def _token_text(header: GgufHeader, name: str) -> str:
    """The text of a special token, such as `eos`; empty if the file names none."""
    tokens = header.metadata.get("tokenizer.ggml.tokens")
    number = header.metadata.get(f"tokenizer.ggml.{name}_token_id")
    if not isinstance(tokens, list) or type(number) is not int or not 0 <= number < len(tokens):
        return ""
    return str(tokens[number])
