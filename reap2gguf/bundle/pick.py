"""Which GGUF file of a bundle is meant, by its path, label or name."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from reap2gguf.bundle.manifest import MANIFEST_FILE, Manifest
from reap2gguf.errors import UsageError
from reap2gguf.gguf_files.gguf_split import part_of_split
from reap2gguf.messages import shown

_NO_MODELS = ("imatrix", "mmproj")  # what GGUF files beside a model's own begin with


@dataclass(frozen=True)
class ModelFile:
    """A GGUF file to run."""

    path: Path
    name: str  # what a server calls the model
    mmproj: Path | None = None  # the vision projector of its bundle
    others: tuple[str, ...] = ()  # of the same bundle, where nobody said which
    recipe: str = ""


@dataclass(frozen=True)
class _Candidate:
    path: Path
    label: str
    recipe: str

    def is_called(self, wanted: str) -> bool:
        names = (self.path.name, self.path.stem, self.label, self.recipe)
        return wanted.lower() in {name.lower() for name in names if name}


def pick(given: Path, wanted: str | None) -> ModelFile:
    """The GGUF file that `given` is or holds; `wanted` is a label, a recipe or a file's name.

    `given` is a GGUF file, a NAME-GGUF folder, the NAME folder beside it, OUTPUT/NAME, or an output
    folder of one bundle. Without `wanted` the bundle's first file is taken. Raises UsageError if
    there is none, and ArtifactError if the bundle's manifest is broken.
    """
    if os.path.isfile(given):
        if wanted is not None:
            raise UsageError(f"{given}: is one file; --file chooses among those of a bundle")
        return ModelFile(given, _model_name(given))
    folder = _bundle_folder(given)
    candidates = _candidates(folder)
    names = [_called(candidate) for candidate in candidates]
    found = candidates
    if wanted is not None:
        found = [candidate for candidate in candidates if candidate.is_called(wanted)]
        if not found:
            raise UsageError(f"{folder}: no --file {shown(wanted)}; it has {', '.join(names)}")
    chosen = found[0]
    return ModelFile(
        path=chosen.path,
        name=_model_name(chosen.path),
        mmproj=next(iter(sorted(folder.glob("mmproj*.gguf"))), None),
        others=tuple(names[1:]) if wanted is None else (),
        recipe=chosen.recipe,
    )


def _called(candidate: _Candidate) -> str:
    return candidate.label or candidate.path.name


def _bundle_folder(given: Path) -> Path:
    """The folder with GGUF files that `given` stands for."""
    beside = given.with_name(f"{given.name}-GGUF") if given.name else given / "none"
    for folder in (given, beside):
        if os.path.isdir(folder) and any(folder.glob("*.gguf")):
            return folder
    if not os.path.isdir(given):
        raise UsageError(f"{given}: no such file or folder; build one with `reap2gguf build`")
    below = sorted(path for path in given.glob("*-GGUF") if any(path.glob("*.gguf")))
    if len(below) == 1:
        return below[0]
    if below:
        names = ", ".join(path.name for path in below)
        raise UsageError(f"{given}: holds several bundles, name one: {names}")
    raise UsageError(f"{given}: holds no GGUF file; pass a NAME-GGUF folder or a .gguf file")


def _candidates(folder: Path) -> Sequence[_Candidate]:
    """The files of a bundle that are there, in the order of its recipes; never none."""
    if (folder / MANIFEST_FILE).is_file():
        manifest = Manifest.load(folder)
        found = [
            _Candidate(path, record.label, record.recipe)
            for record in manifest.gguf
            if (path := _present(folder / record.file)) is not None
        ]
        missing = ", ".join(record.file for record in manifest.gguf)
        problem = f"none of its files is here ({missing}); fetch one"
    else:
        files = sorted(folder.glob("*.gguf"))
        models = [file for file in files if not file.name.startswith(_NO_MODELS)]
        found = [_Candidate(file, "", "") for file in models if _is_first(file)]
        problem = "holds no GGUF file of a model; pass a NAME-GGUF folder"
    if not found:
        raise UsageError(f"{folder}: {problem}")
    return found


def _present(path: Path) -> Path | None:
    """A file, or the first of the parts it was split into, if it is there."""
    if path.is_file():
        return path
    parts = sorted(path.parent.glob(f"{path.stem}-00001-of-*.gguf"))
    return parts[0] if parts else None


def _model_name(path: Path) -> str:
    """A file's name without its ending, nor the number of a part."""
    part = part_of_split(path.name)
    return part[0] if part else path.stem


def _is_first(path: Path) -> bool:
    """Whether a file is whole or the first of several parts, which llama.cpp finds by itself."""
    part = part_of_split(path.name)
    return part is None or part[1] == 0
