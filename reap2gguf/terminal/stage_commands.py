"""Commands that run one stage of a build on its own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from reap2gguf.machine import processes
from reap2gguf.options import CalibrationOptions
from reap2gguf.terminal.options import (
    FilePath,
    FolderPath,
    calibration_options,
    collect_compute,
    compute_options,
    llama_cpp_option,
    pruning_options,
    threads_option,
)

if TYPE_CHECKING:
    pass


@click.command()
@click.argument("model")
@calibration_options
@compute_options
@threads_option
@click.option("-o", "--output", type=FilePath, required=True, help="Observations file to write.")
def observe(
    model: str, spec: str, samples: int | None, max_length: int | None, seed: int,
    pack: bool | None, output: Path, **compute: Any,
) -> None:  # fmt: skip
    """Observe what the experts of MODEL do on calibration text.

    Interrupted, the same command goes on from a layer that OUTPUT.state keeps.

    \b
    Example:
      reap2gguf observe ./Qwen3-30B-A3B --calibration text.txt -o observations.safetensors
      reap2gguf observe ./Qwen3-30B-A3B --calibration seed-000 -o observations.safetensors
      torchrun --nproc-per-node 2 -m reap2gguf observe ./Qwen3-30B-A3B -o observations.safetensors
    """
    from reap2gguf import api
    from reap2gguf.terminal.console import terminal_progress

    calibration = CalibrationOptions(spec, samples, max_length, seed, pack)
    seen = api.observe(
        model,
        output,
        calibration=calibration,
        compute=collect_compute(compute),
        progress=terminal_progress(),
    )
    if processes().is_first:
        tokens = f"{seen.n_tokens:,} tokens"
        click.echo(f"{output}: {seen.n_rows} rows, {tokens}, {len(seen.layers)} layers")


@click.command()
@click.argument("model")
@click.option("--observations", type=FilePath, required=True, help="File that `observe` wrote.")
@pruning_options
@click.option("-o", "--output", type=FolderPath, required=True, help="Folder to write.")
def prune(
    model: str, observations: Path, keep_experts: int | None, compression: float | None,
    method: str,
    mtp: str, output: Path,
) -> None:  # fmt: skip
    """Write MODEL without the experts that matter least, as safetensors.

    \b
    Example:
      reap2gguf prune ./Qwen3-30B-A3B --observations observations.safetensors \\
          --keep-experts 96 -o Qwen3-30B-A3B-REAP
    """
    from reap2gguf import api
    from reap2gguf.terminal.console import terminal_progress

    selection = api.prune(
        model,
        observations,
        output,
        keep_experts=keep_experts,
        compression=compression,
        method=method,
        mtp=mtp,
        progress=terminal_progress(),
    ).selection
    click.echo(f"{output}: keeps {selection.n_kept} of {selection.n_experts} experts per layer")


@click.command()
@click.argument("hf_dir")
@click.option("--text", type=FilePath, required=True, help="Plain text to compute it on.")
@click.option("--chunk", type=click.IntRange(8, 2**31 - 1), default=512, show_default=True,
              help="Tokens a chunk.")  # fmt: skip
@compute_options
@threads_option
@click.option("-o", "--output", type=FilePath, required=True, help="imatrix.gguf to write.")
def imatrix(hf_dir: str, text: Path, chunk: int, output: Path, **compute: Any) -> None:
    """Compute the importance matrix of HF_DIR; a .dat in the older format is written beside it.

    \b
    Example:
      reap2gguf imatrix ./Qwen3-30B-A3B-REAP --text calibration.txt -o imatrix.gguf
    """
    from reap2gguf import api
    from reap2gguf.terminal.console import terminal_progress

    result = api.imatrix(
        hf_dir,
        text,
        output,
        chunk=chunk,
        compute=collect_compute(compute),
        progress=terminal_progress(),
    )
    if processes().is_first:
        click.echo(f"{output}: {len(result.entries)} matrices over {result.n_chunks} chunks")


@click.command()
@click.argument("hf_dir")
@click.option("--recipe", "recipe_name", required=True, metavar="NAME|FILE", help="Recipe.")
@click.option("--imatrix", "imatrix_file", type=FilePath, help="Importance matrix (either format).")
@threads_option
@llama_cpp_option
@click.option("-o", "--output", type=FilePath, required=True, help="GGUF file to write.")
def quantize(
    hf_dir: str, recipe_name: str, imatrix_file: Path | None, threads: int, output: Path
) -> None:
    """Write HF_DIR as one GGUF file.

    Interrupted, the same command goes on from a tensor that OUTPUT.journal keeps.

    \b
    Example:
      reap2gguf quantize ./Qwen3-30B-A3B-REAP --recipe unsloth-iq4km \\
          --imatrix imatrix.gguf -o Qwen3-30B-A3B-REAP-IQ4_K_M.gguf
    """
    from reap2gguf import api
    from reap2gguf.terminal.console import size, terminal_progress

    result = api.quantize(
        hf_dir,
        recipe_name,
        output,
        imatrix=imatrix_file,
        threads=threads,
        progress=terminal_progress(),
    )
    click.echo(f"{output}: {size(result.n_bytes)}, {result.bits_per_weight:.2f} bpw")


def say(text: str) -> None:
    """A line for who waits; of several processes only the first speaks."""
    if processes().is_first:
        click.echo(text, err=True)
