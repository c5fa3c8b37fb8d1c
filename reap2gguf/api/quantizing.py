"""Quantizing on its own: one GGUF file by one recipe."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from reap2gguf.api.opening import PathLike, ProgressLike, claimed_files, open_named, to_progress
from reap2gguf.errors import UsageError
from reap2gguf.options import (
    CheckQuants,
    ComputeOptions,
    check_path,
    check_quants_of,
    check_threads,
)
from reap2gguf.outputs import output_file
from reap2gguf.quantizing.named import check_labels, check_tensor_types, one_recipe

if TYPE_CHECKING:
    from reap2gguf.exporting.model_files import WeightedBy
    from reap2gguf.gguf_files.imatrix import Imatrix
    from reap2gguf.hub.opened import OpenModel
    from reap2gguf.progress import Progress
    from reap2gguf.quantizing.recipe import Recipe
    from reap2gguf.quantizing.resolve import ResolvedRecipe


@dataclass(frozen=True)
class QuantizeResult:
    """A GGUF file that was written."""

    path: Path
    n_bytes: int
    bits_per_weight: float
    tensor_types: Mapping[str, str]  # GGUF tensor name -> GGML type, such as Q4_K


def quantize(
    model: PathLike,
    recipe: str,
    output: PathLike,
    *,
    imatrix: Imatrix | PathLike | None = None,
    labels: Mapping[str, str] | None = None,
    tensor_types: Sequence[str] | Mapping[str, str] = (),
    threads: int | None = None,
    device: str = "auto",
    check_quants: CheckQuants | str = CheckQuants.SAMPLE,
    overwrite: bool = False,
    follow_links: bool = False,
    progress: ProgressLike = None,
) -> QuantizeResult:
    """Write MODEL as one GGUF file by a recipe: a file type, a shipped recipe, or a TOML file.

    `tensor_types` (pattern to type, or a list of PATTERN=TYPE) come before the recipe's rules. If
    `output` is a folder, the file in it is called NAME-LABEL.gguf; `labels` may give the recipe
    another label. `device` is what quantizes: "cpu", "cuda", or "auto", a GPU if there is one and
    much to do. `check_quants` says how much of what the compiled kernels quantize is compared with
    libggml's bytes: "all", "sample" (one super-block in a thousand) or "none". An interrupted call
    resumes from the tensor that `OUTPUT.journal` holds. Of a GGUF file that was pruned, the new one
    says so too. Raises RecipeError, ArtifactError, OutputError, also if the output exists and is
    not to be overwritten, UsageError, and what opening a model raises.
    """
    from reap2gguf.building.needs.room import check_device
    from reap2gguf.exporting.model_files import WeightedBy
    from reap2gguf.gguf_files.imatrix import Imatrix

    recipe = one_recipe(recipe)
    compute = ComputeOptions(
        device, threads=check_threads(threads), check_quants=check_quants_of(check_quants)
    )
    asked, inputs = _recipe(recipe, labels, tensor_types)
    if not isinstance(imatrix, Imatrix | None):
        inputs.append(imatrix := check_path("imatrix", imatrix))
    weighted_by = None if imatrix is None else WeightedBy.of(imatrix)
    check_device(compute)
    place, shown = _Place.of(output, bool(labels)), to_progress(progress)
    with open_named(model, shown, follow_links=follow_links) as opened:
        path = place.file(opened.source.short_name, asked.label)
        with claimed_files(opened, [path], inputs, overwrite):
            resolved = _resolved(opened, asked, weighted_by is not None)
            _Export(opened, resolved, weighted_by, compute, shown).write(path)
    types = {tensor: one.name for tensor, one in resolved.tensor_types().items()}
    return QuantizeResult(path, path.stat().st_size, resolved.bits_per_weight, types)


def _recipe(
    name: str,
    labels: Mapping[str, str] | None,
    tensor_types: Sequence[str] | Mapping[str, str],
) -> tuple[Recipe, list[Path]]:
    """The recipe of a name, and the file that it is read from, if it is one."""
    from reap2gguf.quantizing.overrides import read_overrides
    from reap2gguf.quantizing.recipe import find_recipe, load_recipes

    overrides = read_overrides(check_tensor_types(tensor_types))
    (asked,) = load_recipes([name], check_labels(labels or {}), overrides)
    found = find_recipe(name)
    return asked, [found] if isinstance(found, Path) else []


def _resolved(opened: OpenModel, asked: Recipe, is_weighted: bool) -> ResolvedRecipe:
    """What the recipe gives the tensors of a model."""
    from reap2gguf.quantizing.ik.workers import check_installed
    from reap2gguf.quantizing.resolve import resolve

    facts = opened.model.facts
    tensors = opened.model.gguf_tensors(opened.checkpoint.tensors)
    resolved = resolve(asked, tensors, facts, facts.n_experts, is_weighted)
    check_installed([resolved])
    return resolved


@dataclass(frozen=True)
class _Place:
    """Where the file goes: its own name, or that of a folder for it."""

    path: Path
    is_folder: bool

    @classmethod
    def of(cls, output: PathLike, has_labels: bool) -> _Place:
        """Raises UsageError or OutputError for a name that no file can have."""
        is_folder = bool(str(output)) and os.path.isdir(str(output))
        if has_labels and not is_folder:
            raise UsageError(f"{output}: names the file already; pass a folder, or no label")
        if not is_folder and str(output).endswith(os.sep):
            raise UsageError(f"output {output}: there is no such folder; create it first")
        return cls(Path(output) if is_folder else output_file(output), is_folder)

    def file(self, name: str, label: str) -> Path:
        """The file of the model `name` by a recipe with that label."""
        from reap2gguf.bundle.layout import model_file

        return output_file(self.path / model_file(name, label)) if self.is_folder else self.path


@dataclass(frozen=True)
class _Export:
    """One GGUF file to write; its journal lies beside it until it is complete."""

    opened: OpenModel
    recipe: ResolvedRecipe
    weighted_by: WeightedBy | None
    compute: ComputeOptions
    progress: Progress

    @property
    def imatrix(self) -> Imatrix | None:
        return None if self.weighted_by is None else self.weighted_by.imatrix

    def write(self, output: Path) -> None:
        """Raises what `quantize` raises."""
        from reap2gguf.atomic import remove
        from reap2gguf.exporting.header_facts import HeaderNames
        from reap2gguf.exporting.journal import ExportJournal
        from reap2gguf.exporting.model_files import export_model
        from reap2gguf.exporting.quantizers import note_quantizers
        from reap2gguf.pruning.history import repeated_pruning
        from reap2gguf.quantizing.source_blocks import note_blocks

        self._check()
        opened, compute = self.opened, self.compute
        weighted = () if self.imatrix is None else self.imatrix.entries.keys()
        note_blocks(opened.checkpoint, [self.recipe], self.progress.note)
        note_quantizers([self.recipe], weighted, compute.device, self.progress)
        own = repeated_pruning(opened.checkpoint, opened.model.facts, self.progress.note)
        journal_path = output.with_name(f"{output.name}.journal")
        export_model(
            opened.checkpoint,
            opened.model,
            HeaderNames(opened.source.short_name, own=own),
            {output: self.recipe},
            self.weighted_by,
            compute.threads,
            self.progress,
            ExportJournal(journal_path, self._key()),
            device=compute.device,
            checked=compute.check_quants.share,
        )
        remove(journal_path)

    def _key(self) -> str:
        """What the bytes of the file depend on."""
        from reap2gguf.building.keys import export_key, ik_identity

        by = self.weighted_by
        identity = ("", "") if by is None else (by.file, by.digest())
        name, recipe = self.opened.source.short_name, self.recipe
        of_model = self.opened.checkpoint.fingerprint(), name
        return export_key(*of_model, recipe.source, *identity, *ik_identity([recipe]))

    def _check(self) -> None:
        """Refuse a matrix that does not fit, or the lack of one.

        The export checks it too, but later: an error is to come before the line about quantizers.
        """
        from reap2gguf.exporting.row_ranges import check_imatrix, made_types
        from reap2gguf.gguf_files.imatrix_coverage import shapes_of
        from reap2gguf.gguf_files.imatrix_fit import fit
        from reap2gguf.quantizing.minimum import check_minimum, check_needed

        tensors = self.opened.model.gguf_tensors(self.opened.checkpoint.tensors)
        if self.weighted_by is None:
            why = "none is given; compute one with `reap2gguf imatrix` and pass --imatrix"
            check_needed(self.recipe, (), why)
        types = made_types(tensors, [self.recipe.tensor_types()])
        check_imatrix(tensors, types, self.imatrix)
        by_expert, file = None, ""  # a .dat file has all experts of a tensor in one row
        if self.weighted_by is not None:
            file = self.weighted_by.file
            by_expert = fit(self.weighted_by.imatrix, shapes_of(tensors), file).imatrix
        check_minimum(self.recipe, by_expert, file)
