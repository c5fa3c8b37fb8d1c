"""A conversation with a model: one question, or a loop on a terminal."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from reap2gguf.errors import UsageError
from reap2gguf.local.engine import Engine

HELP = "Ctrl-C stops an answer, /clear forgets the conversation, Ctrl-D or /exit ends."
Write = Callable[[str], None]


@dataclass(frozen=True)
class Answer:
    """What a model said, and how fast."""

    text: str
    n_tokens: int
    seconds: float  # from the first token on
    was_stopped: bool = False

    def figures(self) -> str:
        """Tokens and speed, for people."""
        timed = self.n_tokens - 1  # the clock starts at the first
        rate = f", {timed / self.seconds:.1f} tokens/s" if timed > 0 < self.seconds else ""
        return f"{self.n_tokens} tokens{rate}{', stopped' if self.was_stopped else ''}"


@dataclass
class Conversation:
    """Messages so far, and how answers are drawn."""

    engine: Engine
    settings: dict[str, Any]
    system: str | None = None
    messages: list[dict[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget everything but the system prompt."""
        self.messages = [{"role": "system", "content": self.system}] if self.system else []

    def ask(self, text: str, write: Write) -> Answer:
        """Put a question and `write` the answer as it comes; Ctrl-C ends the answer.

        Raises UsageError if it has no room in the context; the question is then forgotten.
        """
        asked = [*self.messages, {"role": "user", "content": text}]
        answer = self._answer(asked, write)
        self.messages = [*asked, {"role": "assistant", "content": answer.text}]
        return answer

    def _answer(self, messages: list[dict[str, str]], write: Write) -> Answer:
        said: list[str] = []
        read_before, begun = 0, time.monotonic()
        pieces = self.engine.pieces(messages, **self.settings)
        with _interrupt_noted() as is_interrupted:
            for number, piece in enumerate(pieces):
                if number == 0:  # the prompt has been read, the first token is chosen
                    read_before, begun = self.engine.n_tokens, time.monotonic()
                said.append(piece)
                write(printable(piece))
                if is_interrupted():
                    break
        seconds = time.monotonic() - begun
        # the last token is chosen and not read
        n_tokens = self.engine.n_tokens - read_before + 1 if said else 0
        return Answer("".join(said), n_tokens, seconds, is_interrupted())


@contextmanager
def _interrupt_noted() -> Iterator[Callable[[], bool]]:
    """Ctrl-C once is noted; twice, as while a long prompt is read, interrupts."""
    seen: list[int] = []

    def note(number: int, frame: object) -> None:
        if seen:
            raise KeyboardInterrupt
        seen.append(number)

    earlier = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(seen)
    finally:
        signal.signal(signal.SIGINT, earlier)


def printable(text: str) -> str:
    """Text of a model as a terminal may show it: it may not move the cursor or colour anything."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)


def converse(
    conversation: Conversation, read: Callable[[], str], write: Write, note: Write
) -> None:
    """Questions from `read` until it raises EOFError or is given /exit."""
    while True:
        try:
            line = read().strip()
        except EOFError:
            note("")
            return
        if line in ("/exit", "/quit", "/bye"):
            return
        if line == "/clear":
            conversation.clear()
            note("forgotten")
        elif line.startswith("/") and line[1:].isalpha():
            note(HELP)
        elif line:
            try:
                answer = conversation.ask(line, write)
            except UsageError as error:
                note(f"{error}; /clear forgets the conversation")
                continue
            write("\n")
            note(f"({answer.figures()})")
