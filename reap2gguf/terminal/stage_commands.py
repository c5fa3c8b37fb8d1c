"""Commands that run one stage of a build on its own."""

from __future__ import annotations

import glob
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from reap2gguf.atomic import remove
from reap2gguf.errors import CalibrationError, OutputError, UsageError
from reap2gguf.machine import processes
from reap2gguf.options import CalibrationOptions, ComputeOptions, Resume
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
    from reap2gguf.checkpoint.checkpoint import Checkpoint
    from reap2gguf.hub.source import Source
    from reap2gguf.models import MoeModel


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
    from reap2gguf.calibration.corpus import check_calibration
    from reap2gguf.calibration.mixes import decide

    # what is refused without torch is refused before it is loaded
    calibration = decide(CalibrationOptions(spec, samples, max_length, seed, pack))
    check_calibration(calibration)
    source, checkpoint, described = _open(model)
    _check_parent(output)
    _check_tokenizer(source, described)
    from reap2gguf.building import stages
    from reap2gguf.calibration.rows import Tokenizer
    from reap2gguf.calibration.texts import observation_rows
    from reap2gguf.terminal.console import terminal_progress

    facts, progress = described.facts, terminal_progress()
    length = min(calibration.max_length, facts.context_length)
    rows = observation_rows(
        Tokenizer(source.folder), calibration, length, facts.vocab_size, progress
    )
    _check_same_rows(rows.sha256)
    where = _resuming(collect_compute(compute, output.parent), output, checkpoint, rows.sha256)
    seen = stages.observe(checkpoint, described, rows, where, progress)
    if not processes().is_first:
        return
    seen.save(output)
    _drop_states(output)
    click.echo(f"{output}: {seen.n_rows} rows, {seen.n_tokens:,} tokens, {len(seen.layers)} layers")


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
    _, checkpoint, described = _open(model, keep_mtp=mtp == "prune")
    _check_parent(output)
    from reap2gguf.artifacts.observations import Observations
    from reap2gguf.building.stages import prune_to_folder
    from reap2gguf.pruning.select import choose_target
    from reap2gguf.terminal.console import terminal_progress

    target = choose_target(described.facts, keep_experts, compression)
    seen = Observations.load(observations)
    prune_to_folder(checkpoint, described, seen, method, target, output, terminal_progress())
    click.echo(f"{output}: {target.n_kept} of {target.n_experts} experts kept in each layer")


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
    if output.suffix == ".dat":
        raise UsageError(f"-o {output}: name the .gguf; the .dat is written beside it")
    from reap2gguf.calibration.corpus import check_text

    check_text(text)
    source, checkpoint, described = _open(hf_dir)
    _check_parent(output)
    _check_tokenizer(source, described)
    from reap2gguf.building import stages
    from reap2gguf.calibration.rows import Tokenizer
    from reap2gguf.calibration.texts import imatrix_chunks
    from reap2gguf.terminal.console import terminal_progress

    chunk = min(chunk, described.facts.context_length)
    chunks = imatrix_chunks(Tokenizer(source.folder), text, chunk)
    computing = collect_compute(compute, output.parent)
    where = _resuming(computing, output, checkpoint, chunks.tokens_sha256)
    found, _ = stages.compute_imatrix(checkpoint, described, chunks, where, terminal_progress())
    if not processes().is_first:
        return
    stages.save_imatrix(found, output)
    _drop_states(output)
    click.echo(f"{output}: {len(found.entries)} matrices over {found.n_chunks} chunks")


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
    from reap2gguf.gguf_files.imatrix import load_imatrix
    from reap2gguf.quantizing.recipe import load_recipe
    from reap2gguf.quantizing.resolve import resolve

    recipe = load_recipe(recipe_name)
    importance = load_imatrix(imatrix_file) if imatrix_file else None
    source, checkpoint, described = _open(hf_dir)
    _check_parent(output)
    from reap2gguf.building import stages
    from reap2gguf.building.keys import export_key
    from reap2gguf.bundle.manifest import hash_file
    from reap2gguf.exporting.journal import ExportJournal
    from reap2gguf.terminal.console import size, terminal_progress

    facts = described.facts
    tensors = described.gguf_tensors(checkpoint.tensors)
    resolved = resolve(recipe, tensors, facts, facts.n_experts, importance is not None)
    name = imatrix_file.name if imatrix_file else ""
    digest = hash_file(imatrix_file).sha256 if imatrix_file else ""
    key = export_key(checkpoint.fingerprint(), source.short_name, recipe.source, name, digest)
    path = output.with_name(f"{output.name}.journal")
    stages.export(
        checkpoint, described, source.short_name, {output: resolved}, importance, [], threads,
        terminal_progress(), name, ExportJournal(path, key),
    )  # fmt: skip
    remove(path)
    click.echo(f"{output}: {size(output.stat().st_size)}, {resolved.bits_per_weight:.2f} bpw")


def say(text: str) -> None:
    """A line for who waits; of several processes only the first speaks."""
    if processes().is_first:
        click.echo(text, err=True)


def _open(model: str, keep_mtp: bool = True) -> tuple[Source, Checkpoint, MoeModel]:
    """A model and what it is, from its headers."""
    from reap2gguf.hub.source import resolve_source
    from reap2gguf.models import describe

    source = resolve_source(model, say)
    source.complete(say)
    from reap2gguf.terminal.console import terminal_progress

    checkpoint = source.open(say)
    click.get_current_context().call_on_close(checkpoint.close)  # also when it is interrupted
    checkpoint.report_to(terminal_progress())
    return source, checkpoint, describe(checkpoint, keep_mtp)


def _check_tokenizer(source: Source, described: MoeModel) -> None:
    from reap2gguf.tokenizer.gguf_keys import check_tokenizer

    check_tokenizer(source.folder, described.facts.vocab_size)


def _check_same_rows(digest: str) -> None:
    """Refuse rows that differ among processes: a dataset may change while they begin."""
    if processes().size > 1:
        from reap2gguf.observing.compute.ranks import join

        if join().tell(digest) != digest:
            raise CalibrationError(
                "the processes of this run have read different calibration rows; pin a dataset on "
                "the Hub as owner/name@revision, and run the command again"
            )


def _resuming(
    compute: ComputeOptions, output: Path, checkpoint: Checkpoint, rows: str
) -> ComputeOptions:
    """Where a sweep that writes `output` keeps what is done between layers: beside it."""
    from reap2gguf.building.keys import sweep_key

    path = output.with_name(f"{output.name}.state")
    source = (checkpoint.fingerprint(), checkpoint.stamps())
    key = sweep_key(source, rows, compute.likely_device, compute.likely_dtype)
    return replace(compute, resume=Resume(path, key))


def _drop_states(output: Path) -> None:
    """Remove what sweeps kept, now that the result is."""
    for file in output.parent.glob(f"{glob.escape(output.name)}.state*"):
        remove(file)


def _check_parent(output: Path) -> None:
    """Refuse an output that cannot be written, before the work."""
    if not output.name:
        raise UsageError("-o: expected the name of a file or folder")
    if not output.parent.is_dir():
        raise OutputError(f"{output}: the folder {output.parent} does not exist; make it first")
