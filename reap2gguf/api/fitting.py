"""A recipe for a file of a given size, made for one model."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from reap2gguf.api.opening import PathLike, ProgressLike, keep_files, open_named, to_progress
from reap2gguf.errors import ParameterError, UsageError
from reap2gguf.fitting.target import DEFAULT_SENSITIVITY, MEASURED, SENSITIVITIES
from reap2gguf.options import DEVICES, ComputeOptions, check_choice, check_path, check_threads
from reap2gguf.outputs import claimed, output_file

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from reap2gguf.building.given import GivenImatrix
    from reap2gguf.exporting.header_facts import FileTypes
    from reap2gguf.fitting.fitted import Fitted
    from reap2gguf.fitting.probing import Probing
    from reap2gguf.fitting.solving import Budget
    from reap2gguf.hub.opened import OpenModel
    from reap2gguf.progress import Progress

_CACHE = "type-errors.json"  # ends the name of the file with the measurements, beside recipes
_SENSITIVITIES = "sensitivities.json"  # ends the name of another such file
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
    counted: str | None = None  # of a GPU's memory, what is no weights: one sentence


def fit_recipe(
    model: PathLike,
    output: PathLike,
    *,
    imatrix: PathLike,
    target_size: int | None = None,
    target_bpw: float | None = None,
    fit: int | None = None,
    fit_context: int | None = None,
    sensitivity: str = DEFAULT_SENSITIVITY,
    device: str = "auto",
    threads: int | None = None,
    overwrite: bool = False,
    follow_links: bool = False,
    progress: ProgressLike = None,
) -> FitResult:
    """Write a recipe whose GGUF file of MODEL has a size and as little damage as is known.

    One target is needed: `target_size` in bytes of the whole file, `target_bpw` in bits per weight,
    or `fit`, the bytes of a GPU's memory, which is to hold a context of `fit_context` tokens too
    (8192). The type of every tensor is chosen by what each type loses of it, measured on sampled
    rows with the importance matrix; `device` is what quantizes them. `sensitivity` says how much an
    error in each tensor counts: by a table of kinds, or "measured" on this model, which takes an
    evaluation of some dozens of variants. `MODEL.type-errors.json` and `MODEL.sensitivities.json`
    beside `output` keep what was measured for the next call. Raises UsageError for a size that no
    types have, before anything is measured, ArtifactError, OutputError, also if the output exists
    and is not to be overwritten, and what opening a model raises.
    """
    from reap2gguf.atomic import write_whole
    from reap2gguf.building.given import read_imatrix
    from reap2gguf.fitting.errors_table import Cache, Where
    from reap2gguf.fitting.fitted import Named, Problem
    from reap2gguf.fitting.fitted import fit as choose_types
    from reap2gguf.fitting.solving import Measuring, beyond, budget_of
    from reap2gguf.fitting.target import SizeTarget, context_note
    from reap2gguf.quantizing.recipe import check_label

    output, given = output_file(output), check_path("imatrix", imatrix)
    if output.suffix != ".toml":
        raise UsageError(f"output {output}: the name of a recipe's file must end in .toml")
    target = SizeTarget.of(target_size, target_bpw, fit, fit_context)
    if target is None:
        raise ParameterError(
            "pass a target: target_size, target_bpw or fit", "target_size", "target_bpw", "fit"
        )
    check_choice("device", device, DEVICES)
    check_choice("sensitivity", sensitivity, SENSITIVITIES)
    where, shown = Where(device, check_threads(threads)), to_progress(progress)
    with (
        open_named(model, shown, follow_links=follow_links) as opened,
        _claimed(opened, output, given, overwrite) as cached,
    ):
        opened.check_tokenizer()
        tensors = opened.model.gguf_tensors(opened.checkpoint.tensors)
        read = read_imatrix(given, tensors)
        facts = opened.model.facts
        if target.card and fit_context is not None and target.context > facts.context_length:
            shown.note(context_note(target, facts.context_length))
        target = target.within(facts.context_length)
        problem = Problem(tensors, facts, facts.n_experts, read.imatrix.entries)
        header = _header_bytes(opened, output.stem, read)
        budget = budget_of(target, problem, opened.model, header + _room(opened))
        if line := beyond(target, problem, budget, header):
            shown.note(line)
        cache = Cache(cached, _key(opened, read))
        measuring = Measuring(opened.checkpoint, read.imatrix, cache, where)
        errors = measuring.errors(problem, budget, shown)
        weights = None
        if sensitivity == MEASURED:
            compute = ComputeOptions(device, threads=where.n_threads)
            weights = _probing(opened, read, output, compute, shown).sensitivities(
                problem, errors, shown
            )
        named = Named(output.stem, target.label, target)
        found = choose_types(named, problem, errors, budget.types, budget.n_bytes, weights)
        check_label(found.recipe.label, str(output))
        write_whole(output, found.recipe.source)
        if not _file_types(found).is_weighted:  # then the header says nothing of the matrix
            header = _header_bytes(opened, output.stem, None)
    return _result(output, found, header, budget)


@contextmanager
def _claimed(opened: OpenModel, output: Path, imatrix: Path, overwrite: bool) -> Iterator[Path]:
    """Keep other processes from writing the output; the file of measurements, for all recipes.

    Raises UsageError or OutputError for a file that cannot be written.
    """
    name = opened.source.short_name
    cached = output_file(output.with_name(f"{name}.{_CACHE}"))
    beside = output_file(output.with_name(f"{name}.{_SENSITIVITIES}"))
    keep_files(opened, [output, cached, beside], [imatrix])
    with claimed([output], overwrite):
        yield cached


def _key(opened: OpenModel, given: GivenImatrix) -> str:
    """What measurements depend on."""
    from reap2gguf.building.keys import ggml_identity, stage_key
    from reap2gguf.fitting.errors_table import FORMAT

    return stage_key(FORMAT, opened.checkpoint.fingerprint(), given.sha256, ggml_identity())


def _probing(
    opened: OpenModel, given: GivenImatrix, output: Path, compute: ComputeOptions, shown: Progress
) -> Probing:
    """What measures how much an error in each tensor counts."""
    from reap2gguf.building.keys import ggml_identity, stage_key
    from reap2gguf.evaluating.engine import evaluate_variants  # loads torch
    from reap2gguf.fitting.errors_table import Cache
    from reap2gguf.fitting.probe_text import probe_text
    from reap2gguf.fitting.probing import PROBE_FORMAT, ProbedText, Probing

    text = probe_text(opened.source.folder, opened.model.facts)
    where = compute.likely_device, compute.likely_dtype
    of = opened.checkpoint.fingerprint(), given.sha256, text.sha256
    key = stage_key(PROBE_FORMAT, of, ggml_identity(), where)
    path = output.with_name(f"{opened.source.short_name}.{_SENSITIVITIES}")
    return Probing(
        opened.checkpoint,
        opened.model,
        given.imatrix,
        ProbedText(
            text.sha256,
            lambda variants, pairs: evaluate_variants(variants, text.rows, pairs, compute, shown),
        ),
        Cache(path, key),
    )


def _header_bytes(opened: OpenModel, name: str, given: GivenImatrix | None) -> int:
    """Bytes before the first tensor, in the file that `quantize` writes with a recipe."""
    from reap2gguf.exporting.header_facts import HeaderNames
    from reap2gguf.fitting.solving import header_bytes

    names = HeaderNames(opened.source.short_name)
    weighted_by = None if given is None else (given.imatrix, given.file)
    return header_bytes(opened.checkpoint, opened.model, names, name, weighted_by)


def _file_types(found: Fitted) -> FileTypes:
    from reap2gguf.exporting.header_facts import FileTypes

    resolved = found.resolved
    return FileTypes(found.recipe.name, resolved.llama_file_type, resolved.tensor_types())


def _room(opened: OpenModel) -> int:
    """Bytes that the header of a build's file has more: where the experts come from."""
    facts = opened.model.facts
    return _HEADER_ROOM + _ID_BYTES * facts.n_experts * len(facts.moe_layers)


def _result(path: Path, found: Fitted, header: int, budget: Budget) -> FitResult:
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
        counted=None if budget.card is None else budget.card.words,
    )
