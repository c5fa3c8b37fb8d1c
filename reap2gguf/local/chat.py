"""A conversation with a model: one question, or a loop on a terminal."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from reap2gguf.errors import UsageError

if TYPE_CHECKING:
    from reap2gguf.local.engine import Engine
    from reap2gguf.local.running import AnswerOptions

HELP = (
    'Ctrl-C stops an answer, """ begins and ends a text of several lines, /clear starts a new '
    "conversation, Ctrl-D or /exit quits."
)
_FENCE = '"""'
Read = Callable[[str], str]  # of a prompt, such as input()
Write = Callable[[str], None]


@dataclass(frozen=True)
class Answer:
    """A model's answer, and how fast it came."""

    text: str
    n_tokens: int
    seconds: float  # since the first token
    was_stopped: bool = False

    def figures(self) -> str:
        """Tokens and speed, for people."""
        timed = self.n_tokens - 1  # the clock starts at the first token
        rate = f", {timed / self.seconds:.1f} tokens/s" if timed > 0 < self.seconds else ""
        return f"{self.n_tokens} tokens{rate}{', stopped' if self.was_stopped else ''}"


@dataclass
class Conversation:
    """The messages so far, and how answers are chosen."""

    engine: Engine
    options: AnswerOptions
    messages: list[dict[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget everything except the system prompt."""
        system = self.options.system
        self.messages = [{"role": "system", "content": system}] if system else []

    def ask(self, text: str, write: Write) -> Answer:
        """Ask a question and `write` the answer as it comes; Ctrl-C ends the answer.

        Raises UsageError if the question does not fit the context; it is then forgotten.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        answer = self._answer(messages, write)
        self.messages = [*messages, {"role": "assistant", "content": answer.text}]
        return answer

    def _answer(self, messages: list[dict[str, str]], write: Write) -> Answer:
        parts: list[str] = []
        read_before, begun = 0, time.monotonic()
        pieces = self.engine.pieces(messages, self.options)
        with _deferred_interrupt() as is_interrupted, closing(pieces):
            for number, piece in enumerate(pieces):
                if number == 0:  # the prompt has been read, the first token is chosen
                    read_before, begun = self.engine.n_tokens, time.monotonic()
                parts.append(piece)
                write(printable(piece))
                if is_interrupted():
                    break
        seconds = time.monotonic() - begun
        # the last token is chosen and not read
        n_tokens = self.engine.n_tokens - read_before + 1 if parts else 0
        return Answer("".join(parts), n_tokens, seconds, is_interrupted())


@contextmanager
def _deferred_interrupt() -> Iterator[Callable[[], bool]]:
    """Remember the first Ctrl-C; a second one interrupts, for example while a prompt is read."""
    received: list[int] = []

    def receive(number: int, frame: object) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)

    earlier = signal.signal(signal.SIGINT, receive)
    try:
        yield lambda: bool(received)
    finally:
        signal.signal(signal.SIGINT, earlier)


def printable(text: str) -> str:
    """A model's text without control characters, which could move the cursor or set colours."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)


def converse(conversation: Conversation, read: Read, write: Write, note: Write) -> None:
    """Answer questions from `read` until it raises EOFError or returns /exit.

    Ctrl-C while `read` waits drops what was typed.
    """
    while True:
        try:
            text = _question(read)
        except EOFError:
            note("")
            return
        except KeyboardInterrupt:
            note("\nCtrl-D or /exit quits")
            continue
        if text in ("/exit", "/quit", "/bye"):
            return
        if text == "/clear":
            conversation.clear()
            note("new conversation")
        elif text.startswith("/") and text[1:].isalpha():
            note(HELP)
        elif text:
            try:
                answer = conversation.ask(text, write)
            except UsageError as error:
                note(f"{error}; /clear starts a new conversation")
                continue
            write("\n")
            note(f"({answer.figures()})")


def _question(read: Read) -> str:
    """One line, or the lines between two times three quotes."""
    line = read("> ").strip()
    if not line.startswith(_FENCE):
        return line
    lines = [line.removeprefix(_FENCE)]
    while not lines[-1].rstrip().endswith(_FENCE):
        lines.append(read("... "))
    lines[-1] = lines[-1].rstrip().removesuffix(_FENCE)
    return "\n".join(lines).strip()
