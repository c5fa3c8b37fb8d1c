"""`reap2gguf imatrix`: compute, show, slice and merge importance matrices."""

from __future__ import annotations

import difflib
import os
from pathlib import Path

import click

import reap2gguf
from reap2gguf.terminal.click_options import json_option, output_options, overwrite_option
from reap2gguf.terminal.console import say, say_all, say_json
from reap2gguf.terminal.help import PRUNE, WRITE, Number, command, option
from reap2gguf.terminal.option_types import FilePath, FolderPath
from reap2gguf.terminal.stage_commands import imatrix as compute
from reap2gguf.terminal.suggestions import Group

_DEFAULT = "compute"


class _WithDefault(Group):
    """A group in which a name that is none of its commands is the model of `compute`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0].startswith("-") and args[0] not in ctx.help_option_names:
            args = [_DEFAULT, *args]
        return super().parse_args(ctx, args)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        is_mistyped = difflib.get_close_matches(name, self.commands, n=1, cutoff=0.7)
        if name in self.commands or (is_mistyped and not os.path.exists(name)):
            return super().resolve_command(ctx, args)
        return super().resolve_command(ctx, [_DEFAULT, *args])


@click.group(cls=_WithDefault)
def imatrix() -> None:
    """Compute, show, slice and merge matrices.

    An importance matrix says how much each column of a matrix counts when it is quantized. A model
    in place of a command computes one: `imatrix HF_DIR` is short for `imatrix compute HF_DIR`.

    \b
    Example:
      reap2gguf imatrix ./Qwen3-30B-A3B-REAP --text calibration.txt -o imatrix.gguf
      reap2gguf imatrix show imatrix.gguf
    """


@command("show")
@click.argument("file", type=FilePath)
@option(
    "--below",
    type=Number(),
    default=100,
    metavar="N",
    help="Count experts with fewer tokens than this.",
)
@option("--experts", "with_experts", is_flag=True, help="Print the tokens of every expert.")
@option("--csv", "as_csv", is_flag=True, help="Print comma-separated values, a row per tensor.")
@json_option
@output_options
def imatrix_show(file: Path, below: int, with_experts: bool, as_csv: bool, as_json: bool) -> None:
    """Show statistics and tokens per expert.

    FILE is an importance matrix, .gguf or .dat. The figures are those of `llama-imatrix
    --show-statistics`. A .dat file does not say how many tokens an expert saw. `--json` prints the
    tokens of every expert.

    \b
    Example:
      reap2gguf imatrix show imatrix.gguf
      reap2gguf imatrix show imatrix.gguf --below 50 --experts
    """
    from reap2gguf.terminal import imatrix_views

    if as_csv and as_json:
        raise click.UsageError("--csv and --json exclude each other", click.get_current_context())
    found = reap2gguf.imatrix_statistics(file, below=below)
    if as_json:
        say_json(imatrix_views.as_values(found))
    elif as_csv:
        say_all(imatrix_views.as_table(found))
    else:
        say_all(imatrix_views.as_lines(found, file.name, with_experts))


@command("slice")
@click.argument("file", type=FilePath)
@option(
    "--kept",
    section=PRUNE,
    type=FolderPath,
    required=True,
    metavar="FOLDER|FILE",
    help="The pruned model: a folder of a bundle, or the folder or GGUF file that `prune` wrote.",
)
@option(
    "-o", "--output", section=WRITE, type=FilePath, required=True, help="imatrix.gguf to write."
)
@overwrite_option
@json_option
@output_options
def imatrix_slice(file: Path, kept: Path, output: Path, overwrite: bool, as_json: bool) -> None:
    """Cut a matrix to the kept experts.

    FILE, .gguf or .dat, is an importance matrix of the model before pruning, such as one that its
    publisher offers. What is written fits the pruned model: its experts, and its names of gate and
    up projections. Also writes a .dat file beside OUTPUT.

    \b
    Example:
      reap2gguf imatrix slice Qwen3-30B-A3B.imatrix --kept build/Qwen3-30B-A3B-REAP-0.25 \\
          -o imatrix.gguf
      reap2gguf imatrix slice imatrix.gguf --kept Qwen3-30B-A3B-REAP-Q4_K_M.gguf -o cut.gguf
    """
    from reap2gguf.terminal import imatrix_views

    sliced = reap2gguf.slice_imatrix(file, kept, output, overwrite=overwrite)
    if as_json:
        say_json({"output": str(output), **imatrix_views.sliced_as_values(sliced)})
        return
    for line in imatrix_views.sliced_notes(sliced, str(file)):
        say(line)
    say(f"{output}: {sliced.coverage.line}", "result")


@command("merge")
@click.argument("files", type=FilePath, nargs=-1, required=True)
@option(
    "-o", "--output", section=WRITE, type=FilePath, required=True, help="imatrix.gguf to write."
)
@overwrite_option
@json_option
@output_options
def imatrix_merge(files: tuple[Path, ...], output: Path, overwrite: bool, as_json: bool) -> None:
    """Add matrices of one model.

    FILES are importance matrices of the same model, computed on different texts: two or more, all
    .gguf or all .dat. Sums and tokens are added. Also writes a .dat file beside OUTPUT.

    \b
    Example:
      reap2gguf imatrix merge code.gguf prose.gguf -o imatrix.gguf
    """
    from reap2gguf.terminal import imatrix_views

    merged = reap2gguf.merge_imatrices(files, output, overwrite=overwrite)
    if as_json:
        say_json({"output": str(output), **imatrix_views.merged_as_values(merged)})
        return
    for line in imatrix_views.merged_notes(merged):
        say(line)
    made = merged.imatrix
    say(f"{output}: {len(made.entries)} matrices over {made.n_chunks:,} chunks", "result")


for subcommand in (compute, imatrix_show, imatrix_slice, imatrix_merge):
    imatrix.add_command(subcommand)
