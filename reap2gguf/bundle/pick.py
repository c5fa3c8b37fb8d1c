"""Finds the GGUF file to run: by its path, or in a bundle by quant type, recipe or file name."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from reap2gguf.bundle.layout import (
    GGUF_SUFFIX,
    MANIFEST_FILE,
    gguf_name,
    may_be_model,
    vision_projector,
)
from reap2gguf.bundle.manifest import Manifest
from reap2gguf.errors import UsageError
from reap2gguf.gguf_files.part_names import parse_part_name
from reap2gguf.messages import shown


@dataclass(frozen=True)
class ModelFile:
    """A GGUF file to run."""

    path: Path
    name: str  # what a server calls the model
    mmproj: Path | None = None  # the vision projector of its bundle
    others: tuple[str, ...] = ()  # further files of the bundle, if the user did not name one
    recipe: str = ""


@dataclass(frozen=True)
class _Candidate:
    path: Path
    label: str
    recipe: str
    is_ik: bool = False  # whether only ik_llama.cpp loads it

    @property
    def shown_as(self) -> str:
        return self.label or self.path.name

    def matches(self, wanted: str) -> bool:
        names = (self.path.name, self.path.stem, self.label, self.recipe)
        return wanted.lower() in {name.lower() for name in names if name}


def pick(path: Path, wanted: str | None) -> ModelFile:
    """The GGUF file that `path` is or holds; `wanted` is a quant type, a recipe or a file name.

    `path` is a GGUF file, a NAME-GGUF folder, the NAME folder beside it, OUTPUT/NAME, or an output
    folder with one bundle. Without `wanted`, it is the bundle's first file
    that llama.cpp loads. Raises UsageError if
    there is no such file, ArtifactError if the bundle's manifest is broken.
    """
    if os.path.isfile(path):
        if wanted is not None:
            raise UsageError(f"{path}: is a file; --file chooses among the files of a bundle")
        return ModelFile(path, _model_name(path))
    folder = _gguf_folder(path)
    candidates = _candidates(folder)
    names = [candidate.shown_as for candidate in candidates]
    matching = candidates
    if wanted is not None:
        matching = [candidate for candidate in candidates if candidate.matches(wanted)]
        if not matching:
            raise UsageError(f"{folder}: no file {shown(wanted)}; it has {', '.join(names)}")
    # by itself a file that llama.cpp loads is taken, as the bundle's instructions name one
    chosen = next((one for one in matching if not one.is_ik), matching[0])
    return ModelFile(
        path=chosen.path,
        name=_model_name(chosen.path),
        mmproj=vision_projector(folder),
        others=tuple(name for name in names if name != chosen.shown_as) if wanted is None else (),
        recipe=chosen.recipe,
    )


def _gguf_folder(path: Path) -> Path:
    """The folder with GGUF files that `path` stands for."""
    beside = path.with_name(gguf_name(path.name)) if path.name else path / "none"
    for folder in (path, beside):
        if os.path.isdir(folder) and any(folder.glob("*.gguf")):
            return folder
    if not os.path.isdir(path):
        raise UsageError(f"{path}: no such file or folder; build one with `reap2gguf build`")
    inside = sorted(f for f in path.glob(f"*{GGUF_SUFFIX}") if any(f.glob("*.gguf")))
    if len(inside) == 1:
        return inside[0]
    if inside:
        names = ", ".join(folder.name for folder in inside)
        raise UsageError(f"{path}: holds several bundles; pass one of them: {names}")
    raise UsageError(f"{path}: holds no GGUF file; pass a NAME{GGUF_SUFFIX} folder or a .gguf file")


def _candidates(folder: Path) -> Sequence[_Candidate]:
    """The model files in a GGUF folder, in the order of the bundle's recipes; at least one."""
    if (folder / MANIFEST_FILE).is_file():
        manifest = Manifest.load(folder)
        found = [
            _Candidate(path, record.label, record.recipe, record.is_ik)
            for record in manifest.gguf
            if (path := _present(folder / record.file)) is not None
        ]
        names = ", ".join(record.file for record in manifest.gguf)
        problem = f"none of the bundle's GGUF files is here ({names}); download one"
    else:
        files = sorted(folder.glob("*.gguf"))
        models = [file for file in files if may_be_model(file.name) and _is_first_part(file)]
        found = [_Candidate(file, "", "") for file in models]
        problem = f"holds no GGUF file of a model; pass a NAME{GGUF_SUFFIX} folder"
    if not found:
        raise UsageError(f"{folder}: {problem}")
    return found


def _present(path: Path) -> Path | None:
    """A file if it is there, else the first of its parts if that is there."""
    if path.is_file():
        return path
    parts = sorted(path.parent.glob(f"{path.stem}-00001-of-*.gguf"))
    return parts[0] if parts else None


def _model_name(path: Path) -> str:
    """A file's name without its suffix and part number."""
    part = parse_part_name(path.name)
    return part.stem if part else path.stem


def _is_first_part(path: Path) -> bool:
    """Whether a file is whole, or the first part; llama.cpp finds the other parts itself."""
    part = parse_part_name(path.name)
    return part is None or part.number == 0
