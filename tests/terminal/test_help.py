"""Every help is short, grouped and complete."""

from __future__ import annotations

import re

import click
import pytest
from click.testing import CliRunner

from reap2gguf.cli import cli
from reap2gguf.errors import ParameterError
from reap2gguf.pruning.counts import check_asked
from reap2gguf.quantizing.named import one_recipe
from reap2gguf.terminal.help import COMMAND_HEADINGS, SECTIONS, Command, Number, typed
from tests.test_cli import all_commands, run

COMMANDS = all_commands(cli)


def help_of(*command: str) -> str:
    result = CliRunner().invoke(cli, [*command, "--help"])
    assert result.exit_code == 0
    return result.output


def found_command(names: tuple[str, ...]) -> click.Command:
    command: click.Command = cli
    for name in names:
        assert isinstance(command, click.Group)
        command = command.commands[name]
    return command


@pytest.mark.parametrize("names", COMMANDS, ids=" ".join)
def test_the_first_line_is_one_short_sentence(names: tuple[str, ...]) -> None:
    first, rest = (found_command(names).help or "").split("\n", 1)
    assert len(first) <= 45
    assert first.endswith(".")
    assert rest.startswith("\n")


def test_every_command_is_listed_once_with_its_whole_summary() -> None:
    for group in ((), ("recipes",), ("mixes",)):
        found = found_command(group)
        assert isinstance(found, click.Group)
        lines = [line.strip() for line in help_of(*group).splitlines()]
        for name, command in found.commands.items():
            summary = (command.help or "").partition("\n")[0]
            listed = re.compile(rf"{name} +{re.escape(summary)}")
            assert sum(listed.fullmatch(line) is not None for line in lines) == 1


def test_commands_stand_under_headings() -> None:
    text = help_of()
    headings = [heading for heading in COMMAND_HEADINGS if f"\n{heading}:\n" in text]
    assert headings == list(COMMAND_HEADINGS)
    assert text.index("build") < text.index("\nStep by step") < text.index("  observe")
    assert "\nCommands:\n" not in text, "a command stands nowhere in COMMAND_HEADINGS"


def test_help_is_a_command_too() -> None:
    assert run("help").output == help_of()
    assert run("help", "build").output.splitlines() == help_of("build").splitlines()
    assert "Show which types a recipe gives" in run("help", "recipes", "check").output
    assert "did you mean build?" in run("help", "biuld").stderr
    assert "'build' has no commands of its own" in run("help", "build", "x").stderr


@pytest.mark.parametrize("names", COMMANDS, ids=" ".join)
def test_no_bounds_are_shown_and_every_option_is_explained(names: tuple[str, ...]) -> None:
    text = help_of(*names)
    assert not re.search(r"<=?x|x<=?", text)
    for parameter in found_command(names).params:
        if isinstance(parameter, click.Option):
            assert parameter.help
            assert parameter.opts[0] in text


def test_the_options_of_build_stand_in_sections() -> None:
    text = help_of("build")
    headings = re.findall(r"^([A-Z][\w ]+):$", text, re.MULTILINE)
    assert headings == [
        "What to prune",
        "What to write",
        "Calibration",
        "Which model",
        "What to compare",
        "Where to compute",
        "Other",
    ]
    assert [heading for heading in SECTIONS if heading in headings] == headings
    sections = dict(zip(headings, re.split(r"^[A-Z][\w ]+:\n", text, flags=re.M)[1:], strict=True))
    assert "--keep-experts" in sections["What to prune"]
    assert "--recipe" in sections["What to write"]
    assert "--samples" in sections["Calibration"]
    assert "--memory" in sections["Where to compute"]
    assert "--fresh" in sections["Other"]
    one_line = " ".join(text.split())
    for default in ("0.25", "1024, or the sum of the :n counts in SPEC", "all", "build", "42"):
        assert f"[default: {default}]" in one_line


def test_a_command_with_one_section_calls_it_options() -> None:
    assert "Options:\n" in help_of("recipes", "list")


@pytest.mark.parametrize(
    ("number", "value", "expected"),
    [
        (Number(), "1", 1),
        (Number(-5, 5), "-5", -5),
        (Number(0.0, 10.0), "2.5", 2.5),
        (Number(), "0", "'0' is not between 1 and 2,147,483,647"),
        (Number(2, 9), "10", "'10' is not between 2 and 9"),
        (Number(), "1.5", "'1.5' is not a whole number"),
        (Number(), "many", "'many' is not a whole number"),
        (Number(), "9" * 5000, "is not a whole number"),
        (Number(0.0, 10.0), "nan", "'nan' is not between 0.0 and 10.0"),
        (Number(0.0, 10.0), "warm", "'warm' is not a number"),
    ],
)
def test_numbers_are_checked(number: Number, value: str, expected: float | str) -> None:
    if not isinstance(expected, str):
        found = number.convert(value, None, None)
        assert (found, type(found)) == (expected, type(expected))
        return
    with pytest.raises(click.UsageError, match=re.escape(expected)):
        number.convert(value, None, None)


@pytest.mark.parametrize("names", COMMANDS, ids=" ".join)
def test_every_command_that_works_can_be_quiet_or_verbose(names: tuple[str, ...]) -> None:
    command = found_command(names)
    if isinstance(command, click.Group) or names == ("help",):
        return
    options = {name for parameter in command.params for name in parameter.opts}
    assert {"-v", "--verbose", "-q", "--quiet"} <= options


def test_a_shell_can_complete_commands_and_options() -> None:
    runner = CliRunner()

    def completed(instruction: str, words: str) -> str:
        environment = {
            "_REAP2GGUF_COMPLETE": instruction,
            "COMP_WORDS": words,
            "COMP_CWORD": str(len(words.split()) - 1),
        }
        result = runner.invoke(cli, [], prog_name="reap2gguf", env=environment)
        assert result.exit_code == 0
        return result.output

    assert "complete -o nosort -F _reap2gguf_completion reap2gguf" in completed("bash_source", "")
    assert "compdef _reap2gguf_completion reap2gguf" in completed("zsh_source", "")
    assert completed("bash_complete", "reap2gguf bui") == "plain,build\n"
    assert "plain,--quiet\n" in completed("bash_complete", "reap2gguf build --q")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("quantize", "m", "--recipe", "Q4_K_M,Q8_0", "-o", "o"), "--recipe is 'Q4"),
        (("build", "m", "--candidates", "reap", "--method", "reap"), "--candidates is for the"),
        (("build", "m", "--recipe", "a,,b"), "--recipe is 'a,,b', expected names"),
        (("prune", "m", "--group-size", "3", "-o", "o"), "--group-size is for the"),
    ],
)
def test_errors_name_options_as_they_are_typed(words: tuple[str, ...], expected: str) -> None:
    result = run(*words)
    assert result.exit_code == 2
    assert f"Error: {expected}" in result.output


def test_the_library_names_its_parameters() -> None:
    with pytest.raises(ParameterError, match=r"^recipe is 'a,,b'") as caught:
        one_recipe("a,,b")
    assert caught.value.names == ("recipe",)
    with pytest.raises(ParameterError, match=r"^group_size is for the method ream"):
        check_asked("reap", "none", 3)


def test_every_parameter_is_an_option_or_an_argument() -> None:
    """By the names of the library: those of the options that have other words."""
    parameters = {one.name: one for one in found_command(("build",)).params}
    assert typed(parameters["spec"], "spec") == "--calibration"
    assert typed(parameters["keep_experts"], "keep_experts") == "--keep-experts"
    assert typed(parameters["model"], "model") == "MODEL"
    assert typed(parameters["model"], "spec") == ""
    for names in COMMANDS:
        command = found_command(names)
        assert isinstance(command, click.Group | Command) or names == ("help",), names
