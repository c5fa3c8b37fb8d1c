"""`reap2gguf report`: one HTML page about a finished bundle."""

from __future__ import annotations

from pathlib import Path

import click

import reap2gguf
from reap2gguf.terminal.click_options import output_options, overwrite_option
from reap2gguf.terminal.console import say
from reap2gguf.terminal.help import WRITE, command, option
from reap2gguf.terminal.option_types import FilePath, FolderPath


@command()
@click.argument("bundle", type=FolderPath)
@option(
    "-o",
    "--output",
    section=WRITE,
    type=FilePath,
    metavar="FILE",
    help="The HTML file.",
    default_text="NAME-report.html in the current folder",
)
@overwrite_option
@output_options
def report(bundle: Path, output: Path | None, overwrite: bool) -> None:
    """Write one HTML page about a bundle.

    BUNDLE is either folder of a finished bundle. The page shows what was done and what it cost:
    files, perplexity, divergence, tasks, speeds, experts, types, calibration, versions and hashes.
    It is one file that loads nothing from elsewhere. What was not measured is named.

    \b
    Example:
      reap2gguf report build/Qwen3-30B-A3B-REAP-0.25-GGUF -o report.html
    """
    from reap2gguf.messages import size

    path = reap2gguf.report(bundle, output, overwrite=overwrite)
    say(f"{path}: {size(path.stat().st_size)}; open it in a browser", "result")
