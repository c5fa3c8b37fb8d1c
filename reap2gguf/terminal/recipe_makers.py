"""`reap2gguf recipes of` and `recipes import`: recipes from outside, as TOML."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click

import reap2gguf
from reap2gguf.terminal.click_options import json_option, output_options, overwrite_option
from reap2gguf.terminal.console import say, say_all, say_json, screen_progress
from reap2gguf.terminal.help import WRITE, Command, command, option
from reap2gguf.terminal.option_types import FilePath

_MOST_LETTERS = 2**20  # of standard input

_output_option = option(
    "-o", "--output", section=WRITE, type=FilePath, help="Recipe (.toml) to write, not to print."
)


@command("of")
@click.argument("file", metavar="FILE.gguf")
@_output_option
@overwrite_option
@json_option
@output_options
def recipes_of(file: str, output: Path | None, overwrite: bool, as_json: bool) -> None:
    """Print the recipe of a GGUF file.

    FILE.gguf is of any publisher: a file, the first of several parts, or a name on the Hub, of
    which only the header is read. Prints TOML that gives the same tensors the same types: the
    nearest file type or included recipe, and rules for what differs. Says so if the types are those
    of a file type of llama-quantize. The model's architecture must be one that reap2gguf supports.

    \b
    Example:
      reap2gguf recipes of Qwen3-30B-A3B-UD-Q4_K_XL.gguf
      reap2gguf recipes of owner/name:FILE.gguf -o like-theirs.toml
    """
    found = reap2gguf.recipe_of(file, output, overwrite=overwrite, progress=screen_progress())
    if as_json:
        say_json(found.as_json())
        return
    if output is None:
        say_all(found.as_toml().splitlines())
        return
    say(f"{found.file}: {found.what}")
    for note in found.notes():
        say(note)
    say(f"{output}: the recipe, {len(found.rules)} rules", "result")


class _WithText(Command):
    """A command whose first argument may begin as an option does, if there are blanks in it."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        texts = [f" {one}" if one.startswith("-") and len(one.split()) > 1 else one for one in args]
        return super().parse_args(ctx, texts)


@click.command("import", cls=_WithText)
@click.argument("text", metavar="TEXT")
@click.argument("model", required=False)
@option(
    "--base",
    section=WRITE,
    metavar="RECIPE",
    help="File type or recipe for tensors that no rule matches.",
    default_text="the text's, else by its types",
)
@_output_option
@overwrite_option
@json_option
@output_options
def recipes_import(
    text: str,
    model: str | None,
    base: str | None,
    output: Path | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Turn a llama-quantize command into TOML.

    TEXT is a llama-quantize command, a shell script with one, or a list of PATTERN=TYPE for
    ik_llama.cpp's --custom-q, in lines or with commas; or a file with any of these, or - for
    standard input. With MODEL (a folder, a GGUF file, or a name on the Hub) the rules are compared
    with its tensors: it says how many each rule decides, which rules decide nothing, and what no
    rule matches.

    \b
    Example:
      reap2gguf recipes import "llama-quantize --tensor-type attn_v=q8_0 in.gguf Q4_K_M"
      reap2gguf recipes import their.recipe ./Qwen3-30B-A3B -o mine.toml
    """
    found = reap2gguf.import_recipe(
        _given(text),
        model,
        output,
        base=base,
        overwrite=overwrite,
        progress=screen_progress(),
    )
    if as_json:
        say_json(found.as_json())
        return
    if output is None:
        say_all(found.as_toml().splitlines())
        return
    for remark in found.remarks():
        say(remark)
    n_rules = sum(one.is_in_recipe for one in found.rules)
    say(f"{output}: the recipe, {n_rules} of {len(found.rules)} rules", "result")


def _given(text: str) -> str | Path:
    """What is meant: standard input, a file, or the text itself."""
    if text == "-":
        return sys.stdin.read(_MOST_LETTERS)
    try:
        is_file = os.path.isfile(os.path.expanduser(text))
    except ValueError:
        return text  # a NUL is in no name
    return Path(os.path.expanduser(text)) if is_file else text
