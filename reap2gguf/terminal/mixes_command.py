"""`reap2gguf mixes`: list and show calibration mixes."""

from __future__ import annotations

import click

from reap2gguf.terminal.click_options import json_option, output_options
from reap2gguf.terminal.console import say_all, say_json
from reap2gguf.terminal.help import command


@click.group()
def mixes() -> None:
    """List and show calibration mixes.

    A mix is calibration text with a name, for --calibration. One is embedded in the program; the
    others are published mixes of datasets on the Hub, which are downloaded when they are used.

    \b
    Example:
      reap2gguf mixes list
      reap2gguf build ./Qwen3-30B-A3B --calibration seed-000
    """


@command("list")
@json_option
@output_options
def mixes_list(as_json: bool) -> None:
    """List calibration mixes.

    \b
    Example:
      reap2gguf mixes list
    """
    from reap2gguf.calibration.mixes import known_mixes
    from reap2gguf.terminal.mix_views import list_lines, mix_as_json

    if as_json:
        say_json([mix_as_json(mix) for mix in known_mixes()])
    else:
        say_all(list_lines(known_mixes()))


@command("show")
@click.argument("name")
@json_option
@output_options
def mixes_show(name: str, as_json: bool) -> None:
    """Show what a calibration mix consists of.

    \b
    Example:
      reap2gguf mixes show seed-000
    """
    from reap2gguf.calibration.mixes import known_mix
    from reap2gguf.terminal.mix_views import mix_as_json, mix_lines

    mix = known_mix(name)
    if as_json:
        say_json(mix_as_json(mix))
    else:
        say_all(mix_lines(mix))


for subcommand in (mixes_list, mixes_show):
    mixes.add_command(subcommand)
