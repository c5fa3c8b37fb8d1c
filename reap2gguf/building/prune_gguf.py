"""Pruning a GGUF file on its own: another GGUF file, of the same types and parts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from reap2gguf.errors import OutputError, UsageError
from reap2gguf.exporting.header_facts import pruning_values
from reap2gguf.gguf_source.checkpoint import GgufCheckpoint
from reap2gguf.gguf_source.file import model_name
from reap2gguf.gguf_source.writing import journal_path, planned, write_pruned_gguf
from reap2gguf.outputs import keep_inputs, output_file
from reap2gguf.pruning.history import read_history
from reap2gguf.pruning.methods import merges

if TYPE_CHECKING:
    from reap2gguf.hub.opened import OpenModel
    from reap2gguf.progress import Progress
    from reap2gguf.pruning.view import PrunedView

_SUFFIX = ".gguf"


def check_output(output: Path, method: str, repair: str, dequantize: str | None) -> None:
    """Raises UsageError for what slicing cannot give: another format, or other weights.

    OutputError if the output exists, unless an interrupted call has left it.
    """
    if output.suffix.lower() != _SUFFIX:
        raise UsageError(
            f"output {output}: MODEL is a GGUF file, and so is what is left of it; pass a name "
            f"that ends in {_SUFFIX}"
        )
    if output.exists() and not journal_path(output).exists():
        raise OutputError(f"{output}: exists already; pass another output or move it away")
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


def prune_to_gguf(
    opened: OpenModel, pruned: PrunedView, method: str, output: Path, progress: Progress
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
    keep_inputs([file.path for file in found.files], checkpoint.shards, source.folder)
    if not journal_path(output).exists():
        for file in found.files:
            if output_file(file.path).exists():
                raise OutputError(
                    f"{file.path}: exists already; pass another output or move it away"
                )
    write_pruned_gguf(found, checkpoint.fingerprint(), output, progress)
    return found.first
