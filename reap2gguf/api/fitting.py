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
    from reap2gguf.fitting.errors_table import Errors
    from reap2gguf.fitting.fitted import Fitted, Problem
    from reap2gguf.fitting.probing import Probing
    from reap2gguf.fitting.solving import Budget
    from reap2gguf.fitting.target import SizeTarget
    from reap2gguf.hub.opened import OpenModel
    from reap2gguf.models.description import ModelFacts
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
    output, given = _recipe_file(output), check_path("imatrix", imatrix)
    target = asked_target(target_size, target_bpw, fit, fit_context)
    check_choice("device", device, DEVICES)
    check_choice("sensitivity", sensitivity, SENSITIVITIES)
    compute, shown = ComputeOptions(device, threads=check_threads(threads)), to_progress(progress)
    with (
        open_named(model, shown, follow_links=follow_links) as opened,
        _claimed(opened, output, given, overwrite) as errors_file,
    ):
        asked = target, fit_context
        fitting = _fitting(opened, output, errors_file, given, asked, compute, shown)
        budget = fitting.budget()
        errors = fitting.errors(budget)
        weights = fitting.weights(errors) if sensitivity == MEASURED else None
        found = fitting.chosen(budget, errors, weights)
        return fitting.written(found, budget)


def asked_target(
    size: int | None, bpw: float | None, card: int | None, context: int | None
) -> SizeTarget:
    """The size that is asked for. Raises UsageError if there is none, or more than one."""
    from reap2gguf.fitting.target import SizeTarget

    target = SizeTarget.of(size, bpw, card, context)
    if target is None:
        raise ParameterError(
            "pass a target: target_size, target_bpw or fit", "target_size", "target_bpw", "fit"
        )
    return target


def target_within(
    target: SizeTarget, facts: ModelFacts, asked: int | None, shown: Progress
) -> SizeTarget:
    """The target with a context that the model has; `asked` is the one that was given, if any."""
    from reap2gguf.fitting.target import context_note

    if target.card and asked is not None and asked > facts.context_length:
        shown.note(context_note(target, facts.context_length))
    return target.within(facts.context_length)


def probing_of(
    opened: OpenModel,
    given: GivenImatrix,
    path: Path | None,
    compute: ComputeOptions,
    shown: Progress,
) -> Probing:
    """What measures how much an error in each tensor of a model counts; `path` keeps it."""
    from reap2gguf.building.keys import ggml_identity, stage_key
    from reap2gguf.evaluating.engine import evaluate_variants  # loads torch
    from reap2gguf.fitting.errors_table import Cache
    from reap2gguf.fitting.probe_text import probe_text
    from reap2gguf.fitting.probing import ProbedText, Probing
    from reap2gguf.fitting.target import PROBE_FORMAT

    text = probe_text(opened.source.folder, opened.model.facts)
    where = compute.likely_device, compute.likely_dtype
    of = opened.checkpoint.fingerprint(), given.sha256, text.sha256
    key = stage_key(PROBE_FORMAT, of, ggml_identity(), where)
    return Probing(
        opened.checkpoint,
        opened.model,
        given.imatrix,
        ProbedText(
            text.sha256,
            lambda variants, pairs: evaluate_variants(variants, text.rows, pairs, compute, shown),
        ),
        None if path is None else Cache(path, key),
    )


def sensitivities_file(folder: Path, opened: OpenModel) -> Path:
    """Where a folder keeps what `probing_of` measured of a model."""
    return output_file(folder / f"{opened.source.short_name}.{_SENSITIVITIES}")


def _recipe_file(output: PathLike) -> Path:
    """The file that is written. Raises UsageError for a name that no recipe may have."""
    path = output_file(output)
    if path.suffix != ".toml":
        raise UsageError(f"output {path}: the name of a recipe's file must end in .toml")
    return path


@contextmanager
def _claimed(opened: OpenModel, output: Path, imatrix: Path, overwrite: bool) -> Iterator[Path]:
    """Keep other processes from writing the output; the file of errors, shared by all recipes.

    Raises UsageError or OutputError for a file that cannot be written, or that is read.
    """
    errors = output_file(output.with_name(f"{opened.source.short_name}.{_CACHE}"))
    keep_files(opened, [output, errors, sensitivities_file(output.parent, opened)], [imatrix])
    with claimed([output], overwrite):
        yield errors


def _fitting(
    opened: OpenModel,
    output: Path,
    errors_file: Path,
    given: Path,
    asked: tuple[SizeTarget, int | None],
    compute: ComputeOptions,
    shown: Progress,
) -> _Fitting:
    """The model and what is asked of it: a target, and its context if one was given."""
    from reap2gguf.building.given import read_imatrix
    from reap2gguf.fitting.fitted import Problem

    facts = opened.model.facts
    sensitivities = sensitivities_file(output.parent, opened)
    opened.check_tokenizer()
    tensors = opened.model.gguf_tensors(opened.checkpoint.tensors)
    read = read_imatrix(given, tensors)
    problem = Problem(tensors, facts, facts.n_experts, read.imatrix.entries)
    target = target_within(asked[0], facts, asked[1], shown)
    files = output, errors_file, sensitivities
    return _Fitting(opened, read, problem, target, *files, compute, shown)


@dataclass(frozen=True)
class _Fitting:
    """A recipe on its way: a model, its importance matrix, and what is asked for."""

    opened: OpenModel
    given: GivenImatrix
    problem: Problem
    target: SizeTarget
    output: Path
    errors_file: Path
    sensitivities_file: Path
    compute: ComputeOptions
    shown: Progress

    def budget(self) -> Budget:
        """What the tensors may have; known from headers. Raises UsageError if it is too little."""
        from reap2gguf.fitting.solving import beyond, budget_of

        header = self._header(self.given)
        room = header + _room(self.opened)
        budget = budget_of(self.target, self.problem, self.opened.model, room)
        if line := beyond(self.target, self.problem, budget, header):
            self.shown.note(line)
        return budget

    def errors(self, budget: Budget) -> Errors:
        """What each type loses of each tensor."""
        from reap2gguf.fitting.errors_table import Cache, Where
        from reap2gguf.fitting.solving import Measuring

        cache = Cache(self.errors_file, _key(self.opened, self.given))
        where = Where(self.compute.device, self.compute.threads)
        measuring = Measuring(self.opened.checkpoint, self.given.imatrix, cache, where)
        return measuring.errors(self.problem, budget, self.shown)

    def weights(self, errors: Errors) -> Mapping[str, float]:
        """How much an error in each tensor counts, measured."""
        path = self.sensitivities_file
        probing = probing_of(self.opened, self.given, path, self.compute, self.shown)
        return probing.sensitivities(self.problem, errors, self.shown)

    def chosen(self, budget: Budget, errors: Errors, weights: Mapping[str, float] | None) -> Fitted:
        """The types with the least damage; without weights, by those of the table."""
        from reap2gguf.fitting.fitted import Named, fit
        from reap2gguf.quantizing.recipe import check_label

        named = Named(self.output.stem, self.target.label, self.target)
        found = fit(named, self.problem, errors, budget.types, budget.n_bytes, weights)
        check_label(found.recipe.label, str(self.output))
        return found

    def written(self, found: Fitted, budget: Budget) -> FitResult:
        """Write the recipe, and say what it makes."""
        from reap2gguf.atomic import write_whole

        write_whole(self.output, found.recipe.source)
        # a header says nothing of a matrix that no type uses
        header = self._header(self.given if _file_types(found).is_weighted else None)
        return _result(self.output, found, header, budget)

    def _header(self, given: GivenImatrix | None) -> int:
        return _header_bytes(self.opened, self.output.stem, given)


def _key(opened: OpenModel, given: GivenImatrix) -> str:
    """What measurements depend on."""
    from reap2gguf.building.keys import ggml_identity, stage_key
    from reap2gguf.fitting.errors_table import FORMAT

    return stage_key(FORMAT, opened.checkpoint.fingerprint(), given.sha256, ggml_identity())


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
