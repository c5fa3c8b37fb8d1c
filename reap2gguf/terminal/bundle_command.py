"""`reap2gguf bundle`: a bundle of what single commands made."""

from __future__ import annotations

from pathlib import Path

import click

import reap2gguf
from reap2gguf.terminal.click_options import (
    output_options,
)
from reap2gguf.terminal.compute_options import (
    llama_cpp_option,
    threads_option,
)
from reap2gguf.terminal.console import say_all, terminal_progress
from reap2gguf.terminal.help import CALIBRATION, MODEL, WRITE, command, option
from reap2gguf.terminal.option_types import FilePath, FolderPath, LabelType


@command()
@click.argument("folder", type=FolderPath)
@click.argument("files", nargs=-1, required=True, type=FilePath)
@option(
    "--source",
    section=MODEL,
    metavar="MODEL",
    help="The model that was pruned: it is compared, and cards name it.",
)
@option("--imatrix", section=CALIBRATION, type=FilePath, metavar="FILE", help="Importance matrix.")
@option(
    "--observations",
    section=CALIBRATION,
    type=FilePath,
    metavar="FILE",
    help="Observations that `prune` used.",
)
@option(
    "--text",
    section=CALIBRATION,
    type=FilePath,
    metavar="FILE",
    help="Text that the importance matrix was computed on.",
)
@option(
    "--output",
    section=WRITE,
    type=FolderPath,
    default=Path("build"),
    metavar="DIR",
    help="Folder for the bundle.",
)
@option(
    "--name",
    section=WRITE,
    metavar="NAME",
    help="Name of the bundle.",
    default_text="the folder's",
)
@option(
    "--label",
    "labels",
    section=WRITE,
    type=LabelType(),
    multiple=True,
    metavar="FILE=LABEL",
    help="Give a GGUF file another label, which ends its name.",
    default_text="the one in its name, or its file type",
)
@threads_option
@llama_cpp_option
@output_options
def bundle(
    folder: Path,
    files: tuple[Path, ...],
    source: str | None,
    imatrix: Path | None,
    observations: Path | None,
    text: Path | None,
    output: Path,
    name: str | None,
    labels: tuple[tuple[str, str], ...],
    threads: int,
) -> None:
    """Bundle what single commands made.

    FOLDER is one that `prune` wrote, or a model that was not pruned; FILES are GGUF files of it.
    Everything is verified, and then linked into a bundle with cards, hashes, Modelfile and
    manifest, which `verify` and `push` take. What is not known is left out of them.

    \b
    Example:
      reap2gguf bundle ./pruned pruned-Q4_K_M.gguf --source Qwen/Qwen3-30B-A3B \\
          --imatrix imatrix.gguf --observations observations.safetensors --name My-Model
    """
    from reap2gguf.terminal.views import result_lines

    result = reap2gguf.make_bundle(
        folder,
        *files,
        source=source,
        imatrix=imatrix,
        observations=observations,
        text=text,
        output=output,
        name=name,
        labels=dict(labels),
        threads=threads,
        progress=terminal_progress(),
    )
    say_all(result_lines(result))
