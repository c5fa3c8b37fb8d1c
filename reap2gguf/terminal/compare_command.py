"""`reap2gguf compare`: models of any publisher side by side."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import click

import reap2gguf
from reap2gguf.terminal.click_options import json_option, output_options, overwrite_option
from reap2gguf.terminal.compute_options import (
    collect_compute,
    compute_options,
    llama_cpp_option,
    threads_option,
)
from reap2gguf.terminal.console import say_all, say_json, terminal_progress
from reap2gguf.terminal.help import CHECKS, WRITE, Number, command, option
from reap2gguf.terminal.option_types import FilePath

_COLUMNS = 80  # of what is not a terminal


@command()
@click.argument("models", nargs=-1, required=True, metavar="MODEL...")
@option(
    "--reference",
    section=CHECKS,
    metavar="MODEL",
    help="Measure the KL divergence of all others from this one.",
    default_text="the largest",
)
@option(
    "--text",
    section=CHECKS,
    default="held-out",
    metavar="NAME|FILE",
    help="Text to score: held-out, wikitext2 or a file.",
)
@option(
    "--chunk",
    section=CHECKS,
    type=Number(8),
    default=512,
    metavar="T",
    help="Tokens per chunk; the second half is scored.",
)
@option(
    "--chunks",
    section=CHECKS,
    type=Number(2),
    metavar="N",
    help="Score the first N chunks.",
    default_text="all",
)
@option(
    "--no-quality", section=CHECKS, is_flag=True, help="Compare sizes and types from headers alone."
)
@option("--layers", "by_layer", section=CHECKS, is_flag=True, help="Print each layer's bits too.")
@option(
    "--picture",
    section=WRITE,
    type=FilePath,
    metavar="FILE.png",
    help="Draw quality against size.",
)
@option("-o", "--output", section=WRITE, type=FilePath, metavar="FILE", help="JSON file to write.")
@overwrite_option
@compute_options
@threads_option
@llama_cpp_option
@json_option
@output_options
def compare(
    models: tuple[str, ...],
    reference: str | None,
    text: str,
    chunk: int,
    chunks: int | None,
    no_quality: bool,
    by_layer: bool,
    picture: Path | None,
    output: Path | None,
    overwrite: bool,
    as_json: bool,
    **more: Any,
) -> None:
    """Compare models and GGUF files.

    Prints size, bits per weight and types by part of the model, expert counts, perplexity and KL
    divergence from a reference. MODEL is a GGUF file, a folder, or a name on the Hub. A GGUF file
    on the Hub, owner/name:FILE.gguf or owner/name:Q4_K_M, is read layer by layer and never
    downloaded whole. Files of other publishers and other expert counts can be compared; all need
    the same layers and vocabulary, else only their sizes are compared. To resume an interrupted
    run, run the same command with the same --output again; without it, the run restarts.

    \b
    Example:
      reap2gguf compare mine-Q4_K_M.gguf owner/name:theirs-Q4_K_M.gguf \\
          --reference Qwen/Qwen3-30B-A3B --picture sizes.png
    """
    from reap2gguf.terminal.compare_views import comparison_lines

    found = reap2gguf.compare(
        *models,
        reference=reference,
        text=text,
        chunk=chunk,
        chunks=chunks,
        quality=not no_quality,
        picture=picture,
        output=output,
        overwrite=overwrite,
        compute=collect_compute(more),
        progress=terminal_progress(),
    )
    if as_json:
        say_json(found.as_json())
        return
    is_screen = sys.stdout.isatty()
    width = shutil.get_terminal_size().columns if is_screen else _COLUMNS
    say_all(comparison_lines(found, width, by_layer))
