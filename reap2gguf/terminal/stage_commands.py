"""Commands that run one stage of a build on its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

import reap2gguf
from reap2gguf.messages import size
from reap2gguf.options import CalibrationOptions
from reap2gguf.quantizing.named import DEFAULT_RECIPE
from reap2gguf.terminal.click_options import (
    calibration_options,
    follow_links_option,
    label_option,
    model_argument,
    output_options,
    overwrite_option,
    seed_option,
    tensor_type_option,
)
from reap2gguf.terminal.compute_options import (
    check_quants_option,
    collect_compute,
    compute_options,
    llama_cpp_option,
    quantizing_device_option,
    threads_option,
)
from reap2gguf.terminal.console import say, terminal_progress
from reap2gguf.terminal.help import CALIBRATION, PRUNE, WRITE, Number, command, option
from reap2gguf.terminal.option_types import FilePath, FolderPath
from reap2gguf.terminal.pruning_options import pruning_options, repair_option


@command()
@model_argument()
@calibration_options
@option(
    "--imatrix-sums",
    section=CALIBRATION,
    is_flag=True,
    help="Take the sums of an importance matrix as well, of all experts, for `build "
    "--imatrix-from source`.",
)
@compute_options
@threads_option
@option(
    "-o", "--output", section=WRITE, type=FilePath, required=True, help="Observations to write."
)
@overwrite_option
@follow_links_option
@output_options
def observe(
    model: str,
    spec: str,
    samples: int | None,
    max_length: int | None,
    seed: int,
    pack: bool | None,
    imatrix_sums: bool,
    output: Path,
    overwrite: bool,
    follow_links: bool,
    **compute: Any,
) -> None:
    """Measure the experts on calibration text.

    Runs the calibration rows through MODEL layer by layer and records how much each expert
    contributes. To resume an interrupted run, run the same command again: OUTPUT.state holds the
    layers that are done.

    \b
    Example:
      reap2gguf observe ./Qwen3-30B-A3B --calibration text.txt -o observations.safetensors
      reap2gguf observe ./Qwen3-30B-A3B --calibration seed-000 -o observations.safetensors
      reap2gguf observe Qwen3-30B-A3B-Q4_K_M.gguf --memory 4GiB -o observations.safetensors
      torchrun --nproc-per-node 2 -m reap2gguf observe ./Qwen3-30B-A3B -o observations.safetensors
    """

    calibration = CalibrationOptions(spec, samples, max_length, seed, pack)
    seen = reap2gguf.observe(
        model,
        output,
        calibration=calibration,
        compute=collect_compute(compute),
        follow_links=follow_links,
        imatrix_sums=imatrix_sums,
        overwrite=overwrite,
        progress=terminal_progress(),
    )
    counts = f"{seen.n_rows} rows, {seen.n_tokens:,} tokens, {len(seen.layers)} layers"
    say(f"{output}: {counts}", "result")


@command()
@model_argument()
@option(
    "--observations",
    section=PRUNE,
    type=FilePath,
    help="File that `observe` wrote; not for methods that read weights alone or merge, nor with "
    "--kept.",
)
@pruning_options
@repair_option
@calibration_options
@compute_options
@threads_option
@option(
    "-o",
    "--output",
    section=WRITE,
    type=FolderPath,
    required=True,
    help="Folder to write; a GGUF file for one.",
)
@option(
    "--overwrite",
    section=WRITE,
    is_flag=True,
    help="Replace a GGUF file if it exists; a folder is never replaced.",
)
@follow_links_option
@output_options
def prune(
    model: str,
    observations: Path | None,
    output: Path,
    spec: str,
    samples: int | None,
    max_length: int | None,
    seed: int,
    pack: bool | None,
    **arguments: Any,
) -> None:
    """Remove experts, or merge them into others.

    Writes the pruned MODEL as a safetensors folder. Options of calibration and of computing are for
    --repair and for --method ream or hc_smoe, which merge experts by what they do on that text:
    nothing is read or computed without one of these.

    Of a GGUF file, OUTPUT is a GGUF file, or as many parts: the stored blocks of the experts that
    stay. Observations may be of the file or of the checkpoint that it was made from.

    \b
    Example:
      reap2gguf prune ./Qwen3-30B-A3B --observations observations.safetensors \\
          --keep-experts 96 -o Qwen3-30B-A3B-REAP
      reap2gguf prune ./Qwen3-30B-A3B --observations observations.safetensors \\
          --method weighted_ean_sum --calibration text.txt --repair -o Qwen3-30B-A3B-repaired
      reap2gguf prune ./Qwen3-30B-A3B --method aimer -o Qwen3-30B-A3B-AIMER
      reap2gguf prune ./Qwen3-30B-A3B --method ream --calibration text.txt -o Qwen3-30B-A3B-REAM
      reap2gguf prune ./Qwen3-30B-A3B --kept kept_experts.json -o Qwen3-30B-A3B-again
      reap2gguf prune Qwen3-30B-A3B-Q4_K_M.gguf --observations observations.safetensors \\
          -o Qwen3-30B-A3B-REAP-Q4_K_M.gguf
    """

    progress = terminal_progress()
    calibration = CalibrationOptions(spec, samples, max_length, seed, pack)
    names = "device", "memory", "spool", "dtype", "threads"
    compute = {name: arguments.pop(name) for name in names}
    found = reap2gguf.prune(
        model,
        observations,
        output,
        calibration=calibration,
        compute=collect_compute(compute),
        **arguments,
        progress=progress,
    )
    selection = found.selection
    kept = f"keeps {selection.n_kept} of {selection.n_experts} experts per layer"
    say(f"{found.folder}: {kept}", "result")


@command("compute")
@model_argument("hf_dir")
@option("--text", section=CALIBRATION, type=FilePath, required=True, help="Plain text to read.")
@option(
    "--chunk",
    section=CALIBRATION,
    type=Number(8),
    default=512,
    metavar="T",
    help="Tokens per chunk.",
)
@option(
    "--imatrix-chunks",
    "--chunks",
    section=CALIBRATION,
    type=Number(),
    metavar="N",
    help="Maximum number of chunks, spread over the text.",
    default_text="all",
)
@seed_option
@compute_options
@threads_option
@option(
    "-o", "--output", section=WRITE, type=FilePath, required=True, help="imatrix.gguf to write."
)
@overwrite_option
@follow_links_option
@output_options
def imatrix(
    hf_dir: str,
    text: Path,
    chunk: int,
    imatrix_chunks: int | None,
    seed: int,
    output: Path,
    overwrite: bool,
    follow_links: bool,
    **compute: Any,
) -> None:
    """Compute an importance matrix for HF_DIR.

    Also writes the matrix in llama.cpp's older format, as a .dat file beside OUTPUT. To resume an
    interrupted run, run the same command again.

    \b
    Example:
      reap2gguf imatrix compute ./Qwen3-30B-A3B-REAP --text calibration.txt -o imatrix.gguf
    """

    result = reap2gguf.imatrix(
        hf_dir,
        text,
        output,
        chunk=chunk,
        imatrix_chunks=imatrix_chunks,
        seed=seed,
        overwrite=overwrite,
        compute=collect_compute(compute),
        follow_links=follow_links,
        progress=terminal_progress(),
    )
    say(f"{output}: {len(result.entries)} matrices over {result.n_chunks} chunks", "result")


@command()
@model_argument("hf_dir")
@option(
    "-r",
    "--recipe",
    "recipe_name",
    section=WRITE,
    default=DEFAULT_RECIPE,
    metavar="NAME|FILE",
    help="Quantization recipe: a file type such as Q5_K_M, a name of `reap2gguf recipes list`, or "
    "a TOML file.",
)
@option(
    "--imatrix",
    "imatrix_file",
    section=WRITE,
    type=FilePath,
    metavar="FILE",
    help="Importance matrix, .gguf or .dat.",
)
@option(
    "-o",
    "--output",
    section=WRITE,
    type=click.Path(path_type=str),  # a Path of "" is the current folder
    required=True,
    help="GGUF file to write, or a folder for NAME-LABEL.gguf.",
)
@overwrite_option
@tensor_type_option
@label_option
@quantizing_device_option
@threads_option
@check_quants_option
@follow_links_option
@llama_cpp_option
@output_options
def quantize(
    hf_dir: str,
    recipe_name: str,
    imatrix_file: Path | None,
    tensor_types: tuple[str, ...],
    labels: tuple[tuple[str, str], ...],
    device: str,
    threads: int,
    check_quants: str,
    output: str,
    overwrite: bool,
    follow_links: bool,
) -> None:
    """Write HF_DIR as one GGUF file.

    If OUTPUT is a folder, the file in it is called NAME-LABEL.gguf. To resume an interrupted run,
    run the same command again: OUTPUT.journal lists the tensors that are written.

    \b
    Example:
      reap2gguf quantize ./Qwen3-30B-A3B-REAP --recipe unsloth-iq4km \\
          --imatrix imatrix.gguf -o Qwen3-30B-A3B-REAP-IQ4_K_M.gguf
    """

    result = reap2gguf.quantize(
        hf_dir,
        recipe_name,
        output,
        imatrix=imatrix_file,
        labels=dict(labels),
        tensor_types=tensor_types,
        threads=threads,
        device=device,
        check_quants=check_quants,
        overwrite=overwrite,
        follow_links=follow_links,
        progress=terminal_progress(),
    )
    say(f"{result.path}: {size(result.n_bytes)}, {result.bits_per_weight:.2f} bpw", "result")
