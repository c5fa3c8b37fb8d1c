"""A checkpoint's tokenizer and chat template, for calibration.

The chat template is what transformers loads; token ids are those of `tokenizer.json`, from which
the GGUF file gets its tokenizer.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer as Encoder

from reap2gguf.errors import CalibrationError, CheckpointError
from reap2gguf.tokenizer.panics import panics_as
from reap2gguf.tokenizer.templates import ChatTemplate
from reap2gguf.tokenizer.tokenizer_files import check_template_files

TokenIds = npt.NDArray[np.int64]


class Tokenizer:
    """A checkpoint's tokenizer: texts to token ids, conversations to texts.

    Raises CheckpointError if the checkpoint has no usable tokenizer.
    """

    def __init__(self, folder: Path) -> None:
        from transformers import AutoTokenizer

        check_template_files(folder)
        path = folder / "tokenizer.json"
        with panics_as(CheckpointError, f"{folder}: no usable tokenizer"):
            loaded: Any = AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
        if not loaded.is_fast or not path.is_file():
            raise CheckpointError(f"{folder}: has no tokenizer.json (a fast tokenizer is needed)")
        with panics_as(CheckpointError, f"{folder}: no usable tokenizer"):
            # the GGUF file is made of tokenizer.json; classes of transformers may do otherwise
            self._encoder = Encoder.from_file(str(path))
            self._encoder.no_padding()
            self._encoder.no_truncation()
            # what the tokenizer puts before each text: one BOS token or nothing
            prefix = self._encoder.encode("").ids
        self.bos: int | None = prefix[0] if prefix else None
        self._chat = _chat_template(loaded, folder)

    def encode(self, text: str) -> TokenIds:
        """Token ids of a text, shape (n,). Special tokens in it are recognised, none is added."""
        with panics_as(CalibrationError, "the tokenizer fails on the calibration text"):
            ids = self._encoder.encode(text, add_special_tokens=False).ids
        return np.asarray(ids, dtype=np.int64)

    def render_chat(
        self, messages: list[Mapping[str, Any]], tools: list[Mapping[str, Any]] | None = None
    ) -> str:
        """Messages as the model's chat template writes them, in a process of its own.

        Without a template, the contents of the messages, one per line. Raises CalibrationError if
        the template refuses the messages or exceeds a limit.
        """
        if self._chat is None:
            return "\n".join(_text_of(message["content"]) for message in messages)
        return self._chat.render(messages, tools)

    def reads_parts(self) -> bool:
        """Whether the template reads content that is a list of parts, such as text and images."""
        return self._chat is not None and self._chat.reads_parts()

    def names_role(self, role: str) -> bool:
        """Whether the template knows a role by its name; without a template, all are the same."""
        return self._chat is None or self._chat.names_role(role)

    def close(self) -> None:
        """End the process that renders; a later rendering starts another."""
        if self._chat is not None:
            self._chat.close()


def _chat_template(tokenizer: Any, folder: Path) -> ChatTemplate | None:
    templates = tokenizer.chat_template
    if templates is None:
        return None
    texts = templates.values() if isinstance(templates, dict) else [templates]
    if not all(isinstance(text, str) for text in texts):
        raise CheckpointError(f"{folder}: its chat template is not text")
    return ChatTemplate(templates, tokenizer.special_tokens_map)


def _text_of(content: Any) -> str:
    """The text of a message: a string, or the texts among its parts."""
    if not isinstance(content, list):
        return "" if content is None else str(content)
    texts = [part.get("text") if isinstance(part, dict) else part for part in content]
    return "".join(text for text in texts if isinstance(text, str))
