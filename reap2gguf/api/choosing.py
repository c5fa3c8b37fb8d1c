"""Choosing a method of pruning by what each of several costs."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reap2gguf.api.opening import PathLike, ProgressLike, keep_files, open_named, to_progress
from reap2gguf.choosing.merged import check_group_size
from reap2gguf.choosing.names import (
    BEST_REPAIRED,
    check_candidates,
    criteria_of,
    merging_of,
    split_name,
)
from reap2gguf.disk.temporary import temporary_folder
from reap2gguf.machine import processes
from reap2gguf.options import (
    MTP_CHOICES,
    CalibrationOptions,
    ComputeOptions,
    Resume,
    check_bool,
    check_choice,
    check_path,
    given_or_new,
)
from reap2gguf.outputs import claimed, drop_states, output_file
from reap2gguf.progress import working
from reap2gguf.pruning.counts import check_counts
from reap2gguf.pruning.methods import merges
from reap2gguf.pruning.protection import Protection, read_pinned

if TYPE_CHECKING:
    from reap2gguf.artifacts.observations import Observations
    from reap2gguf.artifacts.texts import ObservationRows
    from reap2gguf.bundle.choice import ChoiceRecord
    from reap2gguf.calibration.scanned_files import ScannedFiles
    from reap2gguf.calibration.spec import Calibration
    from reap2gguf.checkpoint.checkpoint import Checkpoint
    from reap2gguf.choosing.holdout import Split
    from reap2gguf.choosing.measure import Chooser, Measurement
    from reap2gguf.choosing.texts import MeasuredText
    from reap2gguf.evaluating.scores import Scores
    from reap2gguf.hub.opened import OpenModel
    from reap2gguf.progress import Progress
    from reap2gguf.pruning.view import PrunedView

FORMAT = 1


@dataclass(frozen=True)
class Choice:
    """The method that was taken, the experts that it keeps, and what was measured."""

    method: str  # the criterion
    is_repaired: bool  # whether the best candidate is that with its kept experts repaired
    n_experts: int  # per layer, before
    n_kept: int  # per layer, after
    kept: Mapping[int, tuple[int, ...]]  # layer -> ids of the experts in the source, ascending
    record: ChoiceRecord  # all candidates, with what each costs
    # of "observing", of "measuring", and by candidate of each repair and each merge
    seconds: Mapping[str, float]
    group_size: int | None = None  # of REAM's groups, at most; None: it was no candidate

    @property
    def is_merged(self) -> bool:
        """Whether the best candidate is a model whose experts are merged."""
        return merges(self.method)

    def as_json(self) -> dict[str, Any]:
        """Plain JSON."""
        values: dict[str, Any] = json.loads(json.dumps({"format": FORMAT, **asdict(self)}))
        return values


def choose(
    model: PathLike,
    *,
    keep_experts: int | None = None,
    compression: float | None = None,
    candidates: str | Iterable[str] | None = None,
    group_size: int | None = None,
    text: PathLike | None = None,
    observations: PathLike | None = None,
    calibration: CalibrationOptions | None = None,
    mtp: str = "prune",
    protect: str = "",
    protect_super_experts: bool = False,
    compute: ComputeOptions | None = None,
    output: PathLike | None = None,
    overwrite: bool = False,
    follow_links: bool = False,
    progress: ProgressLike = None,
) -> Choice:
    """Measure which method of pruning MODEL to a number of experts costs least.

    One row in eight of the calibration is held out, and the others are observed. Then the pruned
    models of all `candidates` (names of criteria; None: the usual ones) are measured in one sweep,
    on the rows that were held out and on a `text` of another domain; by default one that travels
    with the package. With "best+repair" among them, the best criterion is repaired and measured
    again. With "ream" (in groups of `group_size`) or "hc_smoe" among them, experts are merged on
    the rows that were observed, in a sweep of its own for each, and measured with the rest.
    `observations` is a file where the observations are kept: one that is there is used, if it is of
    the same rows. Protected experts stay, whatever a candidate says. `output` is a JSON file to
    write; with it an interrupted call resumes. Nothing is pruned: `prune` does that with the
    observations and the method, and `build` with the method "auto" does it all, but for merges.

    Raises CalibrationError, ObservationError, EvaluationError, ArtifactError for observations of
    other rows, UsageError, UnsupportedModelError for a merge that a model is not made for,
    OutputError, also if the output exists and is not to be overwritten, and what opening a model
    raises.
    """
    check_choice("mtp", mtp, MTP_CHOICES)
    check_counts(keep_experts, compression)
    check_bool("protect_super_experts", protect_super_experts)
    names, shown = check_candidates(candidates), to_progress(progress)
    check_group_size(group_size, names)
    protection = Protection(read_pinned(protect), protect_super_experts)
    how = _How(names, keep_experts, compression, group_size, protection)
    compute = given_or_new("compute", compute, ComputeOptions)
    asked = _Asked.of(calibration, text, output, observations)
    with (
        open_named(model, shown, mtp == "prune", follow_links) as opened,
        asked.claimed(opened, overwrite),
    ):
        opened.check_tokenizer()
        found = _chosen(opened, asked, how, compute, shown)
        asked.write(found)
    return found


@dataclass(frozen=True)
class _How:
    """What is chosen from, and how many experts stay."""

    names: tuple[str, ...]  # of the candidates
    keep_experts: int | None
    compression: float | None
    group_size: int | None
    protection: Protection


def _chosen(
    opened: OpenModel, asked: _Asked, how: _How, compute: ComputeOptions, progress: Progress
) -> Choice:
    """Observe, make all candidates and measure them. Raises as `choose` does."""
    from reap2gguf.choosing.candidates import kept_by
    from reap2gguf.choosing.measure import Chooser
    from reap2gguf.choosing.merged import Merging
    from reap2gguf.pruning.protection import protected_experts
    from reap2gguf.pruning.select import choose_target

    checkpoint, model = opened.checkpoint, opened.model
    target = choose_target(model.facts, how.keep_experts, how.compression)
    merging = merging_of(how.names), how.group_size, how.protection
    makes = Merging.of(checkpoint, model, target, *merging)
    split, held_out, other = asked.read(opened, progress)
    begun = time.monotonic()
    seen = asked.observed(opened, split.seen, compute, progress)
    observing = time.monotonic()
    protected = protected_experts(how.protection, seen, target, model.facts).all
    kept = kept_by(criteria_of(how.names), seen, target, model.facts, protected)
    with asked.folder("merge") as folder, ExitStack() as stack:
        where = asked.resuming(compute, "")
        merged, seconds = makes.views(split.seen, folder, where, stack, progress)
        chooser = Chooser(checkpoint, model, kept, held_out, other, merged)
        repairs = split.seen if BEST_REPAIRED in how.names else None
        record, more = asked.chosen(chooser, checkpoint, repairs, compute, progress)
        views = {name: dict(view.kept) for name, view in merged.items()}
    seconds |= more
    seconds |= {"observing": observing - begun, "measuring": time.monotonic() - observing}
    method, is_repaired = split_name(record.chosen)
    stay, size = {**kept, **views}[method], makes.group_size if "ream" in merged else None
    counts = target.n_experts, target.n_kept
    return Choice(method, is_repaired, *counts, stay, record, seconds, size)


@dataclass(frozen=True)
class _Asked:
    """The texts and files of a choice, checked before any model is opened."""

    calibration: Calibration
    files: ScannedFiles
    text: Path | None
    output: Path | None
    observations: Path | None

    @classmethod
    def of(
        cls,
        calibration: CalibrationOptions | None,
        text: PathLike | None,
        output: PathLike | None,
        observations: PathLike | None,
    ) -> _Asked:
        """Raises CalibrationError, UsageError or OutputError for what cannot be used."""
        from reap2gguf.calibration.scanned_files import ScannedFiles
        from reap2gguf.calibration.sources import check_calibration
        from reap2gguf.calibration.spec import decide

        decided = decide(given_or_new("calibration", calibration, CalibrationOptions))
        files = ScannedFiles()
        check_calibration(decided, files)
        path = None if text is None else check_path("text", text).expanduser()
        if path is not None:
            files.text(path)
        made = [None if one is None else _output(one) for one in (output, observations)]
        return cls(decided, files, path, *made)

    @contextmanager
    def claimed(self, opened: OpenModel, overwrite: bool) -> Iterator[None]:
        """Keep other processes from writing the output, and what is read from being replaced.

        Raises UsageError or OutputError otherwise. The file of observations may be there: it is
        used, and written if it is missing.
        """
        outputs = [one for one in (self.output, self.observations) if one is not None]
        keep_files(opened, outputs, self.inputs)
        seen = self.observations
        made = [] if seen is None or seen.exists() else [seen]
        with claimed([self.output], overwrite), claimed(made):
            yield

    @property
    def inputs(self) -> list[Path]:
        return [*self.files.paths, *([] if self.text is None else [self.text])]

    def read(
        self, opened: OpenModel, progress: Progress
    ) -> tuple[Split, MeasuredText, MeasuredText | None]:
        """The rows to observe, those that are held out, and the text of another domain."""
        from reap2gguf.calibration.drawing import observation_rows
        from reap2gguf.choosing.holdout import hold_out
        from reap2gguf.choosing.texts import ONLY_HELD_OUT, held_out_text, other_text
        from reap2gguf.tokenizer.tokenizer import Tokenizer

        facts, decided = opened.model.facts, self.calibration
        length = min(decided.max_length, facts.context_length)
        with (
            working(progress, "Reading the calibration text"),
            closing(Tokenizer(opened.source.folder)) as tokenizer,
        ):
            found = observation_rows(
                tokenizer, decided, length, facts.vocab_size, progress, self.files
            )
            context = facts.context_length
            other = other_text(self.text, decided, tokenizer, facts.vocab_size, context)
        if other is None:
            progress.note(ONLY_HELD_OUT)
        split = hold_out(found)
        return split, held_out_text(found.label, split.held), other

    def observed(
        self,
        opened: OpenModel,
        rows: ObservationRows,
        compute: ComputeOptions,
        progress: Progress,
    ) -> Observations:
        """Those of the file, or new ones, which the file keeps."""
        from reap2gguf.artifacts.observations import Observations
        from reap2gguf.building.given import check_same_model
        from reap2gguf.choosing.checks import check_unseen
        from reap2gguf.observing import passes

        path = self.observations
        if path is not None and path.exists():
            seen = Observations.load(path)
            check_same_model(seen, opened.checkpoint, str(path))
            check_unseen(seen, rows, str(path))
            progress.note(f"{path}: reused")
            return seen
        key = f"{opened.checkpoint.fingerprint()} {rows.sha256}"
        with working(progress, "Loading torch and the first layer"):
            seen = passes.observe(
                opened.checkpoint, opened.model, rows, self.resuming(compute, key), progress
            )
        if path is not None and processes().is_first:
            seen.save(path)
        return seen

    def chosen(
        self,
        chooser: Chooser,
        checkpoint: Checkpoint,
        repairs: ObservationRows | None,
        compute: ComputeOptions,
        progress: Progress,
    ) -> tuple[ChoiceRecord, dict[str, float]]:
        """The best candidate, and the seconds of a repair on the rows `repairs`; None: of none."""
        from reap2gguf.choosing.repaired import why_not_repaired
        from reap2gguf.evaluating.engine import evaluate_variants
        from reap2gguf.evaluating.scoring import key_of, rows_sha256

        fingerprint = checkpoint.fingerprint()

        def evaluate(asked: Measurement) -> Scores:
            kept = [(n, sorted(v.kept.items()), v.identity) for n, v in asked.views.items()]
            key = key_of(fingerprint, kept, rows_sha256(asked.rows))
            where = self.resuming(compute, key)
            return evaluate_variants(asked.variants, asked.rows, asked.pairs, where, progress)

        if repairs is not None and (
            why := why_not_repaired(checkpoint, chooser.model, len(repairs.rows))
        ):
            progress.note(why)
            repairs = None
        if repairs is None:
            return chooser.choose(evaluate, None)
        rows = repairs
        with self.folder("repair") as folder:
            return chooser.choose(
                evaluate,
                lambda view, stack: _repaired(
                    view, stack, rows, folder, fingerprint, self.resuming(compute, ""), progress
                ),
            )

    @contextmanager
    def folder(self, what: str) -> Iterator[Path]:
        """Where files of a repair or a merge lie: beside the output, to resume, or for now."""
        if self.output is not None:
            yield self.output.with_name(f"{self.output.name}.state-{what}")
        else:
            with temporary_folder() as folder:
                yield folder

    def resuming(self, compute: ComputeOptions, key: str) -> ComputeOptions:
        """Keep the progress between layers beside the output."""
        from reap2gguf.artifacts.made_with import COMPUTING, versions

        if self.output is None:
            return compute
        state = self.output.with_name(f"{self.output.name}.state")
        resume = Resume(state, key, versions(COMPUTING))
        return replace(compute, scratch=self.output.parent, resume=resume)

    def write(self, found: Choice) -> None:
        """Write the output; its saved progress is no longer needed."""
        from reap2gguf.atomic import write_whole

        if self.output is not None and processes().is_first:
            write_whole(self.output, json.dumps(found.as_json(), indent=1) + "\n")
            drop_states(self.output)


def _output(path: PathLike) -> Path:
    """A file to write: the first process checks that it can."""
    return output_file(path) if processes().is_first else check_path("output", path)


def _repaired(
    view: PrunedView,
    stack: ExitStack,
    rows: ObservationRows,
    folder: Path,
    fingerprint: str,
    compute: ComputeOptions,
    progress: Progress,
) -> PrunedView:
    """The repaired model of a view; its files lie in a folder, and are open with the stack."""
    from reap2gguf.evaluating.scoring import key_of
    from reap2gguf.pruning.replaced import ReplacedView
    from reap2gguf.repairing.limits import repaired_layers
    from reap2gguf.repairing.record import RepairFolder
    from reap2gguf.repairing.sweep import repair

    key = key_of(fingerprint, sorted(view.kept.items()), rows.sha256, compute.likely_dtype)
    files = RepairFolder(folder, key)
    resume = compute.resume
    if resume is not None:
        compute = replace(compute, resume=replace(resume, key=key))
    repair(view, rows.rows, "ridge", files, compute, progress)
    stored = stack.enter_context(closing(files.open(repaired_layers(view.model))))
    return ReplacedView(view, stored)
