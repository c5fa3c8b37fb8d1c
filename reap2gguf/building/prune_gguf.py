"""Pruning a GGUF file on its own: another GGUF file, of the same types and parts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from reap2gguf.errors import UsageError
from reap2gguf.exporting.header_facts import pruning_values
from reap2gguf.gguf_files.part_names import parse_part_name
from reap2gguf.gguf_source.checkpoint import GgufCheckpoint
from reap2gguf.gguf_source.file import model_name
from reap2gguf.gguf_source.writing import (
    is_being_named,
    journal_path,
    part_paths,
    planned,
    write_pruned_gguf,
)
from reap2gguf.outputs import alone, check_new, keep_inputs, output_file
from reap2gguf.pruning.history import read_history
from reap2gguf.pruning.methods import merges

if TYPE_CHECKING:
    from reap2gguf.hub.opened import OpenModel
    from reap2gguf.progress import Progress
    from reap2gguf.pruning.view import PrunedView

_SUFFIX = ".gguf"


def check_slicing(method: str, repair: str, dequantize: str | None) -> None:
    """Raises UsageError for what slicing cannot give: other weights."""
    if merges(method):
        raise UsageError(
            f"--method {method}: it makes new weights, and the blocks of a GGUF file stay as they "
            "are; pass another method, or the safetensors checkpoint"
        )
    if repair != "none":
        raise UsageError(
            "--repair: it makes new weights, and the blocks of a GGUF file stay as they are; leave "
            "it out, or pass the safetensors checkpoint"
        )
    if dequantize is not None:
        raise UsageError(
            "--dequantize: the blocks of a GGUF file stay as they are; leave it out, or pass the "
            "safetensors checkpoint"
        )


@contextmanager
def claimed_parts(opened: OpenModel, output: Path, overwrite: bool) -> Iterator[Path]:
    """The output without the number of a part, written by no other process while this is open.

    Raises UsageError for a name that the output cannot have, OutputError if another process writes
    it, or if one of its files exists, is not to be overwritten, and is not of an interrupted call.
    """
    n_parts = _n_parts(opened)
    output = _whole_name(output, n_parts)
    paths = [output_file(path) for path in part_paths(output, n_parts)]
    keep_inputs(paths, opened.checkpoint.shards, opened.source.folder)
    with alone(output):
        if not journal_path(output).exists():
            for path in paths:
                check_new(path, overwrite)
        yield output


def _n_parts(opened: OpenModel) -> int:
    header = opened.checkpoint.gguf
    assert header is not None
    return len(header.headers)


def _whole_name(output: Path, n_parts: int) -> Path:
    """An output's name without the number of its first part, if it has one."""
    if output.suffix.lower() != _SUFFIX:
        raise UsageError(
            f"output {output}: MODEL is a GGUF file, and so is what is left of it; pass a name "
            f"that ends in {_SUFFIX}"
        )
    named = parse_part_name(output.name)
    if named is None:
        return output
    if (named.number, named.count) != (0, n_parts):
        has = f"{n_parts} parts" if n_parts > 1 else "one part"
        raise UsageError(
            f"output {output}: is the name of part {named.number + 1} of {named.count}, and MODEL "
            f"has {has}; pass {named.stem}{_SUFFIX}"
        )
    return output if n_parts == 1 else output.with_name(f"{named.stem}{_SUFFIX}")


def prune_to_gguf(
    opened: OpenModel,
    pruned: PrunedView,
    method: str,
    output: Path,
    progress: Progress,
    overwrite: bool = False,
) -> Path:
    """Write the experts of a view as a GGUF file, or as many parts as the source has; the first.

    Raises OutputError if a file exists already or the disk refuses, ArtifactError if the source
    cannot be read, VerificationError if what was written is not what was planned.
    """
    checkpoint, source = opened.checkpoint, opened.source
    assert isinstance(checkpoint, GgufCheckpoint)
    facts = opened.model.facts
    history = read_history(checkpoint, facts, progress.note)
    earlier = None if history is None else history.after(pruned.kept)
    own = pruning_values(source.gguf_name, method, facts.n_experts, pruned.kept, earlier=earlier)
    found = planned(checkpoint, pruned, output, model_name(output.name), own)
    fingerprint = checkpoint.fingerprint()
    if not is_being_named(found, fingerprint, output):
        for file in found.files:
            check_new(file.path, overwrite)
    write_pruned_gguf(found, fingerprint, output, progress)
    return found.first
