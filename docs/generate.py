"""Writes commands.md and api.md from the program itself: `python docs/generate.py`.

tests/test_docs.py compares the pages with what this file makes of the code.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

import reap2gguf
from reap2gguf import errors
from reap2gguf.cli import cli

FOLDER = Path(__file__).resolve().parent
MOST_LETTERS = 92
_NOTE = "<!-- Written by `python docs/generate.py`. Do not edit. -->"
_EXAMPLE = "<!-- not run: an example from the help -->"


def escaped(text: str) -> str:
    """Plain text for Markdown: `<`, `*` and `[` are escaped, code is not."""
    pieces = re.split(r"(``.*?``|`[^`]*`)", text)
    return "".join(
        piece if index % 2 else re.sub(r"([*\[\]])", r"\\\1", piece.replace("<", "&lt;"))
        for index, piece in enumerate(pieces)
    )


# ---------------------------------------------------------------------------------- commands.md


def commands_page() -> str:
    """Every command with its help, its example and its options."""
    lines = [
        _NOTE,
        "",
        "# Commands",
        "",
        "All commands, as `reap2gguf COMMAND --help` shows them.",
        "",
        "Exit codes: 0 done, 1 a check failed, 2 wrong usage or input, 130 interrupted.",
    ]
    root = click.Context(cli, info_name="reap2gguf", **cli.context_settings)
    lines += ["", "## reap2gguf", "", *_command(cli, root)]
    for context in _commands(cli, root):
        lines += ["", f"## {context.command_path}", "", *_command(context.command, context)]
    return "\n".join(lines) + "\n"


def _commands(group: click.Group, context: click.Context) -> Iterator[click.Context]:
    """A context for each command below a group, in the order of its help."""
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        if command is None or command.hidden:
            continue
        below = click.Context(command, parent=context, info_name=name)
        yield below
        if isinstance(command, click.Group):
            yield from _commands(command, below)


def _command(command: click.Command, context: click.Context) -> Iterator[str]:
    words = " ".join([context.command_path, *command.collect_usage_pieces(context)])
    yield from ("```text", words, "```")
    for paragraph in re.split(r"\n\s*\n", inspect.cleandoc(command.help or "")):
        yield ""
        yield from _paragraph(paragraph)
    yield ""
    for param in command.get_params(context):
        if param.name == "help" and context.parent is not None:
            continue  # every command has it
        names, help_text = param.get_help_record(context) or ("", "")
        if help_text:
            yield f"- `{names}`: {escaped(' '.join(help_text.split()))}"


def _paragraph(text: str) -> Iterator[str]:
    r"""A paragraph of a help text; one after `\b` has lines of its own."""
    first, _, rest = text.partition("\n")
    if first.strip() != "\b":
        yield escaped(" ".join(text.split()))
        return
    title, _, body = rest.partition("\n")
    if title.strip() == "Example:":
        yield from (_EXAMPLE, "", "```bash", *textwrap.dedent(body).splitlines(), "```")
    else:
        yield from ("```text", *textwrap.dedent(rest).splitlines(), "```")


# --------------------------------------------------------------------------------------- api.md


def api_page() -> str:
    """The names that `from reap2gguf import ...` gives, and every error."""
    lines = [
        _NOTE,
        "",
        "# Python reference",
        "",
        "Use these names: `from reap2gguf import build, BuildOptions`. Everything else",
        "may change without notice. [Python](python.md) has an example of all steps.",
    ]
    names = [name for name in getattr(reap2gguf, "__all__", ()) if not name.startswith("_")]
    members = [(name, getattr(reap2gguf, name)) for name in names]
    functions = [(name, value) for name, value in members if inspect.isroutine(value)]
    classes = [(name, value) for name, value in members if inspect.isclass(value)]
    others = [name for name, value in members if (name, value) not in [*functions, *classes]]
    for title, group in (("Functions", functions), ("Classes", classes)):
        if group:
            lines += ["", f"## {title}"]
        for name, value in group:
            lines += ["", f"### {name}", "", *_member(name, value)]
    if others:
        lines += ["", "## Values", "", *(f"- `{name}`" for name in others)]
    lines += ["", "## Errors", "", *_docstring(errors)]
    return "\n".join(lines) + "\n"


def _member(name: str, value: Any) -> Iterator[str]:
    fields = _fields(value)
    lines = [f"class {name}:", *fields] if fields else _call(name, value).splitlines()
    yield from ("```python", *lines, "```", "")
    yield from _docstring(value)
    if isinstance(value, type):
        for other, member in vars(value).items():
            if not other.startswith("_") and _is_documented(member):
                yield from _method(other, member)


def _fields(value: Any) -> list[str]:
    """The fields of a dataclass as they are written, with their comments."""
    if not isinstance(value, type) or not dataclasses.is_dataclass(value):
        return []
    source = textwrap.dedent(inspect.getsource(value))
    (tree,) = ast.parse(source).body
    assert isinstance(tree, ast.ClassDef)
    lines = source.splitlines()
    found: list[str] = []
    for node in tree.body:
        if isinstance(node, ast.AnnAssign):
            found += lines[node.lineno - 1 : node.end_lineno]
    return [re.sub(r"\bfield\(default_factory=(\w+)\)", r"\1()", line) for line in found]


def _call(name: str, value: Any) -> str:
    """A function's or a class's signature, an argument per line where one line is too long."""
    try:
        signature = inspect.signature(value)
    except (TypeError, ValueError):
        return name
    arguments: list[str] = []
    keyword_only = False
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and not keyword_only:
            arguments.append("*")
        keyword_only |= parameter.kind in (parameter.KEYWORD_ONLY, parameter.VAR_POSITIONAL)
        arguments.append(_argument(parameter))
    returned = signature.return_annotation
    nothing = returned is inspect.Signature.empty or isinstance(value, type)
    end = "" if nothing else f" -> {_annotation(returned)}"
    line = f"{name}({', '.join(arguments)}){end}"
    if len(line) <= MOST_LETTERS:
        return line
    return f"{name}(\n" + "".join(f"    {text},\n" for text in arguments) + f"){end}"


def _argument(parameter: inspect.Parameter) -> str:
    stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}
    text = stars.get(parameter.kind, "") + parameter.name
    if parameter.annotation is not parameter.empty:
        text += f": {_annotation(parameter.annotation)}"
    if parameter.default is parameter.empty:
        return text
    return f"{text} = {_default(parameter.default)}"


def _annotation(value: Any) -> str:
    return value if isinstance(value, str) else inspect.formatannotation(value)


def _default(value: Any) -> str:
    """A default that is the same on every machine."""
    if dataclasses.is_dataclass(value):
        return f"{type(value).__name__}()"
    return f'Path("{value}")' if isinstance(value, Path) else repr(value)


def _is_documented(member: Any) -> bool:
    functions = (property, classmethod, staticmethod)
    is_code = inspect.isfunction(member) or isinstance(member, functions)
    return is_code and bool(inspect.getdoc(member))


def _method(name: str, member: Any) -> Iterator[str]:
    call = f".{name}" if isinstance(member, property) else f".{name}()"
    summary = (inspect.getdoc(member) or "").split("\n\n")[0]
    yield ""
    yield f"- `{call}`: {escaped(' '.join(summary.split()))}"


def _docstring(value: Any) -> Iterator[str]:
    """Paragraphs as they are; indented ones as blocks."""
    text = value.__doc__ or ""
    if dataclasses.is_dataclass(value) and text.startswith(f"{getattr(value, '__name__', '')}("):
        return  # written by dataclasses, not by a person
    for paragraph in re.split(r"\n\s*\n", inspect.cleandoc(text)):
        if paragraph.startswith((" ", "\t", ">>>")):
            yield from ("```text", *textwrap.dedent(paragraph).splitlines(), "```", "")
        elif paragraph:
            yield from (*(escaped(line) for line in paragraph.splitlines()), "")


PAGES = {"commands.md": commands_page, "api.md": api_page}


def page(name: str) -> str:
    """The text of a page: no two empty lines in a row, none at the end."""
    return re.sub(r"\n{3,}", "\n\n", PAGES[name]()).rstrip("\n") + "\n"


def main() -> None:
    for name in PAGES:
        (FOLDER / name).write_text(page(name), encoding="utf-8")
        print(f"wrote docs/{name}")


if __name__ == "__main__":
    main()
