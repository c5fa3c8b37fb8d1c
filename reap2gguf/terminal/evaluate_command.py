"""`reap2gguf evaluate`: what pruning cost and what quantizing cost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

import reap2gguf
from reap2gguf.terminal.click_options import (
    follow_links_option,
    json_option,
    output_options,
)
from reap2gguf.terminal.compute_options import collect_compute, compute_options, threads_option
from reap2gguf.terminal.console import say_all, say_json, terminal_progress
from reap2gguf.terminal.evaluate_views import evaluation_lines
from reap2gguf.terminal.help import CALIBRATION, MODEL, WRITE, Number, command, option
from reap2gguf.terminal.option_types import FilePath


@command()
@click.argument("model")
@click.argument("variants", nargs=-1, type=click.Path(path_type=Path))
@option(
    "--source",
    section=MODEL,
    metavar="MODEL",
    help="The model that a bundle was pruned from.",
    default_text="as the bundle names it, if that is on the Hub",
)
@option(
    "--text",
    section=CALIBRATION,
    default="held-out",
    metavar="NAME|FILE",
    help="Text to score: held-out (shipped), wikitext2 (its raw test set), or a file.",
)
@option(
    "--chunk",
    section=CALIBRATION,
    type=Number(8),
    default=512,
    metavar="TOKENS",
    help="Tokens per chunk, of which the second half is scored.",
)
@option(
    "--chunks",
    section=CALIBRATION,
    type=Number(2),
    metavar="N",
    help="Score the first N chunks of the text.",
    default_text="all",
)
@compute_options
@threads_option
@option("-o", "--output", section=WRITE, type=FilePath, metavar="FILE", help="JSON file to write.")
@follow_links_option
@json_option
@output_options
def evaluate(
    model: str,
    variants: tuple[Path, ...],
    source: str | None,
    text: str,
    chunk: int,
    chunks: int | None,
    output: Path | None,
    follow_links: bool,
    as_json: bool,
    **compute: Any,
) -> None:
    """Measure what pruning cost and what quantizing cost.

    MODEL is a bundle, or the model that VARIANTS were made from: pruned folders and GGUF files.
    All of them go through the layers together, one layer in memory at a time: no logits file, and
    no whole model. Text is cut and scored as by llama-perplexity. To resume an interrupted run,
    run the same command with the same --output again.

    \b
    Example:
      reap2gguf evaluate build/Qwen3-30B-A3B-REAP-0.25 --text wikitext2
      reap2gguf evaluate Qwen/Qwen3-30B-A3B pruned/ pruned-Q4_K_M.gguf -o evaluation.json
    """
    found = reap2gguf.evaluate(
        model,
        *variants,
        source=source,
        text=text,
        chunk=chunk,
        chunks=chunks,
        output=output,
        compute=collect_compute(compute),
        follow_links=follow_links,
        progress=terminal_progress(),
    )
    if as_json:
        say_json(found.as_json())
    else:
        say_all(evaluation_lines(found))
