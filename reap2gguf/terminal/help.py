"""Help in sections, and a number type that keeps its bounds out of the help."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, TypeVar

import click

from reap2gguf.errors import ParameterError, UsageError
from reap2gguf.messages import shown

F = TypeVar("F", bound=Callable[..., Any])
# headings of `--help`, in the order in which they are printed
PRUNE: Final = "What to prune"
WRITE: Final = "What to write"
CALIBRATION: Final = "Calibration"
MEASURE: Final = "What to measure"
PROGRAMS: Final = "Programs that models write"
MODEL: Final = "Which model"
ANSWER: Final = "How to answer"
SERVER: Final = "Where to listen"
CHECKS: Final = "What to compare"
COMPUTE: Final = "Where to compute"
OTHER: Final = "Other"
SECTIONS = (
    PRUNE,
    WRITE,
    MEASURE,
    PROGRAMS,
    CALIBRATION,
    MODEL,
    ANSWER,
    SERVER,
    CHECKS,
    COMPUTE,
    OTHER,
)
# headings of the program's own help, and the commands below each; a command that stands nowhere
# here comes last, under "Commands"
COMMAND_HEADINGS: Final[Mapping[str, Sequence[str]]] = {
    "The whole job": ("plan", "build", "add"),
    "Step by step": (
        *("observe", "observations", "inspect", "choose", "prune", "imatrix", "quantize"),
        "bundle",
    ),
    "With a finished bundle": ("verify", "evaluate", "compare", "report", "chat", "serve", "push"),
    "Recipes, texts and help": ("recipes", "mixes", "example", "help"),
    "This machine": ("doctor", "jobs"),
}
MOST: Final = 2**31 - 1


class Option(click.Option):
    """An option with the section of the help that lists it, and a default in words."""

    def __init__(
        self, *arguments: Any, section: str = OTHER, default_text: str = "", **named: Any
    ) -> None:
        if default_text:
            # click would put a text into parentheses: [default: (all)]
            named["help"] = f"{named['help']}  [default: {default_text}]"
        super().__init__(*arguments, **named)
        self.section = section


class Command(click.Command):
    """A command whose help lists its options by section, and whose errors name its options."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run it; a parameter of the library in an error becomes the option that sets it."""
        try:
            return super().invoke(ctx)
        except ParameterError as error:
            raise UsageError(self._as_typed(error)) from error

    def _as_typed(self, error: ParameterError) -> str:
        message = str(error)
        for name in error.names:
            shown_name = next(filter(None, (typed(one, name) for one in self.params)), name)
            message = re.sub(rf"(?<![\w-]){name}\b", shown_name, message, count=1)
        return message

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None and isinstance(parameter, click.Option):
                sections.setdefault(getattr(parameter, "section", OTHER), []).append(record)
        for heading in SECTIONS:
            if heading in sections:
                with formatter.section("Options" if len(sections) == 1 else heading):
                    formatter.write_dl(sections[heading])


def typed(parameter: click.Parameter, name: str) -> str:
    """How the command line sets the library's parameter `name`; empty if it does not by this one.

    That is the option of the same words, or the one whose value goes there, or an argument.
    """
    if isinstance(parameter, click.Argument):
        return (parameter.metavar or name.upper()).strip("[].") if parameter.name == name else ""
    option_name = f"--{name.replace('_', '-')}"
    if option_name in parameter.opts:
        return option_name
    return max(parameter.opts, key=len) if parameter.name == name else ""


def command(name: str | None = None) -> Callable[[Callable[..., Any]], Command]:
    """`click.command` with sections in its help."""
    return click.command(name, cls=Command)


def option(*names: str, section: str = OTHER, **settings: Any) -> Callable[[F], F]:
    """`click.option` with a section; a default is shown unless it is None or a flag's False."""
    is_shown = settings.get("default") is not None and "default_text" not in settings
    settings.setdefault("show_default", is_shown)
    return click.option(*names, cls=Option, section=section, **settings)


def together(*options: Callable[[F], F]) -> Callable[[F], F]:
    """One decorator that adds several options, listed in this order."""

    def decorate(function: F) -> F:
        for add in reversed(options):
            function = add(function)
        return function

    return decorate


class Number(click.ParamType):  # type: ignore[type-arg]
    """A number from `low` to `high`, whole if `low` is an int.

    click's own range type prints [1<=x<=2147483647] in every help.
    """

    def __init__(self, low: float = 1, high: float = MOST) -> None:
        self.low = low
        self.high = high
        self.name = "integer" if isinstance(low, int) else "float"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        try:
            number = int(value) if isinstance(self.low, int) else float(value)
        except (ValueError, TypeError):
            whole = "whole " if isinstance(self.low, int) else ""
            self.fail(f"{shown(value)} is not a {whole}number", param, ctx)
        if not self.low <= number <= self.high:
            bounds = f"{self.low:,} and {self.high:,}"
            self.fail(f"{shown(value)} is not between {bounds}", param, ctx)
        return number
