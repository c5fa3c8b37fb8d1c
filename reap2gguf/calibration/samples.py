"""Records become the texts that the model reads; samples that cannot be used are counted.

One rule for all of them: a sample whose values are broken (null text, tool calls that are not JSON,
a conversation that the template refuses or prints without its text) is skipped, and so is an empty
one. Skipped samples are counted and reported. More than a tenth of broken ones is an error. Data
of a form that is not known is always an error, since nobody can say what it means.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from reap2gguf.calibration.conversations import has_parts, joined_parts, text_of
from reap2gguf.calibration.layouts import Sample, read_record
from reap2gguf.errors import BadSampleError, CalibrationError

if TYPE_CHECKING:
    from reap2gguf.calibration.tool_calls import Message, Tool

_MOST_BAD = 10  # percent
_EARLY = 1000  # samples after which a calibration that is mostly broken is given up
_LEAST_SHOWN = 0.5  # of the letters of each role
_MAX_LINES = 64  # of a message, that are looked for in what the template printed
_REASONING_END = "</think>"


class Renderer(Protocol):
    """Applies a model's chat template."""

    def render_chat(self, messages: list[Message], tools: list[Tool] | None = None, /) -> str: ...

    def reads_parts(self) -> bool:
        """Whether the template reads content that is a list of parts."""
        ...

    def names_role(self, role: str) -> bool:
        """Whether the template knows a role by its name."""
        ...


@dataclass
class Skipped:
    """The samples that were read, and how many of them cannot be used."""

    n_read: int = 0
    n_samples: int | None = None  # of which the ones that were read were drawn, if known
    n_bad: int = 0
    n_empty: int = 0
    first: str = ""  # where the first bad sample is, and what is wrong with it

    def add_bad(self, error: BadSampleError) -> None:
        self.first = self.first or str(error)
        self.n_bad += 1
        if self.n_read >= _EARLY and self.n_bad > self.n_read / 2:
            self.check()

    def add_empty(self) -> None:
        self.n_empty += 1

    def check(self) -> None:
        """Raise CalibrationError if more than a tenth of the samples are bad."""
        total = self.n_read if self.n_samples is None else self.n_samples
        if self.n_bad * 100 > total * _MOST_BAD:
            raise CalibrationError(
                f"{self.first}; {self.n_bad:,} of {total:,} samples cannot be used, and at most "
                f"{_MOST_BAD} % may be skipped; fix or remove them"
            )

    def __str__(self) -> str:
        """What was skipped, for the note on a component; empty if nothing was."""
        parts = []
        if self.n_bad:
            parts.append(
                f"skipped {self.n_bad:,} of {self.n_read:,} samples, which cannot be used (the "
                f"first: {self.first})"
            )
        if self.n_empty:
            parts.append(
                f"skipped {self.n_empty:,} sample{'s' * (self.n_empty > 1)} of under 2 tokens"
            )
        return "; ".join(parts)


@dataclass
class SampleReader:
    """Turns records into texts, messages through the chat template, and counts the rest."""

    renderer: Renderer
    skipped: Skipped = field(default_factory=Skipped)
    n_dropped_parts: int = 0  # images and the like, which the template cannot show
    n_dropped_reasoning: int = 0  # last answers whose reasoning the template does not print

    def text(self, record: Any, where: str) -> str | None:
        """The text of the sample in a record; None if it is skipped.

        Raises CalibrationError if no layout fits the record, or the template exceeds a limit.
        """
        self.skipped.n_read += 1
        try:
            sample = read_record(record, where)
            text = self._render(sample, where) if sample.text is None else sample.text
        except BadSampleError as error:
            self.skipped.add_bad(error)
            return None
        if not text.strip():
            self.skipped.add_empty()
            return None
        return text

    def _render(self, sample: Sample, where: str) -> str:
        """The text of a conversation; an empty text if none of its messages holds any."""
        messages: Sequence[Message] = sample.messages
        if not any(map(_holds_text, messages)):
            return ""
        if has_parts(messages):
            messages, n_dropped = joined_parts(messages, self.renderer.reads_parts())
            self.n_dropped_parts += n_dropped
            if not any(map(_holds_text, messages)):
                return ""
        if not self.renderer.names_role("developer"):
            messages = [_without_developer(message) for message in messages]
        tools = None if sample.tools is None else list(sample.tools)
        try:
            text = self.renderer.render_chat(list(messages), tools)
        except CalibrationError as error:
            raise type(error)(f"{where}: {error}") from error
        _check_shown(messages, text, where)
        thought = messages[-1].get("reasoning_content")
        if isinstance(thought, str) and not _n_shown(thought.strip(), text):
            self.n_dropped_reasoning += 1
        return text

    def note(self) -> str:
        """What was skipped or dropped, for people; empty if nothing was."""
        notes = [str(self.skipped)]
        if self.n_dropped_parts:
            notes.append(
                f"dropped {self.n_dropped_parts:,} images, videos or sounds, which the chat "
                "template cannot show"
            )
        if self.n_dropped_reasoning:
            notes.append(
                f"the chat template does not print the reasoning in {self.n_dropped_reasoning:,} "
                "of the samples"
            )
        return "; ".join(note for note in notes if note)


def _holds_text(message: Message) -> bool:
    """Whether a message has any text, reasoning, image or tool call."""
    texts = (message.get(key) for key in ("reasoning_content", "thinking", "reasoning"))
    content = message["content"]
    has_content = bool(content.strip() if isinstance(content, str) else content)
    return has_content or bool(message.get("tool_calls")) or any(texts)


def _without_developer(message: Message) -> Message:
    """A developer's message as a system message, as servers read it."""
    return {**message, "role": "system"} if message["role"] == "developer" else message


def _check_shown(messages: Sequence[Message], rendered: str, where: str) -> None:
    """Raise BadSampleError if a template printed less than half of the text of a role.

    Templates may leave out system messages, what an assistant says beside its tool calls, and
    reasoning before `</think>`; those are not counted where there is other text.
    """
    counted = [message for message in messages if _is_printed(message)]
    if not any(text_of(message["content"]).strip() for message in counted):
        counted = [m for m in messages if m["role"] == "system"]
    for role in dict.fromkeys(str(message["role"]) for message in counted):
        texts = [text_of(m["content"]) for m in counted if m["role"] == role]
        if role == "assistant":
            texts = [text.rpartition(_REASONING_END)[2] for text in texts]
        n_letters = sum(len(text.strip()) for text in texts)
        n_shown = sum(_n_shown(text.strip(), rendered) for text in texts)
        if n_shown < n_letters * _LEAST_SHOWN:
            raise BadSampleError(
                f"{where}: the chat template prints {n_shown:,.0f} of {n_letters:,} letters of "
                f"the messages by {role!r}; use a template that prints them, or samples of plain "
                "text"
            )


def _is_printed(message: Message) -> bool:
    """Whether every template has to print the content of a message."""
    return message["role"] != "system" and not message.get("tool_calls")


def _n_shown(text: str, rendered: str) -> float:
    """About how many letters of `text` are in `rendered`; templates may change or quote some."""
    if text in rendered or json.dumps(text, ensure_ascii=False)[1:-1] in rendered:
        return len(text)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    lines = lines[:: -(-len(lines) // _MAX_LINES) or 1]
    n_letters = sum(map(len, lines))
    return len(text) * sum(len(line) for line in lines if line in rendered) / (n_letters or 1)


def usable(records: Iterable[Any], reader: SampleReader, name: str) -> Iterator[str]:
    """The texts of the records that can be used; `name` and a number say where each one is.

    Raises CalibrationError at the end if too many cannot be used.
    """
    for number, record in enumerate(records, start=1):
        text = reader.text(record, f"{name}: sample {number}")
        if text is not None:
            yield text
    reader.skipped.check()
