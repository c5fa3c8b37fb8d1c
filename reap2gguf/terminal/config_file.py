"""`--config build.toml` and `--like reap2gguf.json`: options of `build` and `plan` from files.

The command line wins over the config file, and the config file over the manifest. Both become
click's defaults for the running command, so that every value is checked like an argument.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from reap2gguf.errors import UsageError
from reap2gguf.messages import shown
from reap2gguf.quantizing.named import DEFAULT_RECIPES
from reap2gguf.terminal.console import say
from reap2gguf.terminal.help import MODEL, Number, option
from reap2gguf.terminal.option_types import CompressionType, FilePath, FolderPath

if TYPE_CHECKING:
    from reap2gguf.building.likeness import Likeness
    from reap2gguf.building.plan import Plan

_CONFIG = "reap2gguf.config"
_LIKE = "reap2gguf.like"
_NOT_KEYS = ("config", "like", "help")
_COMMANDS = ("build", "plan")  # one file serves both
_ONE_OF = ("keep_experts", "compression")  # say the same in two ways
_SIZES = ("target_size", "target_bpw", "fit")  # say the same in three ways


def _use_config(ctx: click.Context, param: click.Parameter, path: Path | None) -> None:
    if path is not None and not ctx.resilient_parsing:
        ctx.meta[_CONFIG] = read_config(path, ctx)
        _set_defaults(ctx)


def _use_like(ctx: click.Context, param: click.Parameter, path: Path | None) -> None:
    if path is not None and not ctx.resilient_parsing:
        from reap2gguf.building.likeness import read_likeness

        ctx.meta[_LIKE] = read_likeness(path)
        _set_defaults(ctx)


config_option = option(
    "--config",
    section=MODEL,
    type=FilePath,
    metavar="FILE",
    callback=_use_config,
    is_eager=True,
    expose_value=False,
    help="Read options from a TOML file: a line such as recipe = 'Q4_K_M' per option.",
)

like_option = option(
    "--like",
    section=MODEL,
    type=FolderPath,
    metavar="reap2gguf.json",
    callback=_use_like,
    is_eager=True,
    expose_value=False,
    help="Take over the model and options of an earlier bundle: its reap2gguf.json, or its folder.",
)


def _set_defaults(ctx: click.Context) -> None:
    config: Mapping[str, Any] = ctx.meta.get(_CONFIG, {})
    like: Likeness | None = ctx.meta.get(_LIKE)
    values = {} if like is None else like.values()
    if any(name in config for name in _ONE_OF):
        values = {name: value for name, value in values.items() if name not in _ONE_OF}
    ctx.default_map = {**values, **config}


def read_config(path: Path, ctx: click.Context) -> dict[str, Any]:
    """Values by name of a parameter of the running command, from a TOML file.

    Keys are long options without their hyphens, and `model`. Raises UsageError for a file that is
    not TOML, a section, an unknown key, and a value of a wrong type.
    """
    from reap2gguf.quantizing.toml_text import parse_toml, read_toml_file

    values = parse_toml(read_toml_file(path, "config file", UsageError), str(path), UsageError)
    known = _known_keys(ctx)
    own = set(map(id, ctx.command.get_params(ctx)))
    found = {}
    seen: dict[int, str] = {}  # parameter -> key
    for key, value in values.items():
        if isinstance(value, dict) or (isinstance(value, list) and dict in map(type, value)):
            raise UsageError(
                f"{path}: {key} is a section, expected keys alone, such as recipe = 'Q4_K_M'"
            )
        name = key.replace("_", "-")
        if name not in known:
            raise UsageError(f"{path}: unknown key {shown(key)}{_hint(name, known)}")
        parameter = known[name]
        if (earlier := seen.setdefault(id(parameter), key)) != key:
            raise UsageError(f"{path}: {earlier} and {key} are one option given twice; keep one")
        found_value = _checked(parameter, value, f"{path}: {key}", ctx)
        if id(parameter) in own and parameter.name is not None:
            found[parameter.name] = found_value
    return found


def _known_keys(ctx: click.Context) -> dict[str, click.Parameter]:
    """Parameters by key: of the running command, and of those that take the same file."""
    root = ctx.find_root().command
    known: dict[str, click.Parameter] = {}
    commands = [root.commands[name] for name in _COMMANDS] if isinstance(root, click.Group) else []
    for command in (*commands, ctx.command):
        known |= dict(_keys(command, ctx))
    return {name: parameter for name, parameter in known.items() if name not in _NOT_KEYS}


def _keys(command: click.Command, ctx: click.Context) -> Iterator[tuple[str, click.Parameter]]:
    parameters = command.get_params(ctx)
    for parameter in parameters:
        for name in parameter.opts:
            if name.startswith("--"):
                yield name.removeprefix("--"), parameter
    for parameter in parameters:  # last: `model` is the argument, not the option of that name
        if isinstance(parameter, click.Argument) and parameter.name is not None:
            yield parameter.name, parameter


def _hint(name: str, known: Mapping[str, object]) -> str:
    if near := difflib.get_close_matches(name[:100], known, n=1):
        return f", did you mean {near[0]}?"
    return f", expected one of {', '.join(sorted(known))}"


def _checked(parameter: click.Parameter, value: Any, where: str, ctx: click.Context) -> Any:
    """A value as click's defaults hold it. Raises UsageError if the option cannot have it."""
    if parameter.multiple:
        if isinstance(value, str):
            value = [value]
        if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
            raise UsageError(f"{where} is {shown(value)}, expected text, or a list of texts")
    else:
        types, words = _toml_type(parameter)
        if type(value) not in types:
            raise UsageError(f"{where} is {shown(value)}, expected {words}")
    for text in value if isinstance(value, list) else [value]:
        if isinstance(text, str) and "\0" in text:  # no argument and no path can hold one
            raise UsageError(f"{where} is {shown(text)}, expected text without NUL characters")
    try:
        parameter.type_cast_value(ctx, value)
    except click.BadParameter as error:
        raise UsageError(f"{where}: {error.message}") from error
    return value


def _toml_type(parameter: click.Parameter) -> tuple[tuple[type, ...], str]:
    """Types that a value may have in TOML, and what to call them."""
    kind = parameter.type
    if getattr(parameter, "is_flag", False):
        return (bool,), "true or false"
    if isinstance(kind, click.types.FloatParamType) or (
        isinstance(kind, Number) and isinstance(kind.low, float)
    ):
        return (float, int), "a number"
    if isinstance(kind, CompressionType):
        return (float, int, str), "a number or text"
    if isinstance(kind, click.types.IntParamType | Number):
        return (int,), "a whole number"
    return (str,), "text"


def settled(arguments: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """The arguments of `build` or `plan` after both files had their say, and pinned datasets.

    Raises UsageError if an input of the bundle of --like is neither here nor given.
    """
    ctx = click.get_current_context()
    found = dict(arguments)
    _let_command_line_win(ctx, found)
    like: Likeness | None = ctx.meta.get(_LIKE)
    if like is None:
        has_size = any(found[name] is not None for name in _SIZES)
        if has_size and _source(ctx, "recipes") is ParameterSource.DEFAULT:
            found["recipes"] = ()
        elif _source(ctx, "recipes") is ParameterSource.DEFAULT:
            found["recipes"] = DEFAULT_RECIPES  # this object: none was named
        return found, {}
    if _source(ctx, "recipes") is ParameterSource.DEFAULT:
        like.check_recipes()
        found["recipes"] = like.recipes
    takes_calibration = _source(
        ctx, "spec"
    ) is ParameterSource.DEFAULT_MAP and "spec" not in ctx.meta.get(_CONFIG, {})
    like.check(found, takes_calibration)
    return found, like.revisions if takes_calibration else {}


def _let_command_line_win(ctx: click.Context, found: dict[str, Any]) -> None:
    """Drop what a file says in another way than the command line."""
    for group in (_ONE_OF, _SIZES):
        given = [name for name in group if _source(ctx, name) is ParameterSource.COMMANDLINE]
        for name in group:
            if given and name not in given and _source(ctx, name) is ParameterSource.DEFAULT_MAP:
                found[name] = None
    of_file = _source(ctx, "fit_context") is ParameterSource.DEFAULT_MAP
    if of_file and found["fit"] is None and "fit" in ctx.meta.get(_CONFIG, {}):
        found["fit_context"] = None


def _source(ctx: click.Context, name: str) -> ParameterSource | None:
    return ctx.get_parameter_source(name)


def warn_of_differences(plan: Plan) -> None:
    """Say what makes the result differ from the bundle of --like, if one was given."""
    like: Likeness | None = click.get_current_context().meta.get(_LIKE)
    if like is not None:
        for line in like.differences(plan):
            say(f"warning: {line}")
