"""Target sizes on the command line and in a config file: what they ask for, and what wins."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from reap2gguf.options import BuildOptions
from reap2gguf.terminal import build_commands
from tests.test_cli import one_line, run
from tests.tiny import EXAMPLE

GIB = 2**30


class _Caught(Exception):
    """Ends a command where its plan would begin."""


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs a command up to its plan; the options that it would plan with."""

    def ask(*arguments: object) -> BuildOptions:
        found: list[BuildOptions] = []

        def plan(options: BuildOptions, **_: Any) -> None:
            found.append(options)
            raise _Caught

        monkeypatch.setattr(build_commands.reap2gguf, "plan", plan)
        run(*arguments)
        return found[0]

    return ask


def sizes(options: BuildOptions) -> tuple[object, ...]:
    return (
        *(options.target_size, options.target_bpw, options.fit, options.fit_context),
        options.recipes,
    )


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((), (None, None, None, None, ("Q4_K_M",))),
        (("--target-size", "12GiB"), (12 * GIB, None, None, None, ())),
        (("--target-size", "12GB", "-r", "Q4_K_M"), (12 * 10**9, None, None, None, ("Q4_K_M",))),
        (("--target-bpw", "4.25"), (None, 4.25, None, None, ())),
        (("--fit", "16GB", "--fit-context", "4096"), (None, None, 16 * 10**9, 4096, ())),
    ],
)
def test_what_is_asked_for(
    asked: Any, arguments: tuple[str, ...], expected: tuple[object, ...]
) -> None:
    for command in ("plan", "build"):
        assert sizes(asked(command, EXAMPLE, *arguments)) == expected


def test_the_command_line_wins_over_a_file(asked: Any, tmp_path: Path) -> None:
    config = tmp_path / "build.toml"
    config.write_text('fit = "16GB"\nfit-context = 4096\n')
    of_file = asked("plan", EXAMPLE, "--config", config)
    assert sizes(of_file) == (None, None, 16 * 10**9, 4096, ())
    other = asked("plan", EXAMPLE, "--config", config, "--target-bpw", "4")
    assert sizes(other) == (None, 4.0, None, None, ())
    same = asked("plan", EXAMPLE, "--config", config, "--fit-context", "512")
    assert sizes(same) == (None, None, 16 * 10**9, 512, ())
    config.write_text('target-size = "12GiB"\nrecipe = "Q8_0"\n')
    assert sizes(asked("plan", EXAMPLE, "--config", config)) == (
        *(12 * GIB, None, None, None),
        ("Q8_0",),
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--target-size", "12GiB", "--fit", "16GB"), "pass one of"),
        (("--fit-context", "4096"), "pass --fit"),
        (("--target-size", "12"), "no unit"),
        (("--target-bpw", "17"), "--target-bpw"),
        (("--target-size", "1KiB"), "pass at least --target-size"),
    ],
)
def test_what_is_refused(arguments: tuple[str, ...], words: str) -> None:
    one_line(run("plan", EXAMPLE, *arguments), words)


def test_recipes_fit_needs_one_target(tmp_path: Path) -> None:
    imatrix = tmp_path / "x.gguf"
    base = ("recipes", "fit", EXAMPLE, "--imatrix", imatrix, "-o", tmp_path / "x.toml")
    one_line(run(*base), "pass one of --target-size, --target-bpw and --fit")
    one_line(run(*base, "--fit", "1GB", "--target-bpw", "4"), "pass one of")
