"""`reap2gguf add`: more GGUF files for a finished bundle."""

from __future__ import annotations

from pathlib import Path

import click

import reap2gguf
from reap2gguf.terminal.click_options import (
    json_option,
    label_option,
    output_options,
)
from reap2gguf.terminal.compute_options import (
    check_quants_option,
    llama_cpp_option,
    quantizing_device_option,
    threads_option,
)
from reap2gguf.terminal.console import say_all, say_json, terminal_progress
from reap2gguf.terminal.help import CHECKS, MODEL, WRITE, command, option
from reap2gguf.terminal.option_types import FilePath, FolderPath


@command()
@click.argument("bundle", type=FolderPath)
@click.argument("files", nargs=-1, type=FilePath)
@option(
    "-r",
    "--recipe",
    "recipes",
    section=WRITE,
    multiple=True,
    metavar="NAME|FILE",
    help="Quantization recipe of a file to write. Repeat it for several GGUF files.",
)
@label_option
@option(
    "--source",
    section=MODEL,
    metavar="MODEL",
    help="The model that the bundle was made from, if the bundle has no safetensors.",
)
@option(
    "--exact",
    section=CHECKS,
    is_flag=True,
    help="Quantize every tensor of the new files again and compare the bytes.",
)
@quantizing_device_option
@threads_option
@check_quants_option
@llama_cpp_option
@json_option
@output_options
def add(
    bundle: Path,
    files: tuple[Path, ...],
    recipes: tuple[str, ...],
    labels: tuple[tuple[str, str], ...],
    source: str | None,
    exact: bool,
    device: str,
    threads: int,
    check_quants: str,
    as_json: bool,
) -> None:
    """Add GGUF files to a finished bundle.

    BUNDLE is one of the two folders of a build. New files are made from its own safetensors and
    importance matrix, so nothing is computed again, and the original model is not needed. FILES are
    GGUF files of the same model that another command made: they are verified, and then taken over.
    Cards, manifest and hashes are written again; `push` then sends what is new.

    \b
    Example:
      reap2gguf add build/Qwen3-30B-A3B-REAP-0.25 --recipe q8_0
      reap2gguf add build/Qwen3-30B-A3B-REAP-0.25 ./Qwen3-30B-A3B-REAP-0.25-Q6_K.gguf
    """
    from reap2gguf.terminal.json_views import result_as_json
    from reap2gguf.terminal.views import result_lines

    result = reap2gguf.add(
        bundle,
        *files,
        recipes=recipes,
        labels=dict(labels),
        source=source,
        exact=exact,
        threads=threads,
        device=device,
        check_quants=check_quants,
        progress=terminal_progress(),
    )
    if as_json:
        say_json(result_as_json(result))
    else:
        say_all(result_lines(result))
