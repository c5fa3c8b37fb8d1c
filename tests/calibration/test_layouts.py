"""Records of published data sets become the rows that transformers' template gives.

The records have the field names and the nesting of the published ones, and words of our own; the
messages and tools that each should become are written out by hand.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from reap2gguf.calibration.drawing import observation_rows
from reap2gguf.calibration.layouts import columns, read_record
from reap2gguf.calibration.spec import decide
from reap2gguf.calibration.tool_calls import SWE_AGENT_TOOLS
from reap2gguf.errors import BadSampleError, CalibrationError
from reap2gguf.options import CalibrationOptions
from reap2gguf.tokenizer.tokenizer import Tokenizer
from tests.tiny import EXAMPLE

# in the manner of Qwen3's; unlike it, it looks into schemas and arguments, as other models' do
TEMPLATE = """\
{%- if tools %}<|im_start|>system
{% for tool in tools %}{{ tool.function.name }}({% for name, of in \
tool.function.parameters.properties | items %}{{ name }}: {{ of.type }}, {% endfor %}) needs \
{{ tool.function.parameters.required | tojson }}
{{ tool | tojson }}
{% endfor %}<|im_end|>
{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}{% for call in m.tool_calls or [] %}
<tool_call {{ call.id }} {{ call.type }}>{{ call.function.name }}{% for name, value in \
call.function.arguments | items %} {{ name }}={{ value | tojson }}{% endfor %}</tool_call>\
{% endfor %}<|im_end|>
{% endfor %}"""


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str, *calls: tuple[str, str, dict[str, Any]]) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": text}
    if calls:
        message["tool_calls"] = [
            {"id": number, "type": "function", "function": {"name": name, "arguments": values}}
            for number, name, values in calls
        ]
    return message


WEATHER = {
    "name": "weather",
    "description": "What the sky does.",
    "parameters": {
        "city": {"description": "Where.", "type": "str"},
        "days": {"description": "How many.", "type": "int, optional", "default": 3},
        "hours": {"description": "Which.", "type": "List[int], optional", "default": ""},
    },
}
WEATHER_SCHEMA = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "What the sky does.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"description": "Where.", "type": "string"},
                "days": {"description": "How many.", "type": "integer", "default": 3},
                "hours": {"description": "Which.", "type": "array", "default": ""},
            },
            "required": ["city"],
        },
    },
}
XLAM = {
    "id": 7,
    "query": "Will it rain in Rome, and in Oslo?",
    "answers": json.dumps([
        {"name": "weather", "arguments": {"city": "Rome", "days": 1}},
        {"name": "weather", "arguments": {"city": "Oslo"}},
    ]),
    "tools": json.dumps([WEATHER]),
}  # fmt: skip
EDIT = {"command": "view", "path": "/testbed/a.py", "view_range": [1, 9]}
SWE_SMITH = {
    "messages": json.dumps([
        {"role": "system", "content": "You mend code.", "agent": "main", "message_type": "system"},
        {"role": "user", "content": [{"type": "text", "text": "It fails."},
                                     {"type": "text", "text": "Mend it."}]},
        {"role": "assistant", "content": "I look.", "thought": "I look.", "action": "view",
         "tool_calls": [{"function": {"arguments": json.dumps(EDIT), "name": "str_replace_editor"},
                         "id": "toolu_1", "type": "function", "index": 1}]},
        {"role": "tool", "content": [{"type": "text", "text": "1: x"}], "tool_call_ids": ["t"]},
        {"role": "assistant", "content": "Done.", "tool_calls": [
            {"function": {"arguments": "{}", "name": "submit"}, "type": "function"}]},
    ]),
    "instance_id": "owner__repo.1", "resolved": True, "model": "m", "traj_id": "t", "patch": "d",
}  # fmt: skip
CHAT = [user("Why is the sky blue?"), assistant("<think>\nLight.\n</think>\nIt scatters.")]
CASES: dict[str, tuple[dict[str, Any], list[dict[str, Any]], list[Any] | None]] = {
    "evol-codealpaca": (
        {"instruction": "Sort a list.", "output": "sorted(x)"},
        [user("Sort a list."), assistant("sorted(x)")], None),
    "alpaca": (
        {"instruction": "Sort.", "input": "3 1 2", "output": "1 2 3", "text": None},
        [user("Sort.\n\n3 1 2"), assistant("1 2 3")], None),
    "alpaca without input": (
        {"instruction": "Say hello.", "input": "", "output": "Hello."},
        [user("Say hello."), assistant("Hello.")], None),
    "dolly": (
        {"instruction": "Who?", "context": "Ann came.", "response": "Ann", "category": "qa"},
        [user("Who?\n\nAnn came."), assistant("Ann")], None),
    "Magicoder-Evol-Instruct": (
        {"instruction": "Add two.", "response": "a + b"}, [user("Add two."), assistant("a + b")],
        None),
    "Mixture-of-Thoughts": (
        {"messages": CHAT, "num_tokens": 11, "source": "x"}, CHAT, None),
    "ultrachat": (
        {"prompt": "Why?", "prompt_id": "0a", "messages": CHAT}, CHAT, None),
    "tulu": ({"id": "a", "messages": CHAT, "source": "x"}, CHAT, None),
    "xlam": (
        XLAM,
        [user("Will it rain in Rome, and in Oslo?"),
         assistant("", ("call00000", "weather", {"city": "Rome", "days": 1}),
                   ("call00001", "weather", {"city": "Oslo"}))],
        [WEATHER_SCHEMA]),
    "SWE-smith": (
        SWE_SMITH,
        [{"role": "system", "content": "You mend code."}, user("It fails.\nMend it."),
         assistant("I look.", ("toolu_1", "str_replace_editor", EDIT)),
         {"role": "tool", "content": "1: x"}, assistant("Done.", ("call00001", "submit", {}))],
        list(SWE_AGENT_TOOLS)),
    "ShareGPT": (
        {"id": "a", "system": "Be brief.", "conversations": [
            {"from": "human", "value": "Hi."}, {"from": "gpt", "value": "Hello."}]},
        [{"role": "system", "content": "Be brief."}, user("Hi."), assistant("Hello.")], None),
    "CodeFeedback": (
        {"query": "Reverse it.", "answer": "x[::-1]", "resource": "r", "lang": "python"},
        [user("Reverse it."), assistant("x[::-1]")], None),
    "WritingPrompts": (
        {"prompt": "A door in the sea.", "body": "It stood open."},
        [user("Write a story on this prompt:\n\nA door in the sea."), assistant("It stood open.")],
        None),
    "MMLU": (
        {"question": "2+2?", "subject": "sums", "choices": ["3", "4"], "answer": 1},
        [user("2+2?\nA. 3\nB. 4")], None),
    "prompt and completion": (
        {"prompt": "2+2?", "completion": "4"}, [user("2+2?"), assistant("4")], None),
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example's tokenizer, with a template that knows tools."""
    folder = tmp_path_factory.mktemp("model")
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        shutil.copyfile(EXAMPLE / name, folder / name)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def rows_of(path: Path, tokenizer: Tokenizer) -> list[list[int]]:
    calibration = decide(CalibrationOptions(f"{path}:1", max_length=4096))
    return [list(row) for row in observation_rows(tokenizer, calibration, 4096, 4096).rows]


@pytest.mark.parametrize("suffix", [pytest.param("jsonl", marks=pytest.mark.slow), "parquet"])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("template", ["example", "tools"])
def test_a_published_layout(
    name: str, suffix: str, template: str, model: Path, tmp_path: Path
) -> None:
    record, messages, tools = CASES[name]
    path = tmp_path / f"samples.{suffix}"
    if suffix == "jsonl":
        path.write_text(json.dumps(record) + "\n")
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([record]), path)
    folder = EXAMPLE if template == "example" else model
    reference = AutoTokenizer.from_pretrained(folder, model_max_length=10**9)
    text = reference.apply_chat_template(messages, tools=tools, tokenize=False)
    expected = reference(text, add_special_tokens=False)["input_ids"]
    assert rows_of(path, Tokenizer(folder)) == [list(expected)]


def test_tools_are_seen_by_the_template(model: Path) -> None:
    """The comparison above would hold for a template that leaves them out."""
    reference = AutoTokenizer.from_pretrained(model)
    _, messages, tools = CASES["xlam"]
    text = reference.apply_chat_template(messages, tools=tools, tokenize=False)
    assert 'weather(city: string, days: integer, hours: array, ) needs ["city"]' in text
    assert '<tool_call call00001 function>weather city="Oslo"</tool_call>' in text


def test_text_is_a_row_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "c4.jsonl").write_text(
        json.dumps({"text": "Plain words of the web.", "timestamp": "t", "url": "u"})
    )
    reference = AutoTokenizer.from_pretrained(EXAMPLE)
    ids = reference("Plain words of the web.", add_special_tokens=False)["input_ids"]
    assert rows_of(tmp_path / "c4.jsonl", Tokenizer(EXAMPLE)) == [list(ids)]


def test_trajectories_without_calls_have_no_tools() -> None:
    messages = json.dumps([user("Go."), assistant("<bash>ls</bash>")])
    assert read_record({"messages": messages, "traj_id": "t"}, "x").tools is None


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"a": 1, "b": 2}, r"x: has a, b, expected text, messages, conversations"),
        ({"query": "a", "answers": "{"}, "x: expected answers as a list of calls"),
        ({"query": "a", "answers": [1]}, "x: expected answers as a list of calls"),
        ({"query": 5, "answers": []}, "x: query is 5, expected text"),
        ({"query": "a", "answers": [], "tools": "["}, "x: tools are not JSON"),
        ({"conversations": [{"from": "alien", "value": "a"}]}, "x: a turn from 'alien'"),
        ({"conversations": [{"from": "gpt", "value": 5}]}, "x: content is 5, expected text"),
        ({"conversations": "a"}, "expected conversations as a list of turns"),
        ({"instruction": "a", "output": 5}, "x: output is 5, expected text"),
        ({"question": "a", "choices": [1]}, "x: expected choices as a list of texts"),
        ({"messages": [], "traj_id": "a"}, "x: expected messages"),
    ],
)
def test_records_that_are_wrong(record: dict[str, Any], message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        read_record(record, "x")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(
        st.sampled_from([
            "role", "content", "tool_calls", "function", "name", "arguments", "from", "value",
            "type", "text", "parameters", "id",
        ]),
        inner,
        max_size=4,
    ),
    max_leaves=12,
)  # fmt: skip
FIELDS = st.sampled_from([
    "text", "messages", "prompt", "completion", "conversations", "query", "answers", "answer",
    "instruction", "output", "input", "response", "tools", "traj_id", "system", "body",
    "question", "choices",
])  # fmt: skip


@given(st.dictionaries(FIELDS, JSON | JSON.map(json.dumps), min_size=1, max_size=4))
def test_any_record_is_read_or_refused(record: dict[str, Any]) -> None:
    try:
        sample = read_record(record, "x")
    except CalibrationError as error:
        assert str(error).startswith("x: ")
        return
    assert (sample.text is None) == bool(sample.messages)
    assert all(isinstance(message["role"], str) for message in sample.messages)
    json.dumps([list(sample.messages), sample.tools])


def test_what_is_nested_deeper_than_python_goes() -> None:
    deep: Any = "x"
    for _ in range(10**5):
        deep = [deep]
    function = {"name": "f", "arguments": {"what": deep}}
    called = {"role": "assistant", "tool_calls": [{"function": function}]}
    with pytest.raises(BadSampleError, match="x: nested deeper than 64 levels"):
        read_record({"messages": [called]}, "x")
    while isinstance(deep, list):  # an end of it all at once would go as deep
        (deep,) = deep


def test_only_the_columns_that_are_read() -> None:
    assert columns(list(SWE_SMITH)) == ["messages", "instance_id", "traj_id"]
    assert columns(["messages", "num_tokens", "source"]) == ["messages"]
    assert columns(["a", "b"]) == ["a", "b"], "so that an error can name them"


FLAT = {"name": "f", "parameters": {}}
WRAPPED = {"type": "function", "function": FLAT}


@pytest.mark.parametrize("name", ["system", "system_prompt"])
def test_a_system_prompt_beside_messages(name: str) -> None:
    asked = [user("hi"), assistant("yo")]
    found = read_record({name: "S", "messages": asked}, "x").messages
    assert found == ({"role": "system", "content": "S"}, *asked)
    own = [{"role": "system", "content": "T"}, *asked]
    assert read_record({name: "S", "messages": own}, "x").messages == tuple(own)
    assert name in columns(["messages", name, "other"])


CALL = {"name": "f", "arguments": {"a": 1}}


@pytest.mark.parametrize(
    "value",
    [json.dumps(CALL), json.dumps([CALL]), CALL, json.dumps({**CALL, "arguments": '{"a": 1}'})],
)
@pytest.mark.parametrize("keys", [("from", "value"), ("role", "content")])
def test_turns_of_calls_become_tool_calls(value: Any, keys: tuple[str, str]) -> None:
    turns = [("human", "hi"), ("function_call", value), ("observation", "42"), ("gpt", "yo")]
    record = {
        "conversations": [dict(zip(keys, turn, strict=True)) for turn in turns],
        "tools": json.dumps([FLAT]),
    }
    sample = read_record(record, "x")
    called = assistant("", ("call00000", "f", {"a": 1}))
    tool = {"role": "tool", "content": "42"}
    assert sample.messages == (user("hi"), called, tool, assistant("yo"))
    assert sample.tools == (WRAPPED,)


def test_a_turn_of_calls_that_is_broken_or_in_another_form() -> None:
    def read(text: str) -> Any:
        turns = [{"from": "human", "value": "hi"}, {"from": "function_call", "value": text}]
        return read_record({"conversations": turns}, "x").messages[1]

    assert read("<call>f</call>") == assistant("<call>f</call>")
    with pytest.raises(BadSampleError, match="a turn of calls is not JSON"):
        read('{"name": ')


@pytest.mark.parametrize(
    "tool",
    [FLAT, {"type": "function", **FLAT}, {"name": "f", "input_schema": {}}, WRAPPED],
)
@pytest.mark.parametrize("name", ["tools", "functions"])
def test_tools_are_wrapped_as_servers_do(tool: dict[str, Any], name: str) -> None:
    record = {"messages": [user("hi"), assistant("yo")], name: [tool]}
    assert read_record(record, "x").tools == (WRAPPED,)
    assert columns(["messages", name]) == ["messages", name]


@pytest.mark.parametrize("name", ["reasoning_content", "thinking", "reasoning", "Complex_CoT"])
def test_reasoning_beside_an_answer(name: str) -> None:
    record = {"Question": "q", name: "because", "Response": "a"}
    answer = {**assistant("a"), "reasoning_content": "because"}
    assert read_record(record, "x").messages == (user("q"), answer)
    assert columns([*record, "id"]) == list(record)
    thought = assistant("<think>\nso\n</think>\na")
    own = read_record({**record, "Response": thought["content"]}, "x")
    assert own.messages == (user("q"), thought)


@pytest.mark.parametrize("name", ["reasoning_content", "thinking", "reasoning"])
def test_reasoning_in_a_turn_has_the_name_that_templates_read(name: str) -> None:
    for turn in ({"role": "assistant", "content": "a"}, {"from": "gpt", "value": "a"}):
        record = {"messages": [user("q"), {**turn, name: "because"}]}
        assert read_record(record, "x").messages[1]["reasoning_content"] == "because"


@pytest.mark.parametrize("keys", [("role", "value"), ("from", "content")])
def test_turns_with_one_name_of_each_form(keys: tuple[str, str]) -> None:
    turns = [dict(zip(keys, turn, strict=True)) for turn in (("user", "q"), ("assistant", "a"))]
    found = read_record({"conversations": turns}, "x").messages
    assert [(m["role"], m["content"]) for m in found] == [("user", "q"), ("assistant", "a")]
