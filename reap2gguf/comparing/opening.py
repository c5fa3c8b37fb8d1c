"""What the user named to compare: GGUF files, folders of them, and checkpoints, here or on the Hub.

A file that is not of a model that this program can compute is opened too: its sizes are compared,
and `problem` says why it is not evaluated.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from reap2gguf.bundle.layout import may_be_model
from reap2gguf.comparing.contents import (
    Contents,
    contents_of_checkpoint,
    contents_of_gguf,
)
from reap2gguf.errors import CheckpointError, SourceError, UnsupportedModelError, UsageError
from reap2gguf.gguf_files.split import first_parts, read_whole_header
from reap2gguf.hub.gguf_file import hub_gguf_name, open_hub_gguf
from reap2gguf.hub.source import resolve_source
from reap2gguf.models.from_gguf import GgufModel, model_from_gguf
from reap2gguf.models.table import BY_GGUF, describe
from reap2gguf.models.transformers_config import check_with_transformers

if TYPE_CHECKING:
    from reap2gguf.checkpoint.checkpoint import Checkpoint
    from reap2gguf.gguf_files.reader import GgufHeader
    from reap2gguf.models.contract import MoeModel
    from reap2gguf.progress import Progress

_MOST = 64  # models at once


@dataclass(frozen=True)
class Opened:
    """One model that is compared."""

    label: str  # unique
    kind: Literal["gguf", "checkpoint"]
    contents: Contents
    named: str = ""  # by the user
    header: GgufHeader | None = None  # of a GGUF file
    in_gguf: GgufModel | None = None  # None if it cannot be computed
    checkpoint: Checkpoint | None = None
    model: MoeModel | None = None  # of a checkpoint, or of `in_gguf`
    problem: str = ""  # why it cannot be computed


def open_all(names: Sequence[str], stack: ExitStack, progress: Progress) -> list[Opened]:
    """Everything that `names` stand for, each once; checkpoints are closed with the stack.

    A folder without config.json stands for the GGUF files of models in it. Raises UsageError for
    too many files, and what opening a file raises.
    """
    found: list[Opened] = []
    for name in names:
        for one in _open(name, stack, progress):
            found.append(replace(one, named=name))
            if len(found) > _MOST:
                raise UsageError(f"more than {_MOST} files to compare; pass fewer")
    return _with_own_labels(found)


def _open(name: str, stack: ExitStack, progress: Progress) -> list[Opened]:
    path = Path(os.path.expanduser(name))
    if os.path.isfile(path):
        return [_gguf(path.name, read_whole_header(path))]
    if os.path.isdir(path) and not (path / "config.json").is_file():
        files = [file for file in sorted(path.glob("*.gguf")) if may_be_model(file.name)]
        if files:
            return [_gguf(file.name, read_whole_header(file)) for file in first_parts(files)]
    on_hub = None if os.path.isdir(path) else hub_gguf_name(name)
    if on_hub is not None:
        header = open_hub_gguf(*on_hub, progress.note)
        return [_gguf(str(header.path), header)]
    return [_checkpoint(name, stack, progress)]


def _gguf(label: str, header: GgufHeader) -> Opened:
    contents = contents_of_gguf(header)
    try:
        found = model_from_gguf(header, BY_GGUF)
        check_with_transformers(found.model)
    except (UnsupportedModelError, CheckpointError) as error:
        return Opened(label, "gguf", contents, header=header, problem=str(error))
    return Opened(label, "gguf", contents, header=header, in_gguf=found, model=found.model)


def _checkpoint(name: str, stack: ExitStack, progress: Progress) -> Opened:
    try:
        source = resolve_source(name, progress.note)
    except SourceError as error:
        if ".gguf" in name or ":" in name:
            advice = "pass a file that is there, owner/name:FILE.gguf, or a folder"
            raise SourceError(f"{error}; {advice}") from error
        raise
    source.complete(progress.note)
    checkpoint = source.open(progress.note)
    stack.callback(checkpoint.close)
    checkpoint.report_to(progress)
    model = describe(checkpoint)
    check_with_transformers(model)
    contents = contents_of_checkpoint(checkpoint, model)
    return Opened(source.label, "checkpoint", contents, checkpoint=checkpoint, model=model)


def _with_own_labels(found: list[Opened]) -> list[Opened]:
    """The same with labels that differ: a number follows a name that is there already."""
    seen: dict[str, int] = {}
    named = []
    for one in found:
        count = seen[one.label] = seen.get(one.label, 0) + 1
        named.append(one if count == 1 else replace(one, label=f"{one.label} ({count})"))
    return named
