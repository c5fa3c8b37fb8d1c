"""`reap2gguf observations`: show and merge what `observe` wrote."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

import reap2gguf
from reap2gguf.errors import ArtifactError
from reap2gguf.terminal.click_options import json_option, output_options, overwrite_option
from reap2gguf.terminal.console import say, say_all, say_json
from reap2gguf.terminal.help import WRITE, command, option
from reap2gguf.terminal.option_types import FilePath
from reap2gguf.terminal.pruning_options import criterion_option, ratios_option
from reap2gguf.terminal.suggestions import Group


@click.group(cls=Group)
def observations() -> None:
    """Show and merge observations.

    Observations are what `observe` writes: how each expert of a model was used on a text, and how
    large its outputs were. They choose the experts that stay, at any ratio and by any criterion.

    \b
    Example:
      reap2gguf observations show observations.safetensors
      reap2gguf observations merge code.safetensors prose.safetensors -o both.safetensors
    """


@command("show")
@click.argument("file", type=FilePath)
@ratios_option
@criterion_option
@option("--csv", "as_csv", is_flag=True, help="Print comma-separated values, a row per layer.")
@json_option
@output_options
def show(
    file: Path, ratios: Sequence[float] | None, method: str, as_csv: bool, as_json: bool
) -> None:
    """Show tokens per expert, and what ratios keep.

    FILE is what `observe` wrote, or the observations.safetensors of a bundle. For each layer: the
    fewest, the median and the most tokens of an expert, how many experts no token reached, and the
    share of the scores that stays if a share of the experts is removed.

    \b
    Example:
      reap2gguf observations show observations.safetensors --ratios 25%,50%
      reap2gguf observations show observations.safetensors --method weighted_ean_sum --json
    """
    from reap2gguf.terminal import inspect_views, observations_views

    if as_csv and as_json:
        raise click.UsageError("--csv and --json exclude each other", click.get_current_context())
    found = reap2gguf.inspect(file, method=method, ratios=ratios)
    if not isinstance(found, reap2gguf.ObservationsInspection):
        raise ArtifactError(
            f"{file}: is an importance matrix, expected a file that `reap2gguf observe` wrote; "
            "`reap2gguf imatrix show` shows it"
        )
    if as_json:
        say_json(observations_views.as_values(found))
    elif as_csv:
        say_all(inspect_views.as_table(found))
    else:
        say_all(observations_views.as_lines(found, file.name))


@command("merge")
@click.argument("files", type=FilePath, nargs=-1, required=True, metavar="FILES...")
@option(
    "-o", "--output", section=WRITE, type=FilePath, required=True, help="Observations to write."
)
@overwrite_option
@json_option
@output_options
def merge(files: tuple[Path, ...], output: Path, overwrite: bool, as_json: bool) -> None:
    """Add observations of one model.

    FILES are observations of the same model on different texts: two or more. The result is as if
    the model had been observed on all of the texts. Files of another model are refused, and so are
    two that were made on the same rows.

    \b
    Example:
      reap2gguf observations merge code.safetensors prose.safetensors -o both.safetensors
    """
    from reap2gguf.terminal import observations_views

    merged = reap2gguf.merge_observations(files, output, overwrite=overwrite)
    if as_json:
        say_json({"output": str(output), **observations_views.about(merged)})
        return
    for line in observations_views.merge_notes(merged, files):
        say(line)
    counts = f"{merged.n_rows:,} rows, {merged.n_tokens:,} tokens, {len(merged.layers)} layers"
    say(f"{output}: {counts} of {len(files)} files", "result")


observations.add_command(show)
observations.add_command(merge)
