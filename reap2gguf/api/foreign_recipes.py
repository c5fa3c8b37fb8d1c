"""Recipes from outside: of a GGUF file, and out of commands of other programs."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from reap2gguf.api.opening import PathLike, ProgressLike, to_progress
from reap2gguf.errors import SourceError, UsageError
from reap2gguf.outputs import claimed, output_file, result_file
from reap2gguf.progress import working

if TYPE_CHECKING:
    from reap2gguf.gguf_files.reader import GgufHeader
    from reap2gguf.importing.from_file import FoundRecipe
    from reap2gguf.importing.imported import ImportedRecipe, ModelTensors
    from reap2gguf.progress import Progress

_TEXT = "the text"


def recipe_of(
    file: PathLike,
    output: PathLike | None = None,
    *,
    overwrite: bool = False,
    progress: ProgressLike = None,
) -> FoundRecipe:
    """The recipe that a GGUF file of any publisher was made by, from the types of its tensors.

    `file` is a GGUF file, the first of several parts, or `owner/name:FILE.gguf` on the Hub, of
    which only the header is read. Every tensor gets the type that it has from the file type or the
    recipe that is nearest, and from rules by role, name and layer where it differs. `output` is a
    .toml file to write. Raises UnsupportedModelError for a model whose architecture is not
    implemented, SourceError, ArtifactError, UsageError and OutputError, also if the output exists
    and is not to be overwritten.
    """
    target, reports = _recipe_file(output, file), to_progress(progress)
    with claimed([target], overwrite):
        with working(reports, f"Reading {file}"):
            from reap2gguf.importing.from_file import recipe_of_header

            header = _header(os.fspath(file), reports)
            found = recipe_of_header(header, header.path.name.rsplit(":", 1)[-1])
        _write(target, found.as_toml())
    return found


def import_recipe(
    text: str | Path,
    model: PathLike | None = None,
    output: PathLike | None = None,
    *,
    base: str | None = None,
    overwrite: bool = False,
    progress: ProgressLike = None,
) -> ImportedRecipe:
    """A recipe out of a text for llama-quantize of llama.cpp or ik_llama.cpp.

    `text`, or the file at a Path, is a command with `--tensor-type`, `--custom-q` and the like, a
    shell script with one command, or a list of PATTERN=TYPE in lines or with commas. With `model`,
    a folder, a GGUF file or either on the Hub, each rule is compared with its tensors, and those
    that decide nothing are left out. `base` names the file type or recipe for tensors that no rule
    matches, in place of the text's. `output` is a .toml file to write.

    Raises RecipeError for a text that says no recipe, and for types that cannot be written;
    UsageError, OutputError, also if the output exists and is not to be overwritten, and what
    opening a model raises.
    """
    from reap2gguf.importing.foreign import read_foreign, text_of_file
    from reap2gguf.importing.imported import imported

    target = _recipe_file(output, text if isinstance(text, Path) else None, model)
    reports = to_progress(progress)
    where = str(text) if isinstance(text, Path) else _TEXT
    foreign = read_foreign(text_of_file(text) if isinstance(text, Path) else text, where, base)
    with claimed([target], overwrite):
        tensors = None if model is None else _tensors(model, reports)
        name = "imported" if target is None else target.stem
        found = imported(foreign, name, tensors)
        _write(target, found.as_toml())
    return found


def _recipe_file(output: PathLike | None, *inputs: PathLike | None) -> Path | None:
    """The recipe's file, if one is to be written; UsageError if it cannot be one."""
    if output is None:
        return None
    given = [os.fspath(one) for one in inputs if one is not None]
    target = result_file(output_file(output), given, None)
    if target.suffix != ".toml":
        raise UsageError(f"output {target}: the name of a recipe's file must end in .toml")
    return target


def _write(target: Path | None, text: str) -> None:
    from reap2gguf.atomic import write_whole
    from reap2gguf.machine import processes

    if target is not None and processes().is_first:
        write_whole(target, text)


def _header(name: str, progress: Progress) -> GgufHeader:
    """The header of a GGUF file, here or on the Hub."""
    from reap2gguf.gguf_files.split import read_whole_header
    from reap2gguf.hub.gguf_file import hub_gguf_name, open_hub_gguf

    path = Path(os.path.expanduser(name))
    if os.path.isfile(path):
        return read_whole_header(path)
    if inside := sorted(path.glob("*.gguf")) if path.is_dir() else ():
        raise SourceError(f"{name}: is a folder; pass one of its files, such as {inside[0]}")
    on_hub = None if os.path.isdir(path) else hub_gguf_name(name)
    if on_hub is None:
        raise SourceError(
            f"{name}: no such GGUF file; pass a file, or owner/name:FILE.gguf for one on the Hub"
        )
    return open_hub_gguf(*on_hub, progress.note)


def _tensors(name: PathLike, progress: Progress) -> ModelTensors:
    """The tensors of a model: of a checkpoint, or of a GGUF file whatever its types."""
    from reap2gguf.api.recipes import open_described
    from reap2gguf.importing.imported import ModelTensors

    with ExitStack() as stack:
        found = open_described(name, stack, progress)
        return ModelTensors(found.opened.label, found.tensors, found.model.facts)
