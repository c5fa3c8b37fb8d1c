"""`reap2gguf.json`: everything that made a bundle, and what must be found in it."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from gguf import GGMLQuantizationType

from reap2gguf.checkpoint.config import MAX_TOKENIZER_BYTES, read_json
from reap2gguf.disk import write_whole
from reap2gguf.errors import ArtifactError, Reap2ggufError

MANIFEST_FILE = "reap2gguf.json"
SUMS_FILE = "SHA256SUMS"
FORMAT = 1


@dataclass(frozen=True)
class SourceRecord:
    """The checkpoint that was pruned."""

    label: str
    revision: str | None
    fingerprint: str
    architecture: str
    n_parameters: int
    n_bytes: int


@dataclass(frozen=True)
class MtpRecord:
    """What became of a multi-token-prediction block, and what it predicts right.

    `hits` are next-next tokens predicted on the same rows by the source and by the pruned model.
    """

    state: str = "none"  # none, pruned or dropped
    hits_before: int = 0
    hits_after: int = 0
    n_tokens: int = 0


@dataclass(frozen=True)
class PruningRecord:
    """What was kept and why."""

    method: str
    n_experts: int
    n_kept: int
    experts_per_token: int
    kept: Mapping[int, Sequence[int]]  # layer -> source ids
    observations_sha256: str
    n_rows: int
    n_tokens: int
    n_dropped_rows: int
    mtp: MtpRecord = MtpRecord()


@dataclass(frozen=True)
class CalibrationRecord:
    """The texts, and how they were cut."""

    spec: str
    sha256: str
    max_length: int
    seed: int
    imatrix_text: str
    imatrix_sha256: str
    imatrix_chunks: int
    imatrix_chunk_size: int


@dataclass(frozen=True)
class FileRecord:
    """A file as it was when the bundle was finished."""

    n_bytes: int
    sha256: str


@dataclass(frozen=True)
class FolderRecord:
    """The pruned safetensors."""

    folder: str
    n_shards: int
    n_parameters: int
    n_bytes: int
    files: Mapping[str, FileRecord]


@dataclass(frozen=True)
class GgufRecord:
    """One GGUF file: its recipe, as text and as the table it became."""

    file: str
    recipe: str
    title: str
    label: str
    file_type: str
    recipe_source: str
    n_bytes: int
    bits_per_weight: float
    tensors: Mapping[str, str]  # GGUF name -> tensor type


@dataclass(frozen=True)
class SideRecord:
    """A GGUF file beside the model's own, such as a vision projector."""

    file: str
    title: str
    n_bytes: int
    tensors: Mapping[str, str]  # GGUF name -> tensor type


@dataclass(frozen=True)
class Manifest:
    """The whole record of one build.

    What a stage cost is no part of it: the same inputs make the same bundle, byte for byte.
    """

    name: str
    program: Mapping[str, str]  # versions
    source: SourceRecord
    pruning: PruningRecord
    calibration: CalibrationRecord
    hf: FolderRecord
    gguf: Sequence[GgufRecord]
    side_files: Sequence[SideRecord] = field(default_factory=tuple)
    verification: Mapping[str, Any] = field(default_factory=dict)

    def save(self, folder: Path) -> None:
        """Write `reap2gguf.json`, whole or not at all."""
        text = json.dumps({"format": FORMAT, **asdict(self)}, indent=1, ensure_ascii=False)
        # a list of expert ids reads better on one line
        text = re.sub(r"\[\n[ \n\d,]+\]", lambda ids: " ".join(ids[0].split()), text)
        write_whole(folder / MANIFEST_FILE, text + "\n")

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """Read the manifest of a bundle; ArtifactError if it is missing or malformed."""
        path = folder / MANIFEST_FILE
        try:
            values = read_json(path, MAX_TOKENIZER_BYTES)
        except Reap2ggufError as error:
            raise ArtifactError(str(error)) from error
        if values.pop("format", None) != FORMAT:
            raise ArtifactError(f"{path}: not a manifest of format {FORMAT}")
        try:
            manifest = _decode(values)
            _check_names(manifest)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ArtifactError(f"{path}: not a complete manifest ({error!r})") from error
        return manifest


def _check_names(manifest: Manifest) -> None:
    """Names that are joined to folders are plain, and types are GGML's; else ValueError."""
    names = [manifest.hf.folder, *manifest.hf.files]
    records: list[GgufRecord | SideRecord] = [*manifest.gguf, *manifest.side_files]
    for record in records:
        names.append(record.file)
        for kind in record.tensors.values():
            if kind not in GGMLQuantizationType.__members__:
                raise ValueError(f"unknown tensor type {kind!r}")
    for name in names:
        if not isinstance(name, str) or not name or Path(name).name != name:
            raise ValueError(f"{name!r} is no plain file name")


def _decode(values: dict[str, Any]) -> Manifest:
    pruning = dict(values["pruning"])
    pruning["kept"] = {int(k): tuple(map(int, v)) for k, v in pruning["kept"].items()}
    pruning["mtp"] = MtpRecord(**pruning["mtp"])
    hf = dict(values["hf"])
    hf["files"] = {str(k): FileRecord(**v) for k, v in hf["files"].items()}
    return Manifest(
        name=str(values["name"]),
        program=dict(values["program"]),
        source=SourceRecord(**values["source"]),
        pruning=PruningRecord(**pruning),
        calibration=CalibrationRecord(**values["calibration"]),
        hf=FolderRecord(**hf),
        gguf=tuple(GgufRecord(**record) for record in values["gguf"]),
        side_files=tuple(SideRecord(**record) for record in values["side_files"]),
        verification=dict(values["verification"]),
    )


def hash_file(path: Path) -> FileRecord:
    """Size and SHA-256 of a file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return FileRecord(os.fstat(file.fileno()).st_size, digest)
