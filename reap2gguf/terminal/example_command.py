"""`reap2gguf example`: the bundled model as a folder."""

from __future__ import annotations

import shlex
from pathlib import Path

import click

from reap2gguf.terminal.click_options import output_options
from reap2gguf.terminal.console import say
from reap2gguf.terminal.help import command
from reap2gguf.terminal.option_types import FolderPath


@command()
@click.argument("folder", metavar="[DIR]", type=FolderPath, default="tiny-qwen3-moe")
@output_options
def example(folder: Path) -> None:
    """Write the bundled example model to DIR.

    It is a real, trained Qwen3-MoE model of 14.4 million parameters (28 MB), to try the program
    on. DIR must not exist; it is ./tiny-qwen3-moe by default. Works offline.

    \b
    Example:
      reap2gguf example tiny
      reap2gguf build tiny --recipe unsloth-iq4km
    """
    from reap2gguf.messages import size
    from reap2gguf.outputs import output_path
    from reap2gguf.resources import EXAMPLE_FILES, EXAMPLE_NAME, write_example

    n_bytes = write_example(output_path(folder))
    what = f"{EXAMPLE_NAME}, {len(EXAMPLE_FILES)} files, {size(n_bytes)}, hashes verified"
    say(f"{folder}: {what}", "result")
    say(f"to build it: reap2gguf build {shlex.quote(str(folder))} --recipe unsloth-iq4km")
