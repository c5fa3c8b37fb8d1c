"""Records become samples: a text, or a conversation with its tools.

Each dataset names its fields in its own way. `_LAYOUTS` is the table of the known layouts, in the
order in which they are tried. A record is recognised by its fields, wherever it is stored.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from reap2gguf.calibration.conversations import (
    REASONING,
    flat_message,
    json_list,
    read_messages,
    text_of,
)
from reap2gguf.calibration.tool_calls import (
    SWE_AGENT_TOOLS,
    Message,
    Tool,
    callable_messages,
    function_schema,
    read_tools,
)
from reap2gguf.errors import BadSampleError, CalibrationError
from reap2gguf.messages import shown

Record = Mapping[str, Any]

_EXPECTED = (
    "text, messages, conversations, chosen (alone or with a question), content, query and answers, "
    "prompt and body, question and choices, or a question (one of {questions}) and an answer (one "
    "of {answers})"
)
# A question and its answer, by the names of their fields; the first that a record has is read.
_QUESTIONS = ("query", "instruction", "question", "problem", "prompt", "human", "user", "input")
_ANSWERS = ("answer", "output", "response", "completion", "solution", "assistant", "bot")
# These are named apart: a full solution goes before its short answer.
_FIRST_PAIRS = (
    *(("prompt", "completion"), ("instruction", "output"), ("instruction", "response")),
    *(("problem", "solution"), ("question", "solution")),
)
_SYSTEM = ("system", "system_prompt")
_MORE = ("input", "context")
_TOOLS = ("tools", "functions")
_THOUGHTS = (*REASONING, "complex_cot")  # reasoning beside an answer, the last as in medical sets
_REASONING_END = "</think>"
_MAX_DEPTH = 64  # levels of lists and objects in a sample


@dataclass(frozen=True)
class Sample:
    """A text that is used as it is, or messages for the model's chat template."""

    text: str | None = None
    messages: tuple[Message, ...] = ()
    tools: tuple[Tool, ...] | None = None


@dataclass(frozen=True)
class Layout:
    """Fields that a record must have, fields that it may have, and the function to read them."""

    needs: tuple[str, ...]
    read: Callable[[Record, str], Sample]
    may_have: tuple[str, ...] = ()


def read_record(record: Any, where: str) -> Sample:
    """The sample in a record, whose fields may be written in any case.

    Raises BadSampleError if its values cannot be used, and CalibrationError if no layout fits it,
    so that it is not known what it means.
    """
    if not isinstance(record, dict):
        raise CalibrationError(f"{where}: a {type(record).__name__}, expected an object")
    fields = {str(name).lower(): value for name, value in record.items()} | record
    layout = _layout_of(fields)
    if layout is None:
        raise CalibrationError(f"{where}: has {_listed(record)}, expected {_expected()}")
    for name in layout.needs:
        if fields[name] is None:
            raise BadSampleError(f"{where}: {name} is null")
    try:
        sample = layout.read(fields, where)
        _check_values([sample.text, sample.messages, sample.tools], where)
    except RecursionError as error:
        raise BadSampleError(f"{where}: nested too deeply; flatten it") from error
    return sample


def _layout_of(record: Record) -> Layout | None:
    """The first layout whose fields all hold something; else the first whose fields are there."""
    tests: tuple[Callable[[Any], bool], ...] = (
        lambda value: value not in (None, "", [], {}),
        lambda value: value is not None,
    )
    for is_given in tests:
        for layout in _LAYOUTS:
            if all(_has(record, name) and is_given(record[name]) for name in layout.needs):
                return layout
    return next((one for one in _LAYOUTS if record.keys() >= set(one.needs)), None)


def _has(record: Record, name: str) -> bool:
    """Whether a record has a field, with a value of a type that can be text."""
    types = {"text": str, "chosen": str | list | dict}.get(name, object)
    return name in record and isinstance(record[name], types)


def _listed(record: Record) -> str:
    return ", ".join(str(name)[:80] for name in list(record)[:12]) or "no fields"


def _expected() -> str:
    return _EXPECTED.format(questions=", ".join(_QUESTIONS), answers=", ".join(_ANSWERS))


def _check_values(value: Any, where: str, depth: int = 0) -> None:
    """Raise BadSampleError for text or numbers that no tokenizer or template can read."""
    if isinstance(value, str):
        if not value.isprintable() and (found := _UNREADABLE.search(value)):
            what = "a NUL character" if found[0] == "\0" else "half a character (a surrogate)"
            raise BadSampleError(
                f"{where}: holds {what}, at letter {found.start() + 1:,} of a text"
            )
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise BadSampleError(f"{where}: holds {value}, which is not a number of JSON")
    elif isinstance(value, Mapping | list | tuple):
        if depth > _MAX_DEPTH:
            raise BadSampleError(f"{where}: nested deeper than {_MAX_DEPTH} levels; flatten it")
        if isinstance(value, Mapping):
            value = [*value, *value.values()]
        for item in value:
            _check_values(item, where, depth + 1)


def is_record(names: Iterable[str]) -> bool:
    """Whether an object with these fields, in any case of letters, is one record."""
    lower = {name.lower() for name in names}
    return any(lower.issuperset(layout.needs) for layout in _LAYOUTS)


def columns(names: list[str]) -> list[str]:
    """The columns of a dataset that its samples are made of; all columns if no layout fits."""
    if not is_record(names):
        return names
    return [name for name in names if name.lower() in _ALL_FIELDS]


def _read_text(record: Record, where: str) -> Sample:
    return Sample(text=_string(record, "text", where))


def _read_content(record: Record, where: str) -> Sample:
    """A text, as in sets of source code; a record that has a role too is one message."""
    if "role" in record:
        raise CalibrationError(
            f"{where}: one message with a role and content, expected a whole conversation "
            "(messages) in each record"
        )
    return Sample(text=_string(record, "content", where))


def _read_messages(record: Record, where: str) -> Sample:
    """`messages` as a list, as JSON text (SWE-smith), or as one text by the user."""
    value = record["messages"]
    stored = json_list(value, "messages", where)
    messages = read_messages(value if stored is None else stored, "user", where)
    if stored is not None:
        messages = [flat_message(message) for message in messages]
    if messages[:1] and messages[0]["role"] not in ("system", "developer"):
        messages = [*_system(record), *messages]
    tools = read_tools(_tools(record), where)
    if tools is None and _is_trajectory(record) and any(m.get("tool_calls") for m in messages):
        tools = SWE_AGENT_TOOLS
    return Sample(messages=callable_messages(messages, where), tools=tools)


def _is_trajectory(record: Record) -> bool:
    """Whether a record is one of SWE-smith's, which do not list their tools."""
    return record.get("traj_id") is not None or record.get("instance_id") is not None


def _read_conversations(name: str) -> Callable[[Record, str], Sample]:
    """Reads ShareGPT's turns of `from` and `value`, or messages, under that name."""

    def read(record: Record, where: str) -> Sample:
        stored = json_list(record[name], name, where)
        turns = record[name] if stored is None else stored
        if not isinstance(turns, list):
            raise BadSampleError(f"{where}: expected {name} as a list of turns")
        if turns and all(isinstance(turn, str) for turn in turns):
            messages = _in_turn(turns)
        else:
            messages = read_messages(turns, "user", where)
        if messages[:1] and messages[0]["role"] not in ("system", "developer"):
            messages = [*_system(record), *messages]
        if isinstance(record.get("chosen"), Mapping):  # the better of two last turns
            messages += read_messages([record["chosen"]], "assistant", where)
        tools = read_tools(_tools(record), where)
        return Sample(messages=callable_messages(messages, where), tools=tools)

    return read


def _pair(question_field: str, answer_field: str) -> Callable[[Record, str], Sample]:
    """Reads a question and its answer from two fields; each is a text or a list of messages."""

    def read(record: Record, where: str) -> Sample:
        question = record[question_field]
        more = next((record[n] for n in _MORE if _is_text(record.get(n))), "")
        if isinstance(question, str) and question_field not in _MORE and more:
            question = f"{question}\n\n{more}"
        messages = _side(question, question_field, "user", where)
        if not (messages and messages[0]["role"] == "system"):
            messages = [*_system(record), *_history(record, where), *messages]
        answer = _side(record[answer_field], answer_field, "assistant", where)
        messages += _with_reasoning(answer, record)
        tools = read_tools(_tools(record), where)
        return Sample(messages=callable_messages(messages, where), tools=tools)

    return read


def _side(value: Any, name: str, role: str, where: str) -> list[Message]:
    if not isinstance(value, str | list):
        raise BadSampleError(f"{where}: {name} is {shown(value)}, expected text")
    return read_messages(value, role, where)


def _system(record: Record) -> list[Message]:
    """The system prompt that a record holds beside its question or its turns."""
    text = next((record[name] for name in _SYSTEM if _is_text(record.get(name))), None)
    return [] if text is None else [{"role": "system", "content": text}]


def _tools(record: Record) -> Any:
    """The tools of a record, by today's name or by the one that OpenAI used first."""
    return record.get("tools") or record.get("functions")


def _with_reasoning(answer: list[Message], record: Record) -> list[Message]:
    """An answer with the reasoning that a record holds beside it, unless it has its own."""
    text = next((record[name] for name in _THOUGHTS if _is_text(record.get(name))), None)
    if text is None or not answer or answer[-1]["role"] != "assistant":
        return answer
    last = answer[-1]
    if last.get("reasoning_content") or _REASONING_END in text_of(last["content"]):
        return answer
    return [*answer[:-1], {**last, "reasoning_content": text}]


def _history(record: Record, where: str) -> list[Message]:
    """Earlier questions and answers, in the layout of Alpaca as LLaMA-Factory extends it."""
    messages: list[Message] = []
    history = record.get("history")
    for turns in history if isinstance(history, list) else ():
        is_pair = isinstance(turns, list) and len(turns) == 2
        if not is_pair or not all(isinstance(turn, str) for turn in turns):
            raise BadSampleError(f"{where}: history has {shown(turns)}, expected pairs of texts")
        messages += _in_turn(turns)
    return messages


def _in_turn(texts: Sequence[str]) -> list[Message]:
    """Texts by the user and the assistant in turn."""
    roles = ("user", "assistant")
    return [{"role": roles[n % 2], "content": text} for n, text in enumerate(texts)]


def _read_chosen(record: Record, where: str) -> Sample:
    """The better of two answers: messages, which may begin with the question, or a text."""
    chosen = record["chosen"]
    name = next((n for n in _QUESTIONS if record.get(n)), None)
    if name is None and isinstance(chosen, str):
        return Sample(text=chosen)
    answer = _side([chosen] if isinstance(chosen, dict) else chosen, "chosen", "assistant", where)
    asked = [] if name is None else _side(record[name], name, "user", where)
    if any(message["role"] == "user" for message in answer):
        asked = []  # the question is the first of these messages
    elif not (asked and asked[0]["role"] == "system"):
        asked = [*_system(record), *asked]
    return Sample(messages=callable_messages([*asked, *answer], where))


def _read_story(record: Record, where: str) -> Sample:
    prompt = _string(record, "prompt", where)
    return _exchange(f"Write a story on this prompt:\n\n{prompt}", _string(record, "body", where))


def _read_choices(record: Record, where: str) -> Sample:
    """MMLU: a question and the choices for its answer; REAP reads only the question."""
    choices = record["choices"]
    if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
        raise BadSampleError(f"{where}: expected choices as a list of texts")
    lines = [f"{chr(ord('A') + n % 26)}. {choice}" for n, choice in enumerate(choices)]
    question = _string(record, "question", where)
    return Sample(messages=({"role": "user", "content": "\n".join([question, *lines])},))


def _read_calls(record: Record, where: str) -> Sample:
    """xlam: a query, and as JSON text the tools and the calls that answer it."""
    calls = json_list(record["answers"], "answers", where) or record["answers"]
    if not isinstance(calls, list) or not all(
        isinstance(call, dict) and isinstance(call.get("name"), str) and "arguments" in call
        for call in calls
    ):
        raise BadSampleError(f"{where}: expected answers as a list of calls with name, arguments")
    asked = {"role": "user", "content": _string(record, "query", where)}
    functions = [{"function": call} for call in calls]
    called = {"role": "assistant", "content": "", "tool_calls": functions}
    tools = read_tools(_tools(record), where)
    schemas = tuple(function_schema(tool) for tool in tools) if tools else None
    return Sample(messages=callable_messages([asked, called], where), tools=schemas)


def _layout_of_pair(question: str, answer: str) -> Layout:
    may_have = tuple({*_MORE, *_SYSTEM, *_TOOLS, *_THOUGHTS, "history"} - {question})
    return Layout((question, answer), _pair(question, answer), may_have)


_PAIRS = dict.fromkeys((*_FIRST_PAIRS, *product(_QUESTIONS, _ANSWERS)))
_LAYOUTS = (
    Layout(("text",), _read_text),
    Layout(("messages",), _read_messages, (*_TOOLS, *_SYSTEM, "instance_id", "traj_id")),
    _layout_of_pair("prompt", "completion"),
    *(
        Layout((name,), _read_conversations(name), (*_TOOLS, *_SYSTEM, "chosen"))
        for name in ("conversations", "conversation")
    ),
    Layout(("query", "answers"), _read_calls, _TOOLS),
    Layout(("prompt", "body"), _read_story),
    Layout(("question", "choices"), _read_choices),
    Layout(("chosen",), _read_chosen, (*_QUESTIONS, *_SYSTEM)),
    *(_layout_of_pair(*pair) for pair in _PAIRS),
    Layout(("content",), _read_content, ("role",)),
)
_ALL_FIELDS = {name for layout in _LAYOUTS for name in (*layout.needs, *layout.may_have)}
_UNREADABLE = re.compile("[\0\ud800-\udfff]")


def _exchange(question: str, answer: str) -> Sample:
    return Sample(
        messages=(
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        )
    )


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _string(record: Record, name: str, where: str) -> str:
    if not isinstance(record[name], str):
        raise BadSampleError(f"{where}: {name} is {shown(record[name])}, expected text")
    return str(record[name])
