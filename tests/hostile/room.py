"""A folder for one hostile case, with sound files in it that the case breaks."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from reap2gguf.artifacts.observations import LayerObservation, Observations
from reap2gguf.building.record import program_versions
from reap2gguf.bundle.card import gguf_card, hf_card
from reap2gguf.bundle.manifest import (
    NO_METHOD,
    CalibrationRecord,
    FolderRecord,
    GgufRecord,
    Manifest,
    PruningRecord,
    SourceRecord,
)
from reap2gguf.bundle.modelfile import modelfile
from reap2gguf.bundle.sums import hash_folder, write_sums
from reap2gguf.checkpoint.checkpoint import Checkpoint
from reap2gguf.exporting.header_facts import HeaderNames
from reap2gguf.exporting.model_files import export_model
from reap2gguf.gguf_files.imatrix import Imatrix, ImatrixEntry, save_dat, save_gguf
from reap2gguf.models.table import describe
from reap2gguf.progress import Silent
from reap2gguf.pruning.write import config_text
from reap2gguf.quantizing.recipe import load_recipe
from reap2gguf.quantizing.resolve import resolve
from reap2gguf.verifying.report import Level, passed_file, passed_folder, passed_summary
from tests.tiny import TinyQwen3Moe, TinyQwen35Moe

PLAN = ("--recipe", "q8_0")


@dataclass(frozen=True)
class Sound:
    """Files without a fault, made once; cases copy them."""

    folder: Path

    @classmethod
    def make(cls, folder: Path) -> Sound:
        TinyQwen3Moe(vocab=4096).write(folder / "qwen3")
        TinyQwen3Moe(n_shards=2).write(folder / "shards")
        TinyQwen35Moe(layers="lf", vocab=4096).write(folder / "qwen35")
        with Checkpoint.open(folder / "qwen3") as checkpoint:
            _observations(checkpoint).save(folder / "seen.safetensors")
            imatrix = _imatrix(checkpoint)
            save_gguf(imatrix, folder / "imatrix.gguf")
            save_dat(imatrix, folder / "imatrix.dat")
            _bundle(checkpoint, folder)
        return cls(folder)


@dataclass
class Room:
    """Where one case lies."""

    sound: Sound
    folder: Path
    made: dict[str, Path] = field(default_factory=dict)

    def copy(self, name: str) -> Path:
        """A copy of a sound file or folder, the same one each time."""
        target = self.folder / name
        if not target.exists():
            source = self.sound.folder / name
            (shutil.copytree if source.is_dir() else shutil.copyfile)(source, target)
        return target

    def write(self, name: str, content: bytes | str) -> Path:
        """A file of the case."""
        path = self.folder / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    def sparse(self, name: str, n_bytes: int, begin: bytes = b"") -> Path:
        """A file of any length that takes no room."""
        path = self.folder / name
        path.unlink(missing_ok=True)
        with path.open("wb") as file:
            file.write(begin)
            file.truncate(n_bytes)
        return path


Build = Callable[[Room], list[Any]]


@dataclass(frozen=True)
class Case:
    """One malformed input: how it is made, and what the error says."""

    name: str
    build: Build  # makes the files; the arguments of the command
    words: str  # in the message
    code: int = 2


def sparse(model: str, name: str, n_bytes: int) -> Build:
    """`plan` of a model one file of which is long and of zeros."""

    def build(room: Room) -> list[Any]:
        folder = room.copy(model)
        room.sparse(f"{model}/{name}", n_bytes)
        return ["plan", folder, *PLAN]

    return build


def change_json(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Edit a JSON file in place; what `change` returns, if anything, replaces it."""
    values = json.loads(path.read_text())
    changed = change(values)
    path.write_text(json.dumps(values if changed is None else changed))


def _observations(checkpoint: Checkpoint) -> Observations:
    ones = np.ones(8)
    layer = LayerObservation(np.arange(8), ones, ones, ones, ones)
    print_ = checkpoint.fingerprint()
    return Observations({0: layer, 1: layer}, print_, "text.txt", "0" * 64, 4, 64, 0)


def _imatrix(checkpoint: Checkpoint) -> Imatrix:
    """A matrix as of 4 chunks of 64 tokens, routed evenly."""
    entries = {}
    model = describe(checkpoint)
    for tensor in model.gguf_tensors(checkpoint.tensors):
        if len(tensor.shape) > 1 and tensor.name.startswith("blk."):
            sums = np.ones((tensor.n_matrices, tensor.n_columns), dtype=np.float32)
            each = 256 if tensor.n_matrices == 1 else 256 * model.facts.experts_per_token // 8
            counts = np.full(tensor.n_matrices, each, dtype=np.int64)
            entries[tensor.name] = ImatrixEntry(tensor.name, sums, counts)
    return Imatrix(entries, "text.txt", 4, 64)


def _bundle(checkpoint: Checkpoint, folder: Path) -> None:
    """`build/NAME` and `build/NAME-GGUF`, as a build leaves them, of what was never pruned."""
    model = describe(checkpoint)
    hf, gguf = folder / "build" / "name", folder / "build" / "name-GGUF"
    shutil.copytree(checkpoint.folder, hf)
    (hf / "config.json").write_text(config_text(checkpoint.config))
    gguf.mkdir()
    for name in ("imatrix.gguf", "imatrix.dat"):
        shutil.copyfile(folder / name, gguf / name)
    recipe = load_recipe("q8_0")
    tensors = model.gguf_tensors(checkpoint.tensors)
    resolved = resolve(recipe, tensors, model.facts, 8, has_imatrix=True)
    path = gguf / "name-Q8_0.gguf"
    kept = dict.fromkeys((0, 1), tuple(range(8)))
    kinds = {name: kind.name for name, kind in resolved.tensor_types().items()}
    sizes = checkpoint.n_parameters, checkpoint.n_bytes
    passed = [
        passed_folder(len(checkpoint.tensors)),
        passed_file(path.name, len(kinds), Level.VALUES),
    ]
    text = "text"
    manifest = Manifest(
        name="name",
        program=program_versions(),
        source=SourceRecord("name", None, "", model.facts.architecture, *sizes),
        pruning=PruningRecord(NO_METHOD, 8, 8, 2, kept, "", 0, 0, 0),
        calibration=CalibrationRecord(
            "text.txt",
            "",
            64,
            42,
            False,
            "text.txt",
            hashlib.sha256(text.encode()).hexdigest(),
            4,
            64,
        ),
        hf=FolderRecord("name", 1, *sizes, {}),
        gguf=(
            GgufRecord(
                path.name,
                recipe.name,
                recipe.title,
                recipe.label,
                recipe.file_type,
                recipe.source,
                0,
                round(resolved.bits_per_weight, 4),
                kinds,
            ),
        ),
        verification={"summary": passed_summary(passed), "passed": passed},
    )
    export_model(checkpoint, model, HeaderNames.of(manifest), {path: resolved}, None, 1, Silent())
    (record,) = manifest.gguf
    manifest = replace(manifest, gguf=(replace(record, n_bytes=path.stat().st_size),))
    (hf / "README.md").write_text(hf_card(manifest, checkpoint.folder / "README.md"))
    manifest = replace(manifest, hf=replace(manifest.hf, files=hash_folder(hf, 1)))
    (gguf / "README.md").write_text(gguf_card(manifest, checkpoint.folder / "README.md"))
    (gguf / "Modelfile").write_text(modelfile(manifest, checkpoint.folder))
    (gguf / "calibration.txt").write_text(text)
    manifest.save(hf)
    manifest.save(gguf)
    write_sums(gguf, 1)
