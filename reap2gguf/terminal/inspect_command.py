"""`reap2gguf inspect`: what observations, a bundle or an importance matrix hold."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

import reap2gguf
from reap2gguf.pruning.methods import OBSERVED
from reap2gguf.terminal.click_options import json_option, output_options
from reap2gguf.terminal.console import say_all, say_json
from reap2gguf.terminal.help import PRUNE, command, option
from reap2gguf.terminal.option_types import FolderPath
from reap2gguf.terminal.pruning_options import ratios_option


@command("inspect")
@click.argument("path", type=FolderPath)
@ratios_option
@option(
    "--method",
    section=PRUNE,
    type=click.Choice(tuple(OBSERVED)),
    metavar="NAME",
    help=f"How to rank the experts: {', '.join(OBSERVED)}.",
    default_text="reap, or the bundle's own",
)
@option("--csv", "as_csv", is_flag=True, help="Print comma-separated values.")
@json_option
@output_options
def inspect_command(
    path: Path,
    ratios: Sequence[float] | None,
    method: str | None,
    as_csv: bool,
    as_json: bool,
) -> None:
    """Show what a ratio keeps, or what was pruned.

    PATH is a file that `observe` wrote, a folder of a bundle, an importance matrix, or a GGUF file
    of a model, of which its experts and types are shown, and what it keeps of its source. For
    observations, prints the share of the scores that each layer keeps at several ratios, and how
    many tokens its experts got. For a bundle, what it keeps. For an importance matrix, statistics
    of its tensors.

    \b
    Example:
      reap2gguf inspect observations.safetensors --ratios 0.25,0.5
      reap2gguf inspect build/Qwen3-30B-A3B-REAP-0.25
      reap2gguf inspect imatrix.gguf --csv
      reap2gguf inspect Qwen3-30B-A3B-REAP-Q4_K_M.gguf
    """
    from reap2gguf.terminal.inspect_views import as_lines, as_table, as_values

    if as_csv and as_json:
        raise click.UsageError("--csv and --json exclude each other", click.get_current_context())
    found = reap2gguf.inspect(path, method=method, ratios=ratios)
    if as_json:
        say_json(as_values(found))
    elif as_csv:
        say_all(as_table(found))
    else:
        say_all(as_lines(found, path.name))
