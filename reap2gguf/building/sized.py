"""A file of a build whose types are chosen for a size, once the importance matrix is known.

The plan has a guess in its place: a recipe of the same size and name, made without a look at any
weight. Its source says what was asked for, so that a bundle is up to date by that.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import TYPE_CHECKING

from reap2gguf.atomic import make_folder
from reap2gguf.building.keys import FIT_FORMAT, ggml_identity, stage_key
from reap2gguf.files import file_sha256
from reap2gguf.fitting.errors_table import FORMAT, SAMPLED, Cache, Where
from reap2gguf.fitting.fitted import (
    Fitted,
    Named,
    Problem,
    fit,
    fixed_types,
    guess,
    tensor_bytes,
)
from reap2gguf.fitting.probing import PROBE_FORMAT, Probing, probes_of
from reap2gguf.fitting.solving import Budget, Measuring, beyond, budget_of, header_bytes
from reap2gguf.fitting.target import MEASURED, TABLE, context_note
from reap2gguf.gguf_files.imatrix import load_imatrix
from reap2gguf.messages import size
from reap2gguf.pruning.view import PrunedView
from reap2gguf.quantizing.labels import refuse_twice
from reap2gguf.quantizing.overrides import read_overrides
from reap2gguf.quantizing.recipe import check_label

if TYPE_CHECKING:
    from pathlib import Path

    from gguf import GGMLQuantizationType

    from reap2gguf.building.stage import Run
    from reap2gguf.exporting.header_facts import HeaderNames
    from reap2gguf.fitting.card import CardUse
    from reap2gguf.fitting.target import SizeTarget
    from reap2gguf.gguf_files.imatrix import Imatrix
    from reap2gguf.hub.retry import Note
    from reap2gguf.models.description import ModelFacts
    from reap2gguf.options import BuildOptions
    from reap2gguf.pruning.select import Kept
    from reap2gguf.quantizing.resolve import ResolvedRecipe
    from reap2gguf.verifying.context import Reference

LABEL_KEY = "fit"  # names the file in --label fit=LABEL


@dataclass(frozen=True)
class SizedFile:
    """What a file is to be, and what is called so."""

    target: SizeTarget
    named: Named
    fixed: Mapping[str, GGMLQuantizationType]  # types that the user gave tensors
    n_experts: int
    card: CardUse | None = None  # what was counted, for a GPU
    n_probes: int = 0  # by which it is measured how much an error in each tensor counts
    # how many values are quantized to each type, to measure it
    sampled: Mapping[GGMLQuantizationType, int] = field(default_factory=dict)

    @property
    def label(self) -> str:
        return self.named.label

    def problem(self, reference: Reference, weighted: Collection[str]) -> Problem:
        """The model of the file, whose tensors are to get types."""
        weights, model = reference
        tensors = model.gguf_tensors(weights.tensors)
        return Problem(tensors, model.facts, self.n_experts, weighted, self.fixed)


def other_labels(options: BuildOptions) -> dict[str, str]:
    """The labels of recipes, without that of a file whose types are chosen."""
    has_size = options.target is not None
    return {name: one for name, one in options.labels.items() if name != LABEL_KEY or not has_size}


def within_context(options: BuildOptions, facts: ModelFacts, note: Note) -> BuildOptions:
    """The options with a context for --fit that the model has."""
    asked, most = options.target, facts.context_length
    if asked is None or asked.card is None or asked.context <= most:
        return options
    if options.fit_context is not None:
        note(context_note(asked, most))
    return replace(options, fit_context=most)


def with_sized(
    options: BuildOptions,
    view: PrunedView,
    header: int,
    weighted: Collection[str],
    recipes: tuple[ResolvedRecipe, ...],
) -> tuple[SizedFile | None, tuple[ResolvedRecipe, ...]]:
    """The file of a target size, if there is one, and the recipes with a guess of its own.

    `view` is the model with any experts, `header` what `planned_header` counts. Raises as
    `plan_sized`, and UsageError for two files of one name.
    """
    if (target := options.target) is None:
        return None, recipes
    sized, guessed = plan_sized(options, target, view, header, weighted)
    found = (*recipes, guessed)
    refuse_twice([recipe.label for recipe in found])
    return sized, found


def plan_sized(
    options: BuildOptions,
    target: SizeTarget,
    view: PrunedView,
    header: int,
    weighted: Collection[str],
) -> tuple[SizedFile, ResolvedRecipe]:
    """What is known of the file before the build, and a guess of its recipe.

    `view` is the model with any experts, `weighted` the tensors that will have importance. Raises
    TooSmall for a size that no types have, RecipeError for types that tensors cannot have.
    """
    label = options.labels.get(LABEL_KEY, target.label)
    check_label(label, f"--label {LABEL_KEY}")
    named = Named(target.label.lower(), label, target)
    sized = SizedFile(target, named, {}, view.n_kept)
    sized = replace(
        sized,
        fixed=fixed_types(
            read_overrides(options.tensor_types), sized.problem((view, view.model), weighted)
        ),
    )
    problem = sized.problem((view, view.model), weighted)
    budget = budget_of(target, problem, view.model, header)
    guessed = guess(named, problem, budget.types, budget.n_bytes).resolved
    given = {tensor: one.name for tensor, one in sorted(sized.fixed.items())}
    how = "" if options.sensitivity == TABLE else f", sensitivity {options.sensitivity}"
    source = f"# chosen in the build: {target!r}, {given}, format {FIT_FORMAT}{how}\n"
    recipe = replace(guessed.recipe, source=source)
    measures = options.sensitivity == MEASURED
    sized = replace(
        sized,
        card=budget.card,
        sampled=_sampled(problem, budget),
        n_probes=len(probes_of(problem, view.model.facts)) if measures else 0,
    )
    return sized, replace(guessed, recipe=recipe)


def _sampled(problem: Problem, budget: Budget) -> dict[GGMLQuantizationType, int]:
    """How many values are quantized to each type."""
    found = dict.fromkeys(budget.types, 0)
    for tensor in problem.to_measure():
        for one in problem.types_for(tensor, budget.types):
            found[one] += min(SAMPLED, prod(tensor.shape))
    return found


def choose_types(
    run: Run,
    sized: SizedFile,
    reference: Reference,
    kept: Kept,
    names: HeaderNames,
    imatrix_file: Path,
) -> Fitted:
    """The recipe of the file, with the importance matrix of the model that the build makes.

    `reference` is that model, with the experts `kept`, and `names` what its headers say. What is
    measured is kept for all builds of this output. Raises what `Measuring.errors`, `budget_of` and
    `fit` raise.
    """
    compute, imatrix = run.plan.options.compute, load_imatrix(imatrix_file)
    problem, (weights, model) = sized.problem(reference, imatrix.entries), reference
    header = header_bytes(weights, model, names, sized.named.name, (imatrix, imatrix_file.name))
    budget = budget_of(sized.target, problem, model, header)
    if line := beyond(sized.target, problem, budget, header):
        run.progress.note(line)
    identity = weights.identity if isinstance(weights, PrunedView) else ""
    of = run.keys.pruned_of(kept, identity), file_sha256(imatrix_file), ggml_identity()
    cache = _cache(run, "type-errors", stage_key(FORMAT, *of))
    where = Where(compute.device, compute.threads)
    errors = Measuring(weights, imatrix, cache, where).errors(problem, budget, run.progress)
    counts = None
    if sized.n_probes:
        counts = _probing(run, reference, imatrix, of).sensitivities(problem, errors, run.progress)
    found = fit(sized.named, problem, errors, budget.types, budget.n_bytes, counts)
    run.progress.note(_words(sized, found, header))
    return found


def _cache(run: Run, folder: str, key: str) -> Cache:
    """A file that all builds of this output share. Raises OutputError."""
    cache = Cache(run.work.shared / folder / f"{key}.json", key)
    make_folder(cache.path.parent)
    return cache


def _probing(run: Run, reference: Reference, imatrix: Imatrix, of: Sequence[object]) -> Probing:
    """What measures how much an error in each tensor counts; `of` is what it depends on."""
    assert run.probe_text is not None  # only a build that runs chooses types
    compute, text = run.plan.options.compute, run.probe_text()
    where = compute.likely_device, compute.likely_dtype
    key = stage_key(PROBE_FORMAT, *of, text.sha256, where)
    return Probing(*reference, imatrix, text, _cache(run, "sensitivities", key))


def _words(sized: SizedFile, found: Fitted, header: int) -> str:
    """What was chosen, for people."""
    n_bytes = header + sum(
        tensor_bytes(entry.tensor, entry.tensor_type) for entry in found.resolved.table
    )
    line = (
        f"{sized.label}: types chosen for {sized.target.words}: {size(n_bytes)}, "
        f"{found.resolved.bits_per_weight:.2f} bits per weight, at most {100 * found.gap:.2f} % "
        "above the least damage"
    )
    return line if sized.card is None else f"{line}; counted {sized.card.words}"
