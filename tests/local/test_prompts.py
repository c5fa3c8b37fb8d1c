"""Templates of untrusted GGUF files: each failure is one line, and none takes long."""

from __future__ import annotations

from contextlib import closing
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from transformers import AutoTokenizer

from reap2gguf.cli import cli
from reap2gguf.errors import UsageError
from reap2gguf.gguf_files.reader import GgufHeader
from reap2gguf.local.engine import Engine
from reap2gguf.local.prompts import Prompts
from reap2gguf.local.running import AnswerOptions, EngineOptions
from tests.conftest import Bundle
from tests.local.altered import altered
from tests.tiny import EXAMPLE

HELLO = [{"role": "user", "content": "Hello"}]
# fail when they are compiled, before a model is loaded
BROKEN = {
    "a syntax error": ("{% if %}", "the chat template refuses it (line 1: "),
    "an unknown filter": ("{{ 1 | nothing }}", "No filter named 'nothing'"),
    "deep parentheses": ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "the chat template"),
    "a large template": (" " * 2**24, "bytes, expected at most"),
}
# fail when they are rendered
FAILING = {
    "adding text": ("{{ 1 + 'a' }}", "unsupported operand type"),
    "a division by zero": ("{% set x = 0 %}{{ 1 / x }}", "division by zero"),
    "recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    "a date of a number": ("{{ strftime_now(5) }}", "strftime"),
    "a long text": ("{{ 'a' * 10 ** 10 }}", "the chat template used more than 512 MiB of memory"),
    "an exception": ("{{ raise_exception('no\x1b[2J') }}", "(no\\x1b[2J)"),
    "an import": ("{% import 'os' as os %}", "the chat template refuses it"),
    "an attribute": (
        "{{ messages.__class__.mro() }}",
        "the chat template does something forbidden",
    ),
}
ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
LONG = "{% set x = 'a' * 999999 %}" + "{{ x }}" * 99


def header_with(template: Any, **others: Any) -> GgufHeader:
    tokens = {"tokenizer.ggml.tokens": ["<s>", "</s>"], "tokenizer.ggml.eos_token_id": 1}
    return GgufHeader(
        Path("x.gguf"), {**tokens, "tokenizer.chat_template": template, **others}, {}, 0
    )


@pytest.mark.parametrize("name", BROKEN)
def test_a_template_that_does_not_compile_is_refused(name: str) -> None:
    template, reason = BROKEN[name]
    other = {"tokenizer.chat_template.other": template}
    for header in (header_with(template), header_with("fine", **other)):
        with pytest.raises(UsageError) as caught:
            Prompts(Path("x.gguf"), header)
        said = str(caught.value)
        assert said.startswith("x.gguf: ")
        assert reason in said
        assert said.endswith("; use a file with another chat template")


@pytest.mark.parametrize("name", FAILING)
def test_a_template_that_fails_is_refused_for_each_question(name: str) -> None:
    template, reason = FAILING[name]
    prompts = Prompts(Path("x.gguf"), header_with(template))
    for _ in range(2):
        with pytest.raises(UsageError) as caught:
            prompts.render(HELLO)
        assert str(caught.value).startswith("x.gguf: the chat template ")
        assert reason in str(caught.value)
        assert str(caught.value).isprintable()
    prompts.close()


@pytest.mark.slow
def test_a_constant_that_takes_hours_is_refused_before_the_model_is_loaded() -> None:
    with pytest.raises(UsageError, match=r"the chat template (us|to)\w+ more than"):
        Prompts(Path("x.gguf"), header_with("{{ 9 ** (9 ** 9) }}"))


@pytest.mark.slow
@pytest.mark.parametrize("template", [ENDLESS, LONG])
def test_a_template_without_end_is_refused(template: str) -> None:
    prompts = Prompts(Path("x.gguf"), header_with(template))
    with pytest.raises(UsageError, match=r"the chat template (us|to|wr)\w+ more than"):
        prompts.render(HELLO)
    prompts.close()


@pytest.mark.parametrize("name", ["a syntax error", "adding text", "recursion"])
def test_chat_reports_it_in_one_line(name: str, built: Bundle, tmp_path: Path) -> None:
    template, reason = (BROKEN | FAILING)[name]
    path = altered(
        built.gguf / "example-BF16.gguf", tmp_path / "x.gguf", tokenizer__chat_template=template
    )
    result = CliRunner().invoke(cli, ["chat", str(path), "--prompt", "x", "--engine", "python"])
    assert result.exit_code == 2
    (line,) = result.output.splitlines()
    assert line.startswith(f"Error: {path}: the chat template ")
    assert reason in line


@pytest.mark.slow
def test_no_template_is_compiled_beside_the_model(built: Bundle, tmp_path: Path) -> None:
    """llama-cpp-python would compute the constant, in the memory of the machine."""
    template = "{% if false %}{{ ('a' * 10 ** 9) | length }}{% endif %}Hello"
    path = altered(
        built.gguf / "example-BF16.gguf", tmp_path / "x.gguf", tokenizer__chat_template=template
    )
    with closing(Engine(path, EngineOptions(256, 1, -1))) as engine:
        options = AnswerOptions(temperature=0.0, max_tokens=2)
        assert "".join(engine.pieces(HELLO, options))
        status = Path(f"/proc/{engine._process._process.pid}/status").read_text()
    assert int(status.partition("VmHWM:")[2].split()[0]) < 500_000


def test_a_prompt_is_what_transformers_writes() -> None:
    reference = AutoTokenizer.from_pretrained(EXAMPLE)
    assert isinstance(reference.chat_template, str)
    prompts = Prompts(Path("x.gguf"), header_with(reference.chat_template))
    expected = reference.apply_chat_template(HELLO, tokenize=False, add_generation_prompt=True)
    assert prompts.render(HELLO) == expected
    assert expected != reference.apply_chat_template(HELLO, tokenize=False)
    prompts.close()


def test_a_template_gets_tokens_variables_tools_and_the_date() -> None:
    template = (
        "{{ eos_token }}{{ bos_token }}|{{ enable_thinking }}|{{ tools | length }}|"
        "{{ strftime_now('%Y') }}"
    )
    prompts = Prompts(Path("x.gguf"), header_with(template))
    told = prompts.render(HELLO, [{"name": "f"}], {"enable_thinking": False})
    assert told == f"</s>|False|1|{datetime.now().year}"
    prompts.close()


def test_without_a_template_the_text_goes_on_as_it_is() -> None:
    prompts = Prompts(Path("x.gguf"), header_with(None))
    assert not prompts.has_template
    assert prompts.render([*HELLO, {"role": "user", "content": "And?"}]) == "Hello\nAnd?"
    prompts.close()
