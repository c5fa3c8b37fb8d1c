"""Samples in the shapes that people have become rows that hold their whole text.

The template prints content only where it is text, as those of text models do, and looks into the
arguments of tool calls.
"""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from transformers import AutoTokenizer

from reap2gguf.artifacts.texts import ObservationRows
from reap2gguf.calibration import drawing
from reap2gguf.calibration.drawing import observation_rows
from reap2gguf.calibration.samples import Skipped
from reap2gguf.calibration.spec import decide
from reap2gguf.errors import BadSampleError, CalibrationError
from reap2gguf.options import CalibrationOptions
from reap2gguf.progress import Silent
from reap2gguf.tokenizer.tokenizer import Tokenizer
from tests.calibration.reading import reading
from tests.tiny import EXAMPLE

TEMPLATE = """\
{%- for m in messages %}
{%- if m.role in ('user', 'system', 'assistant', 'tool') %}
{{- '<|im_start|>' + m.role + '\n' }}
{%- if m.content is string %}{{- m.content.split('</think>')[-1] | trim }}{%- endif %}
{%- for call in m.tool_calls or [] %}
{{- '\n' + call.function.name + '(' }}
{%- for name, value in call.function.arguments | items %}{{- name ~ '=' ~ value }}{%- endfor %}
{{- ')' }}
{%- endfor %}
{{- '<|im_end|>\n' }}
{%- endif %}
{%- endfor %}"""
# reads lists of parts as well, as those of models with vision do
PARTS = TEMPLATE.replace(
    "{%- endif %}\n{%- for call",
    "{%- elif m.content %}{%- for part in m.content %}{{- part.text if part.type == 'text' else "
    "'<image>' }}{%- endfor %}{%- endif %}\n{%- for call",
)
ASKED = "Where does the river begin?"
SAID = "It begins under the ice of the high mountains, and is cold all year."


class Notes(Silent):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def user(content: Any = ASKED, **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": content, **more}


def assistant(content: Any = SAID, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def printed(*turns: tuple[str, str]) -> str:
    return "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in turns)


BOTH = printed(("user", ASKED), ("assistant", SAID))


def text_part(text: str, kind: str = "text") -> dict[str, Any]:
    return {"type": kind, "text": text}


def called(arguments: Any, **more: Any) -> dict[str, Any]:
    """A conversation with one tool call; `more` is the content, if there is any."""
    call = {"id": "c", "type": "function", "function": {"name": "look", "arguments": arguments}}
    turn = {"role": "assistant", **more, "tool_calls": [call]}
    return {"messages": [user(), turn, {"role": "tool", "content": "Ice."}, assistant()]}


def after_call(arguments: str) -> str:
    return printed(
        ("user", ASKED),
        ("assistant", f"\nlook({arguments})"),
        ("tool", "Ice."),
        ("assistant", SAID),
    )


def turns(*pairs: tuple[str, str], name: str = "conversations") -> dict[str, Any]:
    return {name: [{"from": role, "value": value} for role, value in pairs]}


RIVER = {"place": "river"}
TOLD = after_call("place=river")
LEGACY = assistant(None, function_call={"name": "look", "arguments": '{"place": "river"}'})
SHAPES: dict[str, tuple[dict[str, Any], str]] = {
    "parts": ({"messages": [user([text_part(ASKED)]), assistant([text_part(SAID)])]}, BOTH),
    "several parts": (
        {"messages": [user([text_part("One."), "Two."]), assistant()]},
        printed(("user", "One.\nTwo."), ("assistant", SAID))),
    "parts by other names": (
        {"messages": [user([text_part(ASKED, "input_text")]),
                      assistant([text_part(SAID, "output_text")])]}, BOTH),
    "a part that is no list": ({"messages": [user(text_part(ASKED)), assistant()]}, BOTH),
    "a part with null fields": (
        {"messages": [user([{"type": None, "text": ASKED, "image": None}]), assistant()]}, BOTH),
    "absent content": (called(RIVER), TOLD),
    "null content": (called(RIVER, content=None), TOLD),
    "empty content": (called(RIVER, content=""), TOLD),
    "arguments as text": (called(json.dumps(RIVER)), TOLD),
    "arguments as text in text": (called(json.dumps(json.dumps(RIVER))), TOLD),
    "arguments that are empty": (called(""), after_call("")),
    "arguments that are null": (called(None), after_call("")),
    "arguments that are null as text": (called("null"), after_call("")),
    "a call without a function": (
        {"messages": [user(), assistant("", tool_calls=[{"name": "look", "arguments": RIVER}]),
                      {"role": "tool", "content": "Ice."}, assistant()]}, TOLD),
    "calls as text": (
        {"messages": [user(), assistant("", tool_calls=json.dumps([
            {"function": {"name": "look", "arguments": RIVER}}])),
            {"role": "tool", "content": "Ice."}, assistant()]}, TOLD),
    "a function call of old": (
        {"messages": [user(), LEGACY, {"role": "function", "name": "look", "content": "Ice."},
                      assistant()]}, TOLD),
    "an object that a tool returned": (
        {"messages": [*called(RIVER)["messages"][:2], {"role": "tool", "content": {"a": ["é"]}}]},
        printed(("user", ASKED), ("assistant", "\nlook(place=river)"), ("tool", '{"a": ["é"]}'))),
    "reasoning alone": (
        {"messages": [user(), {"role": "assistant", "reasoning_content": "Hm."}]},
        printed(("user", ASKED), ("assistant", ""))),
    "reasoning that the template drops": (
        {"messages": [user(), assistant(f"<think>\n{SAID * 9}\n</think>\n\n{SAID}")]}, BOTH),
    "a system message without content": (
        {"messages": [{"role": "system", "content": None}, user(), assistant()]}, BOTH),
    "a developer": (
        {"messages": [{"role": "developer", "content": "Be brief."}, user(), assistant()]},
        printed(("system", "Be brief.")) + BOTH),
    "roles in other letters": (
        {"messages": [{"role": "User", "content": ASKED}, {"role": "Bot", "content": SAID}]}, BOTH),
    "turns under messages": (turns(("human", ASKED), ("gpt", SAID), name="messages"), BOTH),
    "Human and bot": (turns(("Human", ASKED), ("bot", SAID)), BOTH),
    "GPT first": (
        turns(("GPT", "Hello."), ("USER", ASKED), ("ASSISTANT", SAID)),
        printed(("assistant", "Hello.")) + BOTH),
    "tools in turns": (
        turns(("human", ASKED), ("function_call", "look()"), ("observation", "Ice."),
              ("model", SAID)),
        printed(("user", ASKED), ("assistant", "look()"), ("tool", "Ice."), ("assistant", SAID))),
    "a developer's turn": (
        turns(("developer", "Be brief."), ("human", ASKED), ("gpt", SAID)),
        printed(("system", "Be brief.")) + BOTH),
    "texts in turn": ({"conversations": [ASKED, SAID]}, BOTH),
    "one conversation": ({"conversation": [user(), assistant()]}, BOTH),
    "GSM8K": ({"question": ASKED, "answer": SAID}, BOTH),
    "problem": ({"problem": ASKED, "solution": SAID, "answer": "ice"}, BOTH),
    "question and response": (
        {"system_prompt": "Be brief.", "question": ASKED, "response": SAID},
        printed(("system", "Be brief.")) + BOTH),
    "query": ({"query": ASKED, "response": SAID}, BOTH),
    "input": ({"input": ASKED, "output": SAID}, BOTH),
    "input with an empty instruction": ({"instruction": "", "input": ASKED, "output": SAID}, BOTH),
    "input of messages": ({"input": [user()], "output": SAID, "system_prompt": ""}, BOTH),
    "human and assistant": ({"human": ASKED, "assistant": SAID}, BOTH),
    "large letters": ({"Question": ASKED, "Answer": SAID}, BOTH),
    "all four": (
        {"instruction": ASKED, "input": "Say it.", "output": SAID, "response": None},
        printed(("user", f"{ASKED}\n\nSay it."), ("assistant", SAID))),
    "history": (
        {"instruction": ASKED, "output": SAID, "history": [["Hi.", "Hello."]], "system": "Brief."},
        printed(("system", "Brief."), ("user", "Hi."), ("assistant", "Hello.")) + BOTH),
    "chosen messages": ({"prompt": ASKED, "chosen": [user(), assistant()], "rejected": []}, BOTH),
    "chosen answer": ({"prompt": [user()], "chosen": [assistant()], "rejected": [user()]}, BOTH),
    "chosen text": ({"prompt": ASKED, "chosen": SAID, "rejected": "Hm."}, BOTH),
    "chosen alone": ({"chosen": f"Human: {ASKED}", "rejected": ""}, f"Human: {ASKED}"),
    "chosen turn": (
        {**turns(("human", ASKED)), "chosen": {"from": "gpt", "value": SAID}}, BOTH),
    "code": ({"content": f"# {SAID}", "path": "a.py"}, f"# {SAID}"),
    "null beside it": ({"text": None, "messages": [user(), assistant()], "system": None}, BOTH),
    "empty beside it": ({"text": "", "messages": [user(), assistant()]}, BOTH),
}  # fmt: skip


def model_with(template: str, folder: Path) -> Tokenizer:
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        shutil.copyfile(EXAMPLE / name, folder / name)
    (folder / "chat_template.jinja").write_text(template)
    return Tokenizer(folder)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return model_with(TEMPLATE, tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def with_vision(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return model_with(PARTS, tmp_path_factory.mktemp("parts"))


def write(path: Path, *records: Any) -> Path:
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(records)), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(records, indent=1))
    else:
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def drawn(
    path: Path, tokenizer: Tokenizer, notes: Notes | None = None, **options: Any
) -> ObservationRows:
    calibration = decide(CalibrationOptions(str(path), max_length=4096, **options))
    return observation_rows(tokenizer, calibration, 4096, 4096, notes or Notes())


@cache
def _decoder() -> Any:
    return AutoTokenizer.from_pretrained(EXAMPLE)


def decoded(row: Any) -> str:
    return str(_decoder().decode(list(row)))


def texts_of(path: Path, tokenizer: Tokenizer, notes: Notes | None = None) -> list[str]:
    return [decoded(row) for row in drawn(path, tokenizer, notes).rows]


# a column of Parquet has one type
MIXED = {
    "an object that a tool returned",
    "several parts",
    "a part that is no list",
    "a part with null fields",
}


@pytest.mark.parametrize(
    ("name", "suffix"),
    [(name, "jsonl") for name in SHAPES]
    + [pytest.param(name, "json", marks=pytest.mark.slow) for name in SHAPES]
    + [(name, "parquet") for name in SHAPES if name not in MIXED],
)
def test_a_row_holds_the_text_of_its_sample(
    name: str, suffix: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    record, text = SHAPES[name]
    notes = Notes()
    assert texts_of(write(tmp_path / f"a.{suffix}", record), tokenizer, notes) == [text]
    assert "skipped" not in notes.notes[0]


IMAGE = {"type": "image_url", "image_url": {"url": "data:,"}}


def test_images_are_dropped_and_counted_by_a_template_of_text(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    record = {"messages": [user([IMAGE, text_part(ASKED), {"type": "image"}]), assistant()]}
    notes = Notes()
    alone = {"messages": [user([IMAGE])]}
    path = write(tmp_path / "a.jsonl", record, alone)
    assert texts_of(path, tokenizer, notes) == [BOTH]
    assert "skipped 1 sample of under 2 tokens" in notes.notes[0]
    assert notes.notes[0].endswith(
        "; dropped 3 images, videos or sounds, which the chat template cannot show"
    )


def test_a_template_that_reads_parts_gets_the_images(
    with_vision: Tokenizer, tmp_path: Path
) -> None:
    records = [
        {"messages": [user([IMAGE, text_part(ASKED)]), assistant()]},
        {"messages": [user([text_part("One."), text_part("Two.")]), assistant()]},
    ]
    notes = Notes()
    assert sorted(texts_of(write(tmp_path / "a.jsonl", *records), with_vision, notes)) == [
        printed(("user", f"<image>{ASKED}"), ("assistant", SAID)),
        printed(("user", "One.Two."), ("assistant", SAID)),
    ]
    assert "dropped" not in notes.notes[0]


GOOD = {"messages": [user(), assistant()]}
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "null text": ({"text": None}, "text is null"),
    "a number": ({"text": 5}, "text is 5, expected text"),
    "a null turn": (turns(("human", ASKED)) | {"conversations": [{"from": "gpt", "value": None}]},
                    "a message of 'assistant' has no content"),
    "a question without content": ({"messages": [{"role": "user"}]},
                                   "a message of 'user' has no content"),
    "content of another type": ({"messages": [user(5)]}, "content is 5, expected text or a list"),
    "a part without text": ({"messages": [user([{"type": "text"}])]}, "a part of content has no"),
    "broken arguments": (called('{"place": river'), "the arguments of 'look' are not JSON"),
    "a list of arguments": (called("[1]"), "the arguments of 'look' are [1], expected a JSON obj"),
    "a call without a name": (
        {"messages": [assistant("", tool_calls=[{"function": {}}])]}, "a tool call is {'function'"),
    "calls that are a number": ({"messages": [assistant("", tool_calls=5)]}, "tool_calls is 5"),
    "messages that break off": ({"messages": '[{"role": "user"'}, "messages are not JSON"),
    "half a character": ({"text": "a\ud800"}, "holds half a character (a surrogate), at letter 2"),
    "half a character in a message": ({"messages": [user("\udc00")]}, "holds half a character"),
    "a NUL": ({"messages": [user("ab\0")]}, "holds a NUL character, at letter 3 of a text"),
    "no number": (called({"x": float("nan")}), "holds nan, which is not a number of JSON"),
    "a number without end": (called('{"x": 1e999}'), "holds inf, which is not a number of JSON"),
    "a role that is not printed": (
        {"messages": [{"role": "narrator", "content": ASKED}, assistant()]},
        f"the chat template prints 0 of {len(ASKED)} letters of the messages by 'narrator'"),
    "a history of one": ({"instruction": "a", "output": "b", "history": [["x"]]}, "history has"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_bad_sample_is_skipped_and_counted(
    name: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    record, reason = BAD[name]
    notes = Notes()
    path = write(tmp_path / "a.jsonl", *[GOOD] * 9, record)
    rows = drawn(path, tokenizer, notes)
    assert len(rows.rows) == 9
    assert (
        f"; skipped 1 of 10 samples, which cannot be used (the first: {path}: sample 10: "
        in (notes.notes[0])
    )
    assert reason in notes.notes[0]
    assert [one.skipped for one in rows.components] == [1]


@pytest.mark.parametrize("name", BAD)
def test_more_than_a_tenth_of_bad_samples_is_an_error(
    name: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    record, reason = BAD[name]
    path = write(tmp_path / "a.jsonl", *[GOOD] * 8, record)
    with pytest.raises(CalibrationError) as caught:
        drawn(path, tokenizer)
    said = str(caught.value)
    assert said.startswith(f"{path}: sample 9: ")
    assert reason in said
    assert said.endswith(
        "; 1 of 9 samples cannot be used, and at most 10 % may be skipped; fix or remove them"
    )


def test_others_take_the_places_of_those_that_are_skipped(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    records: list[Any] = [{"text": f"This is text number {n}."} for n in range(40)]
    for n in (3, 17, 31):
        records[n] = {"text": None}
    for n in range(5, 15):
        records[n] = {"text": " \n"}
    notes = Notes()
    path = write(tmp_path / "a.jsonl", *records)
    assert len(drawn(path, tokenizer, notes, samples=27).rows) == 27
    assert "skipped 3 of 39 samples" in notes.notes[0]
    assert notes.notes[0].endswith("; skipped 9 samples of under 2 tokens")
    assert len(drawn(path, tokenizer, notes, samples=28).rows) == 27
    assert "skipped 3 of 40 samples" in notes.notes[1]
    packed = drawn(path, tokenizer, Notes(), samples=1000, pack=True)
    assert packed.components[0].samples == 27


def test_a_folder_names_the_files_that_are_not_read(tokenizer: Tokenizer, tmp_path: Path) -> None:
    write(tmp_path / "a.json", GOOD)
    (tmp_path / "notes.md").write_text("x")
    (tmp_path / "more.jsonl.gz").write_bytes(b"\x1f\x8b")
    notes = Notes()
    assert texts_of(tmp_path, tokenizer, notes) == [BOTH]
    assert notes.notes[0].endswith("; files that are not read: more.jsonl.gz, notes.md")


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"messages": [user([{"type": "tool_use", "id": "x"}])]}, "a part of content has the type"),
        (turns(("alien", ASKED)), "a turn from 'alien', expected one of system, developer, human"),
        ({"left": 1, "Right": 2}, "has left, Right, expected text, messages"),
        (
            {"role": "user", "content": ASKED},
            "one message with a role and content, expected a whole",
        ),
        ([1], "a list, expected an object"),
    ],
)
def test_what_is_not_known_is_refused_however_rare(
    record: Any, reason: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    path = write(tmp_path / "a.jsonl", *[GOOD] * 50, record)
    with pytest.raises(CalibrationError) as caught:
        drawn(path, tokenizer)
    assert str(caught.value).startswith(f"{path}: sample 51: {reason}")


def shown(template_output: str, *messages: dict[str, Any]) -> Skipped:
    """What is counted of a conversation that a template prints in this way."""
    reader = reading(lambda messages, tools: template_output)
    reader.text({"messages": list(messages)}, "x")
    return reader.skipped


LONG = "\n".join(f"Line {n} has its own words." for n in range(200))


@pytest.mark.parametrize(
    ("output", "messages", "n_bad"),
    [
        ("<user><bot>", [user(), assistant()], 1),
        (f"<user><bot>{SAID}", [user(), assistant()], 1),
        (f"{ASKED}", [user(), assistant()], 1),
        (f"{ASKED} {SAID}", [user(), assistant()], 0),
        (f"{ASKED} {SAID}", [{"role": "system", "content": LONG}, user(), assistant()], 0),
        ("nothing", [{"role": "system", "content": LONG}], 1),
        (f"{ASKED} {SAID}", [user(), assistant(LONG, tool_calls=[{"name": "f"}]), assistant()], 0),
        (ASKED + json.dumps(LONG), [user(), assistant(LONG)], 0),
        (ASKED + LONG.replace("\n", "\n  "), [user(), assistant(LONG)], 0),
        (ASKED + LONG[: len(LONG) // 4], [user(), assistant(LONG)], 1),
        (str([text_part(ASKED)]) + SAID, [user(), assistant()], 0),
    ],
)  # fmt: skip
def test_no_text_is_lost_in_silence(
    output: str, messages: list[dict[str, Any]], n_bad: int
) -> None:
    assert shown(output, *messages).n_bad == n_bad


def test_a_stream_that_is_mostly_broken_ends_early() -> None:
    skipped = Skipped()

    def read_all() -> None:
        for _ in range(2000):
            skipped.n_read += 1
            skipped.add_bad(BadSampleError("x: bad"))

    with pytest.raises(CalibrationError, match=r"^x: bad; 1,000 of 1,000 samples cannot be used"):
        read_all()


def test_samples_that_the_template_refuses_follow_the_same_rule(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    strict = "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}"
    strict += "{% endif %}{{ m.content }}{% endfor %}"
    tokenizer = model_with(strict, tmp_path_factory.mktemp("strict"))
    refused = {"messages": [user(), {"role": "tool", "content": "Ice."}]}
    notes = Notes()
    path = write(tmp_path / "a.jsonl", refused, *[GOOD] * 9)
    assert len(drawn(path, tokenizer, notes).rows) == 9
    assert f"{path}: sample 1: the chat template refuses it (no tools)" in notes.notes[0]
    write(path, refused, *[GOOD] * 8)
    with pytest.raises(CalibrationError, match=r"sample 1: .*\(no tools\).*; 1 of 9 samples"):
        drawn(path, tokenizer)
    tokenizer.close()


@pytest.mark.slow
def test_a_template_that_never_ends_is_no_matter_of_one_sample(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    endless = "{% for m in messages %}{% if m.content == 'x' %}{% for a in range(99999) %}"
    endless += "{% for b in range(99999) %}{% endfor %}{% endfor %}{% endif %}{{ m.content }}"
    tokenizer = model_with(endless + "{% endfor %}", tmp_path_factory.mktemp("endless"))
    path = write(tmp_path / "a.jsonl", *[GOOD] * 30, {"messages": [user("x")]})
    with pytest.raises(
        CalibrationError, match=r"sample 31: the chat template (us|to)\w+ more than"
    ):
        drawn(path, tokenizer)


@pytest.mark.parametrize("pack", [False, True])
def test_a_dataset_on_the_hub_follows_the_same_rule(
    pack: bool, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bad records of a stream are replaced by later ones, in each of the layouts of files."""
    shapes = [record for record, _ in SHAPES.values()]
    records = [{"text": None}, *shapes, {"text": ""}, *shapes, {"text": "never read"}]
    stream = iter(records)
    monkeypatch.setattr(drawing, "open_dataset", lambda *arguments: ("c" * 40, stream))
    notes = Notes()
    spec = "owner/name" if pack else f"owner/name:{2 * len(SHAPES)}"
    options = CalibrationOptions(spec, samples=None if not pack else 9999, pack=pack)
    found = observation_rows(tokenizer, decide(options), 2**16, 4096, notes)
    assert "(the first: calibration owner/name: sample 1: text is null)" in notes.notes[0]
    assert notes.notes[0].endswith(
        "; skipped 1 sample of under 2 tokens; the chat template does not print the reasoning in 2 "
        "of the samples"
    )
    if pack:
        text = "".join(map(decoded, found.rows))
        assert text == "".join(text for _, text in SHAPES.values()) * 2 + "never read"
    else:
        expected = [text for _, text in SHAPES.values()] * 2
        assert sorted(map(decoded, found.rows)) == sorted(expected)
        assert next(stream) == {"text": "never read"}


def test_reasoning_that_the_template_does_not_print_is_said() -> None:
    record = {"question": ASKED, "reasoning": "Rivers need rain.", "answer": SAID}
    reader = reading(lambda messages, tools: ASKED + SAID)
    assert reader.text(record, "x") == ASKED + SAID
    assert reader.note() == "the chat template does not print the reasoning in 1 of the samples"
    whole = reading(lambda messages, tools: f"{ASKED}{messages[1]['reasoning_content']}{SAID}")
    assert whole.text(record, "x") == f"{ASKED}Rivers need rain.{SAID}"
    assert not whole.note()
