from __future__ import annotations

import copy
import json
import re
import shutil
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2.defaults
import pytest
from transformers import AutoTokenizer
from transformers.utils import chat_template_utils

from reap2gguf.errors import CalibrationError
from reap2gguf.tokenizer.template_worker import TODAY
from reap2gguf.tokenizer.templates import ChatTemplate
from reap2gguf.tokenizer.tokenizer import Tokenizer
from reap2gguf.tokenizer.tokenizer_files import MAX_TEMPLATE_BYTES
from tests.tiny import EXAMPLE

# in the manner of Qwen3: tools first, reasoning only after the last question, calls as XML
THINKING = """\
{%- macro parts(content) -%}
  {%- if content is string -%}{{ content }}
  {%- elif content is none or content is undefined -%}{{ '' }}
  {%- else -%}
    {%- for part in content -%}
      {%- if part.type == 'image' -%}<|image|>
      {%- elif 'text' in part -%}{{ part.text }}
      {%- endif -%}
    {%- endfor -%}
  {%- endif -%}
{%- endmacro -%}
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}
        {{- parts(messages[0].content) + '\\n\\n' }}
    {%- endif %}
    {{- "# Tools\\n<tools>" }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + parts(messages[0].content) + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(last=messages | length - 1, searching=true) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages | length - 1) - loop.index0 %}
    {%- if ns.searching and message.role == 'user' %}
        {%- set ns.searching = false %}
        {%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if loop.first and message.role == 'system' %}{% continue %}{% endif %}
    {%- if message.role == 'assistant' %}
        {{- '<|im_start|>assistant\\n' }}
        {% generation %}
        {%- set content = parts(message.content) %}
        {%- if '</think>' in content %}
            {%- set reasoning = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1] %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- else %}{%- set reasoning = message.reasoning_content | default('') %}{%- endif %}
        {%- if loop.index0 > ns.last and reasoning %}
            {{- '<think>\\n' + reasoning.strip('\\n') + '\\n</think>\\n\\n' }}
        {%- endif %}
        {{- content }}
        {%- for call in message.tool_calls or [] %}
            {%- set call = call.function or call %}
            {{- '\\n<tool_call>\\n{"name": "' ~ call.name ~ '", "arguments": ' }}
            {{- call.arguments if call.arguments is string else call.arguments | tojson(indent=1) }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {%- endgeneration %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role in ('user', 'tool', 'system') %}
        {{- '<|im_start|>' ~ message.role ~ '\\n' ~ parts(message.content) ~ eos_token ~ '\\n' }}
    {%- else %}
        {{- raise_exception('Unexpected role ' ~ message.role) }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant{% endif %}
"""
# what else templates do: dates, dicts, scopes, whitespace, formats, special tokens
ODD = """\
{{ bos_token | default('<none>') }}{{ pad_token }}{{ documents is none }} {{ tools is none }}
{% if strftime_now is defined %}
  Today is {{ strftime_now('%d %B %Y, %A %j') }}.
{% endif %}
{% set table = dict(a=1, b=[1, none, 'ß']) %}{{ table | tojson(indent=2, sort_keys=true) }}
{{ dict.fromkeys(['x', 'y']) }} {{ namespace(a='1').a }}
{% set x = 'outside' %}{% generation %}{% set x = 'inside' %}{{ x }}{% endgeneration %}{{ x }}
  {# a comment #}
{% for message in messages %}
  {% if loop.index0 > 2 %}{% break %}{% endif %}
  {{ '%s: %r' % (message['role'], message.content) }} {{ '{:>9}'.format(message.role) }}
  {{ message | tojson }} {{ message.get('thinking', '-') }} {{ message.items() | list | length }}
{% endfor %}
{{ messages | map(attribute='role') | unique | join(', ') | upper }}{{ undefined_thing }}
"""
FILTERS = """\
{{ -3 | abs }} {{ 'a' | attr('x') }} {{ [1, 2, 3] | batch(2) | list }} {{ 'ab' | capitalize }}
{{ 'a' | center(9) }} {{ [] | count }} {{ x | d('d') }} {{ x | default('e') }}
{{ {'b': 1, 'a': 2} | dictsort }} {{ '<' | e }} {{ '<' | escape }} {{ 12345678 | filesizeformat }}
{{ [1, 2] | first }} {{ 1.5 | float }} {{ '<' | forceescape }} {{ '%s' | format(1) }}
{{ [{'a': 1}] | groupby('a') | list | string }} {{ 'a\\nb' | indent }} {{ '7' | int }}
{{ {'a': 1} | items | list }} {{ [1, 2] | join('-') }} {{ [1, 2] | last }} {{ 'ab' | length }}
{{ 'ab' | list }} {{ 'AB' | lower }} {{ ['a'] | map('upper') | list }} {{ [1, 2] | max }}
{{ [1, 2] | min }} {{ {'a': [1]} | pprint }} {{ [1, 2] | reject('odd') | list }}
{{ [{'a': 1}] | rejectattr('a') | list }} {{ 'aa' | replace('a', 'b', 1) }}
{{ [1, 2] | reverse | list }} {{ 2.567 | round(1) }} {{ '<' | safe }}
{{ [1, 2] | select('odd') | list }} {{ [{'a': 1}] | selectattr('a') | list }}
{{ [1, 2, 3] | slice(2) | list }} {{ [2, 1] | sort }} {{ 1 | string }}
{{ '<b>a &amp; b</b>' | striptags }} {{ [1, 2] | sum }} {{ 'some words' | title }}
{{ {'a': '<'} | tojson }} {{ ' a ' | trim }} {{ 'some long words' | truncate(9) }}
{{ [1, 1] | unique | list }} {{ 'a' | upper }} {{ 'ä b' | urlencode }}
{{ 'see https://example.org' | urlize }} {{ 'some words' | wordcount }}
{{ 'some long words' | wordwrap(5) }} {{ {'a': 1} | xmlattr }}
"""
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a place <&'\"> 東京",
        "parameters": {"type": "object", "properties": {"place": {"type": "string"}}},
    },
}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"place": "Köln"}}}
USER = {"role": "user", "content": "Wie ist das Wetter? 🌦 \u2028 <script>"}
CHATS: list[list[dict[str, Any]]] = [
    [USER],
    [{"role": "system", "content": "Be brief."}, USER, {"role": "assistant", "content": "Rain."}],
    [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]},
     {"role": "tool", "content": '{"sky": "grey"}'}, {"role": "assistant", "content": "Grey."}],
    [USER, {"role": "assistant", "content": "", "tool_calls": None, "reasoning_content": "Hm.\n"}],
    [USER, {"role": "assistant", "content": "Rain.", "thinking": "Clouds."}],
    [USER, {"role": "assistant", "content": "Rain.", "reasoning": "Clouds.", "thinking": None}],
    [USER, {"role": "assistant", "content": "<think>\nClouds.\n</think>\n\nRain."}],
    [{"role": "user", "content": [{"type": "text", "text": "See"}, {"type": "image", "image": 1}]},
     {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]}],
    [{"role": "user", "content": "half a character: \ud83d"}],
    [{"role": "user", "content": 7.5,
      "when": datetime(2020, 1, 1), "tags": ["a", True, float("inf")]}],
]  # fmt: skip


def with_template(folder: Path, template: str | dict[str, str] | None) -> Path:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(EXAMPLE / name, folder / name)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    if isinstance(template, dict):
        config["chat_template"] = [
            {"name": name, "template": text} for name, text in template.items()
        ]
    elif template is not None:
        (folder / "chat_template.jinja").write_text(template)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def fixed_date(monkeypatch: pytest.MonkeyPatch) -> None:
    class Today(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:  # type: ignore[override]
            return TODAY

    monkeypatch.setattr(chat_template_utils, "datetime", Today)
    chat_template_utils._compile_jinja_template.cache_clear()


@pytest.mark.usefixtures("fixed_date")
@pytest.mark.parametrize("tools", [None, [TOOL], [TOOL, TOOL]], ids=["none", "one", "two"])
@pytest.mark.parametrize("template", [None, THINKING, ODD], ids=["example", "thinking", "odd"])
def test_the_text_is_that_of_transformers(
    template: str | None, tools: list[dict[str, Any]] | None, tmp_path: Path
) -> None:
    folder = with_template(tmp_path, template) if template else EXAMPLE
    ours, theirs = Tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    for chat in CHATS:
        given = copy.deepcopy(chat)
        try:
            expected = theirs.apply_chat_template(chat, tools=tools, tokenize=False)
        except (TypeError, ValueError, jinja2.TemplateError) as error:
            with pytest.raises(CalibrationError) as caught:
                ours.render_chat(chat, tools)
            assert str(error)[:40] in str(caught.value)
        else:
            assert ours.render_chat(chat, tools) == expected
        assert chat == given
    ours.close()


def test_every_filter_is_that_of_transformers() -> None:
    # one that opened a file at its first use would fail behind the limits
    names = set(re.findall(r"\| (\w+)", FILTERS))
    assert names >= set(jinja2.defaults.DEFAULT_FILTERS) - {"random"}
    ((expected,), _) = chat_template_utils.render_jinja_template([[USER]], chat_template=FILTERS)
    with ChatTemplate(FILTERS, {}) as ours:
        assert ours.render([USER]) == expected


def test_one_process_serves_many_samples_and_starts_again() -> None:
    with ChatTemplate("{{ messages[0].content }}{{ bos_token }}", {"bos_token": "<s>"}) as chat:
        for number in range(200):
            assert chat.render([{"content": str(number)}]) == f"{number}<s>"
        first = chat._process
        chat.close()
        assert chat.render([{"content": "again"}]) == "again<s>"
        assert chat._process is not first


def test_the_date_is_always_the_same() -> None:
    with ChatTemplate("{{ strftime_now('%Y-%m-%d') }}", {}) as chat:
        assert chat.render([]) == "2025-01-01"


def test_what_is_drawn_by_lot_is_always_the_same() -> None:
    template = "{{ range(1000) | random }} {{ lipsum(1) }}"
    texts = set()
    for _ in range(2):
        with ChatTemplate(template, {}) as chat:
            texts |= {chat.render([]), chat.render([])}
    assert len(texts) == 1


def test_named_templates(tmp_path: Path) -> None:
    names = {"default": "plain", "tool_use": "tools: {{ tools | length }}", "rag": "{{ nonsense("}
    ours = Tokenizer(with_template(tmp_path, names))
    assert ours.render_chat([USER]) == "plain"
    assert ours.render_chat([USER], [TOOL]) == "tools: 1"
    ours.close()
    with pytest.raises(CalibrationError, match="named 'a', 'b' and none named 'default'"):
        ChatTemplate({"a": "", "b": ""}, {}).render([USER])
    with ChatTemplate({"tool_use": "yes"}, {}) as only_tools:
        assert only_tools.render([USER], [TOOL]) == "yes"


def test_without_a_template_the_contents_follow_one_another(tmp_path: Path) -> None:
    ours = Tokenizer(with_template(tmp_path, None))
    assert ours.render_chat([{"content": "a"}, {"content": None}, {"content": "b"}]) == "a\n\nb"
    assert ours.render_chat(CHATS[7]) == "See\nA cat."
    ours.close()


def test_a_template_beyond_reason_is_not_read() -> None:
    ChatTemplate("x" * MAX_TEMPLATE_BYTES, {}).render([])
    with pytest.raises(CalibrationError, match="has 1,048,577 bytes, expected at most 1,048,576"):
        ChatTemplate("x" * (MAX_TEMPLATE_BYTES + 1), {}).render([])


def test_messages_beyond_reason() -> None:
    deep: Any = []
    for _ in range(2000):
        deep = [deep]
    with ChatTemplate("{{ messages | length }}", {}) as chat:
        with pytest.raises(CalibrationError, match="nested too deeply"):
            chat.render([{"content": deep}])
        with pytest.raises(CalibrationError, match="bytes of messages, expected at most"):
            chat.render([{"content": "x" * 2**26}])
        assert chat.render([{"content": "x" * (2**26 - 2**10)}]) == "1"
