"""Names that other programs have, and names that are mistyped."""

from __future__ import annotations

import re

import click
import pytest

from reap2gguf.cli import cli
from reap2gguf.terminal import suggestions
from tests.test_cli import all_commands, run


@pytest.mark.parametrize(
    ("words", "advice"),
    [
        ("upload build/x me/x", "there is no command 'upload'; use `reap2gguf push`"),
        ("convert x", "use `reap2gguf quantize`"),
        ("dry-run", "use `reap2gguf plan`"),
        ("Quantise x", "use `reap2gguf quantize`"),
        ("login", "use `hf auth login`"),
        ("plam", "did you mean plan?"),
        ("recipes lst", "there is no command 'lst'; did you mean list?"),
        ("build --push me/x", "there is no option --push; use `reap2gguf push` after the build"),
        ("push x me/x --yes", "nothing asks for confirmation"),
        ("build --output_dir x", "use --output"),
        ("build --dataset x", "use --calibration"),
        ("build --jsn", "did you mean --json?"),
        ("build --compresion 0.5", "did you mean --compression?"),
        ("quantize x --outtype bf16", "use --recipe"),
    ],
)
def test_advice(words: str, advice: str) -> None:
    result = run(*words.split())
    assert result.exit_code == 2
    assert advice in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("words", ["zebra", "build --zebra", "doctor --dataset x"])
def test_no_guess_is_better_than_a_silly_one(words: str) -> None:
    result = run(*words.split())
    assert result.exit_code == 2
    assert re.fullmatch(r"Error: there is no \w+ '?[-\w]+'? \(see `[^`]*`\)\n", result.stderr)


def test_no_advice_is_about_a_name_that_exists() -> None:
    commands = {" ".join(words) for words in all_commands(cli)}
    assert not commands & suggestions.COMMANDS.keys()
    for advice in suggestions.COMMANDS.values():
        for name in re.findall(r"`reap2gguf (\w[\w-]*)`", advice):
            assert name in commands


def test_advised_options_exist() -> None:
    known = {
        name
        for command in cli.commands.values()
        for parameter in command.params
        for name in parameter.opts
    }
    for option, advice in suggestions.OPTIONS.items():
        assert not advice.startswith("--") or advice.split()[0] in known, option
    assert isinstance(cli, click.Group)
