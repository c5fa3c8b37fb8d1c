"""A recipe for a file of a given size, made for one model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from reap2gguf.api.opening import PathLike, ProgressLike, keep_files, open_named, to_progress
from reap2gguf.errors import UsageError
from reap2gguf.options import check_number, check_path, check_threads
from reap2gguf.outputs import output_file

if TYPE_CHECKING:
    from collections.abc import Mapping

    from gguf import GGMLQuantizationType

    from reap2gguf.building.given import GivenImatrix
    from reap2gguf.fitting.errors_table import Errors
    from reap2gguf.fitting.fitted import Fitted
    from reap2gguf.hub.opened import OpenModel
    from reap2gguf.progress import Progress

_CACHE = "type-errors.json"  # ends the name of the file with the measurements, beside recipes
_FEW_BITS = 2.6  # below it, types of less than 2 bits are measured too
_MOST_BITS = 16.0
_HEADER_ROOM = 2**12  # for what a build adds to a header, beside the ids of experts
_ID_BYTES = 8  # of an expert that a build keeps, once for the source and once for the original


@dataclass(frozen=True)
class FitResult:
    """A recipe that was written for a model, and the file that it makes."""

    path: Path  # of the recipe
    n_bytes: int  # of the GGUF file that `quantize` writes with it
    bits_per_weight: float
    file_type: str  # the mixture of llama.cpp that the header names
    n_rules: int
    gap: float  # by which share the damage is above the least possible one, at most
    tensor_types: Mapping[str, str]  # GGUF tensor name -> GGML type, such as Q4_K


def fit_recipe(
    model: PathLike,
    output: PathLike,
    *,
    imatrix: PathLike,
    target_size: int | None = None,
    target_bpw: float | None = None,
    threads: int | None = None,
    follow_links: bool = False,
    progress: ProgressLike = None,
) -> FitResult:
    """Write a recipe whose GGUF file of MODEL has a size and as little damage as is known.

    The size is given in bytes of the whole file, or in bits per weight, of which one is needed. The
    type of every tensor is chosen by what each type loses of it, measured on sampled rows with the
    importance matrix. `MODEL.type-errors.json` beside `output` keeps what was measured for the next
    call. Raises UsageError for a size that no types have, ArtifactError, OutputError, and what
    opening a model raises.
    """
    from reap2gguf.atomic import write_whole
    from reap2gguf.building.given import read_imatrix
    from reap2gguf.quantizing.recipe import check_label

    output, given = output_file(output), check_path("imatrix", imatrix)
    if output.suffix != ".toml":
        raise UsageError(f"output {output}: the name of a recipe's file must end in .toml")
    _check_target(target_size, target_bpw)
    shown, threads = to_progress(progress), check_threads(threads)
    with open_named(model, shown, follow_links=follow_links) as opened:
        cached = output_file(output.with_name(f"{opened.source.short_name}.{_CACHE}"))
        keep_files(opened, [output, cached], [given])
        opened.check_tokenizer()
        tensors = opened.model.gguf_tensors(opened.checkpoint.tensors)
        read = read_imatrix(given, tensors)
        n_weights = sum(prod(tensor.shape) for tensor in tensors)
        header = _header_bytes(opened, output.stem, read)
        budget = int((target_bpw or 0) * n_weights / 8)
        if target_size is not None:
            budget = target_size - header - _room(opened)
        types = _types(8 * budget / n_weights)
        errors = _errors(opened, read, types, cached, threads, shown)
        from reap2gguf.fitting.fitted import fit

        found = fit(output.stem, tensors, opened.model.facts, errors, types, budget)
        check_label(found.recipe.label, str(output))
        write_whole(output, found.recipe.source)
    return _result(output, found, header)


def _check_target(target_size: int | None, target_bpw: float | None) -> None:
    """Raise UsageError unless there is one target, and it is a sensible number."""
    if (target_size is None) == (target_bpw is None):
        raise UsageError("pass either a target size or target bits per weight, one of them")
    if target_size is not None:
        check_number("target_size", target_size, 1, 2**60)
    elif not (isinstance(target_bpw, int | float) and 0 < target_bpw <= _MOST_BITS):
        raise UsageError(f"target_bpw is {target_bpw!r}, expected more than 0, at most 16")


def _types(bits: float) -> tuple[GGMLQuantizationType, ...]:
    """Types to choose from."""
    from reap2gguf.fitting.errors_table import SMALLEST_TYPES, TYPES

    return TYPES if bits > _FEW_BITS else (*TYPES, *SMALLEST_TYPES)


def _errors(
    opened: OpenModel,
    given: GivenImatrix,
    types: tuple[GGMLQuantizationType, ...],
    cached: Path,
    threads: int,
    progress: Progress,
) -> Errors:
    """What each type loses of each tensor: measured, but for what a cache holds."""
    from reap2gguf.building.keys import ggml_identity, stage_key
    from reap2gguf.exporting.row_ranges import BlockMaker
    from reap2gguf.fitting.errors_table import FORMAT, Cache, measure
    from reap2gguf.fitting.fitted import free_tensors
    from reap2gguf.quantizing.quantizer import load_quantizer

    checkpoint = opened.checkpoint
    key = stage_key(FORMAT, checkpoint.fingerprint(), given.sha256, ggml_identity())
    cache = Cache(cached, key)
    known = cache.load(progress.note)
    maker = BlockMaker(checkpoint, load_quantizer(), given.imatrix.entries)
    free = free_tensors(opened.model.gguf_tensors(checkpoint.tensors))
    errors = measure(maker, free, types, threads, progress, known)
    if errors != known:
        cache.save(errors)
    return errors


def _header_bytes(opened: OpenModel, name: str, given: GivenImatrix) -> int:
    """Bytes before the first tensor, in the file that `quantize` writes with a recipe."""
    from reap2gguf.exporting.file_size import planned_file
    from reap2gguf.quantizing.recipe import load_recipe
    from reap2gguf.quantizing.resolve import resolve

    model, facts = opened.model, opened.model.facts
    # numbers of types have a fixed width, so any recipe's header is as long
    recipe = replace(load_recipe("Q4_K_M"), name=name)
    tensors = model.gguf_tensors(opened.checkpoint.tensors)
    some = resolve(recipe, tensors, facts, facts.n_experts, True)
    title, checkpoint = opened.source.short_name, opened.checkpoint
    return len(planned_file(checkpoint, model, title, some, given.imatrix, given.file).header)


def _room(opened: OpenModel) -> int:
    """Bytes that the header of a build's file has more: where the experts come from."""
    facts = opened.model.facts
    return _HEADER_ROOM + _ID_BYTES * facts.n_experts * len(facts.moe_layers)


def _result(path: Path, found: Fitted, header: int) -> FitResult:
    from reap2gguf.fitting.fitted import tensor_bytes

    resolved = found.resolved
    n_bytes = sum(tensor_bytes(entry.tensor, entry.tensor_type) for entry in resolved.table)
    return FitResult(
        path=path,
        n_bytes=header + n_bytes,
        bits_per_weight=resolved.bits_per_weight,
        file_type=resolved.file_type,
        n_rules=len(found.recipe.rules),
        gap=found.gap,
        tensor_types={name: one.name for name, one in resolved.tensor_types().items()},
    )
