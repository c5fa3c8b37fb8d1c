"""Takes a GGUF file that another command or program made into a bundle, after verifying it.

The file stays as it is, byte for byte. It must hold the bundle's own model: every tensor by name
and shape, the tokenizer, and every value within the error of its type.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from gguf import LlamaFileType

from reap2gguf.bundle.layout import model_file
from reap2gguf.bundle.manifest import FileRecord, GgufRecord, hash_file
from reap2gguf.errors import OutputError, UsageError, VerificationError
from reap2gguf.gguf_files.part_names import parse_part_name
from reap2gguf.gguf_files.reader import read_gguf_header
from reap2gguf.gguf_files.tensor_types import row_bytes
from reap2gguf.messages import shown
from reap2gguf.quantizing.file_types import IK_MIXTURES, MIXTURES
from reap2gguf.quantizing.recipe import check_label
from reap2gguf.verifying.gguf_file import ExpectedGguf, check_gguf

if TYPE_CHECKING:
    from reap2gguf.bundle.manifest import Manifest
    from reap2gguf.gguf_files.reader import GgufHeader
    from reap2gguf.progress import Progress
    from reap2gguf.verifying.context import Reference

_TITLE = "added after the build; made by another command"


@dataclass(frozen=True)
class Adopted:
    """A file that was verified, where it lies, and what the bundle will record of it."""

    path: Path
    record: GgufRecord
    sum: FileRecord


def adopt(
    path: Path,
    label: str | None,
    manifest: Manifest,
    reference: Reference,
    n_threads: int,
    progress: Progress,
) -> Adopted:
    """Verify a file against the bundle's model. `label` ends its new name; None: its own.

    Raises UsageError for a file whose type tells no label, RecipeError for a label that no file can
    have, ArtifactError if it is broken, VerificationError if it is not of this model, OutputError
    if it changes while it is read.
    """
    given, path = path, Path(os.path.realpath(path))  # the user named it
    if parse_part_name(given.name) is not None:
        raise UsageError(
            f"{path}: a part of a file; join the parts first: llama-gguf-split --merge"
        )
    header = read_gguf_header(path)
    before = path.stat()
    found = hash_file(path)
    file_type = _file_type(path, header)
    types = {name: info.tensor_type for name, info in header.tensors.items()}
    expected = ExpectedGguf(types, manifest.pruning.n_kept)
    if violations := list(check_gguf(path, expected, reference, n_threads, progress)):
        raise VerificationError(violations, "the file was not added")
    after = path.stat()
    if (after.st_size, after.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
        raise OutputError(f"{path}: was changed by another program while it was verified")
    label = _label(given, manifest.name, file_type) if label is None else label
    check_label(label, str(given))
    record = GgufRecord(
        file=model_file(manifest.name, label),
        recipe="",
        title=_TITLE,
        label=label,
        file_type=file_type,
        recipe_source="",
        n_bytes=before.st_size,
        bits_per_weight=_bits(header),
        tensors={name: tensor_type.name for name, tensor_type in types.items()},
        adopted=True,
    )
    return Adopted(path, record, found)


def _file_type(path: Path, header: GgufHeader) -> str:
    """The name of the file type in a header."""
    number = header.metadata.get("general.file_type")
    for name, mixture in (MIXTURES | IK_MIXTURES).items():
        if isinstance(number, int) and number == mixture.file_type.value:
            return name
    known = number in {one.value for one in LlamaFileType}
    word = LlamaFileType(number).name if known else shown(number)
    raise UsageError(f"{path}: general.file_type is {word}, expected one of {', '.join(MIXTURES)}")


def _label(path: Path, name: str, file_type: str) -> str:
    """What stands after NAME- in a file's name, else its file type."""
    start, stem = f"{name}-", path.name.removesuffix(".gguf")
    return stem.removeprefix(start) if stem.startswith(start) else file_type


def _bits(header: GgufHeader) -> float:
    """Bits per weight of a file's tensors."""
    n_weights = sum(prod(info.shape) for info in header.tensors.values())
    n_bytes = sum(
        prod(info.shape[:-1]) * row_bytes(info.tensor_type, info.shape[-1])
        for info in header.tensors.values()
    )
    return round(8 * n_bytes / n_weights, 4)
