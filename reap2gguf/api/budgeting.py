"""A budget for experts and bits together."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from reap2gguf.api.fitting import asked_target, probing_of, sensitivities_file, target_within
from reap2gguf.api.opening import PathLike, ProgressLike, keep_files, open_named, to_progress
from reap2gguf.errors import ParameterError
from reap2gguf.fitting.target import MEASURED, SENSITIVITIES, WEIGHED_SENSITIVITY
from reap2gguf.options import (
    ComputeOptions,
    check_choice,
    check_number,
    check_path,
    given_or_new,
)
from reap2gguf.pruning.methods import OBSERVED

if TYPE_CHECKING:
    from pathlib import Path

    from reap2gguf.bundle.budget import CountRecord
    from reap2gguf.checkpoint.checkpoint import Checkpoint
    from reap2gguf.evaluating.texts import EvaluationText
    from reap2gguf.fitting.trading import Probes, Source, Weighing
    from reap2gguf.hub.opened import OpenModel
    from reap2gguf.models.description import ModelFacts
    from reap2gguf.progress import Progress
    from reap2gguf.pruning.select import Kept

_CHUNK = 512  # tokens, of which half are scored


@dataclass(frozen=True)
class BudgetResult:
    """What each number of experts costs in a budget, and the number that costs least."""

    candidates: tuple[CountRecord, ...]
    best: CountRecord
    n_scored: int  # tokens on which pruning was measured


def weigh_budget(
    model: PathLike,
    *,
    observations: PathLike,
    imatrix: PathLike,
    target_size: int | None = None,
    target_bpw: float | None = None,
    fit: int | None = None,
    fit_context: int | None = None,
    keep_experts: Sequence[int] | None = None,
    method: str = "reap",
    text: str = "held-out",
    chunks: int = 16,
    sensitivity: str = WEIGHED_SENSITIVITY,
    cache: PathLike | None = None,
    compute: ComputeOptions | None = None,
    follow_links: bool = False,
    progress: ProgressLike = None,
) -> BudgetResult:
    """Weigh dropping experts against fewer bits, for one target.

    For each number in `keep_experts` (by default all, 15/16, 7/8, 13/16, 3/4, 5/8 and half of
    them): the KL divergence that pruning costs, measured on the first `chunks` chunks of a text,
    and the one that quantizing to the target is predicted to cost. `target_bpw` counts the weights
    of MODEL with all experts. `observations` and `imatrix` are of MODEL, before pruning.
    `sensitivity` says how much an error in each tensor counts: by a table of kinds, or "measured"
    on MODEL, in an evaluation of some dozens of variants. Nothing is written but what was measured
    so: a folder `cache` keeps it, as `fit_recipe` does beside its recipe, and reads it. Raises
    UsageError for a number that the model cannot have and if no number fits the target,
    ArtifactError for files of another model, and what opening a model raises.
    """
    from reap2gguf.bundle.budget import best_of
    from reap2gguf.fitting.trading import Weighing

    target = asked_target(target_size, target_bpw, fit, fit_context)
    check_choice("method", method, tuple(OBSERVED))
    check_choice("sensitivity", sensitivity, SENSITIVITIES)
    check_number("chunks", chunks, 2)
    compute = given_or_new("compute", compute, ComputeOptions)
    seen, given = check_path("observations", observations), check_path("imatrix", imatrix)
    folder = None if cache is None else check_path("cache", cache)
    shown = to_progress(progress)
    with open_named(model, shown, follow_links=follow_links) as opened:
        opened.check_tokenizer()
        facts = opened.model.facts
        kept = None if folder is None else sensitivities_file(folder, opened)
        keep_files(opened, [] if kept is None else [kept], [seen, given])
        target = target_within(target, facts, fit_context, shown)
        counts = _counts(facts, keep_experts)
        choices = _choices(opened.checkpoint, facts, seen, counts, method)
        cut = _text(opened, text, chunks, shown)
        weighing = Weighing(_source(opened, given), choices, target)
        weighing.check()
        measures = partial(probing_of, opened, path=kept, compute=compute, shown=shown)
        probes = measures if sensitivity == MEASURED else None
        found = _weighed(weighing, cut, probes, compute, shown)
    return BudgetResult(tuple(found), best_of(found), cut.record.n_scored)


def _source(opened: OpenModel, imatrix: Path) -> Source:
    """The model before pruning, with a file of its importance matrix."""
    from reap2gguf.building.given import read_imatrix
    from reap2gguf.fitting.trading import Source

    facts = opened.model.facts
    return Source(
        opened.checkpoint,
        opened.model,
        opened.source.short_name,
        lambda tensors: read_imatrix(imatrix, tensors, facts.n_experts, facts.mtp_layer),
    )


def _text(opened: OpenModel, text: str, chunks: int, shown: Progress) -> EvaluationText:
    """The text that pruning is measured on, in chunks. Raises CalibrationError."""
    from reap2gguf.evaluating.texts import cut_text, fitting_chunk, read_text
    from reap2gguf.tokenizer.tokenizer import Tokenizer

    facts = opened.model.facts
    label, content = read_text(text, shown.note)
    size = fitting_chunk(_CHUNK, facts.context_length, shown.note)
    with closing(Tokenizer(opened.source.folder)) as tokenizer:
        return cut_text(label, content, tokenizer, facts.vocab_size, size, chunks)


def _weighed(
    weighing: Weighing,
    cut: EvaluationText,
    probes: Probes | None,
    compute: ComputeOptions,
    shown: Progress,
) -> list[CountRecord]:
    """What each number of experts costs."""
    from reap2gguf.evaluating.engine import evaluate_variants  # loads torch
    from reap2gguf.fitting.errors_table import Where

    costs = weighing.costs(
        lambda variants, pairs: evaluate_variants(variants, cut.rows, pairs, compute, shown)
    )
    where = Where(compute.device, compute.threads)
    return weighing.weigh(costs, where, shown, probes=probes)


def _counts(facts: ModelFacts, asked: Sequence[int] | None) -> list[int]:
    """How many experts may stay, the most first. Raises UsageError for a wrong number."""
    from reap2gguf.fitting.counts import usual_counts
    from reap2gguf.pruning.select import choose_target

    if asked is None:
        return usual_counts(facts)
    if not asked:
        raise ParameterError(
            "keep_experts is empty, expected numbers of experts, such as 128, 96", "keep_experts"
        )
    return sorted({choose_target(facts, count, None).n_kept for count in asked}, reverse=True)


def _choices(
    checkpoint: Checkpoint, facts: ModelFacts, file: Path, counts: Sequence[int], method: str
) -> dict[int, Kept]:
    """The experts that stay, for each number."""
    from reap2gguf.artifacts.observations import Observations
    from reap2gguf.building.given import check_same_model
    from reap2gguf.pruning.select import choose_target, select_experts

    seen = Observations.load(file)
    check_same_model(seen, checkpoint, str(file))
    found: dict[int, Kept] = {}
    for count in counts:
        target = choose_target(facts, count, None)
        if target.prunes:
            found[count] = select_experts(seen, method, target, facts)
        else:
            found[count] = dict.fromkeys(facts.moe_layers, tuple(range(count)))
    return found
