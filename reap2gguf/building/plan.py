"""What a build will do, decided from headers alone: counts, types, sizes, memory, time."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from reap2gguf.building.as_stored import is_sliced, recipes_of, tokenizer_notes
from reap2gguf.building.asked import read_options
from reap2gguf.building.given import (
    GivenImatrix,
    GivenObservations,
    given_imatrix,
    keep_given,
    read_observations,
)
from reap2gguf.building.naming import bundle_name
from reap2gguf.building.plan_checks import (
    check_changes,
    check_choice_of_experts,
    check_texts,
    check_types,
)
from reap2gguf.building.plan_sides import planned_side_files
from reap2gguf.building.sized import SizedFile, other_labels, with_sized, within_context
from reap2gguf.building.sliced_files import sliced_files
from reap2gguf.building.weighed import Opened, asked_target, check_matrix, with_first_experts
from reap2gguf.bundle.layout import BundleFolders, model_file, side_file
from reap2gguf.bundle.manifest import NO_METHOD
from reap2gguf.bundle.options_record import (
    CALIBRATION_OPTION,
    CHOOSE_TEXT_OPTION,
    IMATRIX_OPTION,
    IMATRIX_TEXT_OPTION,
    KEPT_OPTION,
    OBSERVATIONS_OPTION,
    InputRecord,
)
from reap2gguf.calibration.sources import local_hashes
from reap2gguf.choosing.names import (
    AUTO,
    BEST_REPAIRED,
    check_candidates,
    criteria_of,
    split_name,
)
from reap2gguf.choosing.repaired import why_not_repaired
from reap2gguf.hub.opened import resolve_model
from reap2gguf.hub.retry import Note, ignore_note
from reap2gguf.models.description import Dropped, SideFile
from reap2gguf.models.table import describe
from reap2gguf.models.transformers_config import check_with_transformers
from reap2gguf.pruning.given_kept import GivenKept, given_kept_of
from reap2gguf.pruning.history import History, read_history
from reap2gguf.pruning.methods import GIVEN, GROUP_SIZE, METHODS, is_from_weights, merges
from reap2gguf.quantizing.labels import LabelledFile, label_warnings

if TYPE_CHECKING:
    from reap2gguf.bundle.budget import BudgetRecord
    from reap2gguf.bundle.choice import ChoiceRecord
    from reap2gguf.calibration.scanned_files import ScannedFiles
    from reap2gguf.calibration.spec import Calibration
    from reap2gguf.checkpoint.checkpoint import Checkpoint
    from reap2gguf.hub.source import Source
    from reap2gguf.models.contract import MoeModel
    from reap2gguf.options import BuildOptions
    from reap2gguf.pruning.select import Target
    from reap2gguf.pruning.view import PrunedView
    from reap2gguf.quantizing.resolve import ResolvedRecipe


@dataclass(frozen=True)
class Plan:
    """Everything that is decided before a build starts."""

    options: BuildOptions
    calibration: Calibration
    source: Source
    checkpoint: Checkpoint
    model: MoeModel
    target: Target
    name: str
    pruned: PrunedView  # a placeholder that keeps the first experts: only its sizes are final
    recipes: tuple[ResolvedRecipe, ...]
    side_files: tuple[SideFile, ...]
    files: ScannedFiles  # of the calibration
    tokenizer_caveats: tuple[str, ...] = ()
    history: History | None = None  # of a source that this program has pruned before
    given_kept: GivenKept | None = None  # None: the build chooses the experts
    observations: GivenObservations | None = None  # None: the build makes them
    imatrix: GivenImatrix | None = None  # None: the build computes it
    sized: SizedFile | None = None  # the last file, if its types are chosen in the build
    choice: ChoiceRecord | None = None  # of a method, once it was made
    counts: tuple[int, ...] = ()  # of experts that are weighed; none: the number was named
    budget: BudgetRecord | None = None  # what each of them costs, once it was weighed
    unweighed: Plan | None = None  # this plan before that

    @property
    def weighs(self) -> bool:
        """Whether the build still has to find how many experts stay."""
        return bool(self.counts) and self.budget is None

    @property
    def observes(self) -> bool:
        """Whether the build observes the experts, in order to rank them."""
        is_chosen = self.given_kept is not None or self.observations is not None
        by_itself = self.ranks_by_weights or self.merges
        return self.target.prunes and not is_chosen and not by_itself

    @property
    def merges(self) -> bool:
        """Whether experts become one with those that stay."""
        return self.target.prunes and self.given_kept is None and merges(self.options.method)

    @property
    def group_size(self) -> int:
        """The most experts of one of REAM's groups."""
        return self.options.group_size or GROUP_SIZE

    @property
    def ranks_by_weights(self) -> bool:
        """Whether the build ranks the experts by their weights alone."""
        is_given = self.given_kept is not None
        return self.target.prunes and not is_given and is_from_weights(self.options.method)

    @property
    def chooses(self) -> bool:
        """Whether the build measures which method is best."""
        is_chosen = self.given_kept is not None
        return self.target.prunes and not is_chosen and self.options.method == AUTO

    @property
    def candidates(self) -> tuple[str, ...]:
        """What it measures. None is repaired where a repair was asked for, or is not defined."""
        named = check_candidates(self.options.candidates) if self.chooses else ()
        if self.options.repair != "none" or why_not_repaired(self.checkpoint, self.model):
            return criteria_of(named)
        return named

    @property
    def asks_mtp(self) -> bool:
        """Whether an MTP block is asked on rows of the calibration, before pruning and after."""
        asks = self.computes_imatrix and self.model.facts.has_mtp
        return self.observes or (asks and not self.target.prunes)

    @property
    def repairs(self) -> bool:
        """Whether the kept experts get new weights, or may get them: before a choice is made."""
        return self.target.prunes and self.repair != "none"

    @property
    def repair(self) -> str:
        """How the kept experts are repaired, or may be: none, ridge or scale."""
        if self.options.repair != "none" or not self.chooses:
            return self.options.repair
        if self.choice is not None:
            return "ridge" if split_name(self.choice.chosen)[1] else "none"
        return "ridge" if BEST_REPAIRED in self.candidates else "none"

    @property
    def takes_sums(self) -> bool:
        """Whether the pass that ranks the experts takes the sums of the importance matrix, too."""
        is_asked = self.options.imatrix_from == "source"
        return self.observes and (is_asked or (bool(self.counts) and self.imatrix is None))

    @property
    def quantizes_by_sums(self) -> bool:
        """Whether these sums are the importance matrix of the files."""
        return self.observes and self.options.imatrix_from == "source"

    @property
    def slices(self) -> bool:
        """Whether the blocks of a GGUF source stay as they are: nothing is quantized."""
        return is_sliced(self.options, self.checkpoint)

    @property
    def computes_imatrix(self) -> bool:
        """Whether the build makes a calibration pass for the importance matrix alone."""
        return self.imatrix is None and not self.quantizes_by_sums and not self.slices

    @property
    def reads_rows(self) -> bool:
        """Whether rows of the calibration are needed: to rank, merge or repair experts, to choose
        by what methods cost on some of them, or to ask an MTP block."""
        return self.chooses or self.repairs or self.merges or self.asks_mtp

    @property
    def reads_calibration(self) -> bool:
        """Whether anything is read of the calibration."""
        has_own_text = not self.computes_imatrix or self.options.imatrix_text is not None
        return self.reads_rows or not has_own_text

    @property
    def reads_texts(self) -> bool:
        """Whether any text is read at all."""
        return self.reads_rows or self.computes_imatrix

    @property
    def n_sweeps(self) -> int:
        """How many calibration passes the build makes."""
        return self.observes + self.merges + self.repairs + self.computes_imatrix

    @property
    def n_variants(self) -> int:
        """How many forms of the model an evaluation compares: source, pruned, and every file."""
        return 1 + (self.target.prunes and not self.slices) + len(self.recipes)

    @property
    def writes_hf(self) -> bool:
        """Whether the bundle has safetensors: those of a source that keeps all are not copied, and
        of a GGUF source there are none."""
        return self.target.prunes and self.checkpoint.gguf is None

    @property
    def hf_bytes(self) -> int:
        """Size of the safetensors that the build writes."""
        return self.pruned.n_bytes if self.writes_hf else 0

    @property
    def n_parameters(self) -> int:
        """Parameters of the pruned model."""
        return self.pruned.n_parameters

    @property
    def caveats(self) -> tuple[str, ...]:
        """What a user should know of the model and its tokenizer, one sentence each."""
        return (*self.checkpoint.caveats, *self.model.caveats(), *self.tokenizer_caveats)

    @property
    def max_length(self) -> int:
        """Tokens per row: what was asked for, within the model's context."""
        return min(self.calibration.max_length, self.model.facts.context_length)

    @property
    def weighted(self) -> Collection[str]:
        """The tensors that have importance, by their names in GGUF."""
        if self.imatrix is not None:
            return self.imatrix.imatrix.entries.keys()
        return self.pruned.model.weighted_matrices()

    @property
    def inputs(self) -> tuple[InputRecord, ...]:
        """The local files that decide the result, with their hashes. Raises CalibrationError."""
        reads = self.reads_calibration
        hashes = local_hashes(self.calibration, self.files) if reads else []
        found = [InputRecord(CALIBRATION_OPTION, name, sha256) for name, sha256 in hashes]
        if self.given_kept is not None:
            kept = self.given_kept
            found.append(InputRecord(KEPT_OPTION, kept.file, kept.sha256))
        if self.observations is not None:
            given = self.observations
            found.append(InputRecord(OBSERVATIONS_OPTION, given.file, given.sha256))
        if self.imatrix is not None and not self.imatrix.is_observed:
            found.append(InputRecord(IMATRIX_OPTION, self.imatrix.file, self.imatrix.sha256))
        if (text := self.options.imatrix_text) is not None:
            sha256 = self.files.text(text).sha256
            found.append(InputRecord(IMATRIX_TEXT_OPTION, text.name, sha256))
        if self.chooses and (text := self.options.choose_text) is not None:
            sha256 = self.files.text(text).sha256
            found.append(InputRecord(CHOOSE_TEXT_OPTION, text.name, sha256))
        return tuple(found)

    def gguf_name(self, recipe: ResolvedRecipe) -> str:
        return model_file(self.name, recipe.label)

    def file_sizes(self, recipe: ResolvedRecipe) -> list[int]:
        """Bytes of a file, or of each part: its tensors', with the header where all are copied."""
        if not self.slices:
            return [recipe.n_bytes]
        files = sliced_files(self, self.pruned, self.options.output).files
        return [file.start.n_bytes for file in files]

    def side_name(self, side: SideFile) -> str:
        return side_file(side.prefix, self.name)

    @property
    def with_toml(self) -> frozenset[str]:
        """Names of the recipes that lie beside their files as TOML."""
        return frozenset(() if self.sized is None else (self.sized.named.name,))

    def with_types(self, chosen: ResolvedRecipe) -> Plan:
        """The plan with the recipe of the file whose types were chosen, in place of a guess."""
        return replace(self, recipes=(*self.recipes[:-1], chosen))

    @property
    def warnings(self) -> list[str]:
        """What will mislead users of the bundle though it is right, each with a way out."""
        files = [LabelledFile(self.gguf_name(r), r.label, r.name) for r in self.recipes]
        return label_warnings(files)

    @property
    def method(self) -> str:
        """How experts are chosen, or NO_METHOD where none is removed; AUTO until that is chosen."""
        if self.choice is not None:
            return split_name(self.choice.chosen)[0]
        if not self.target.prunes:
            return NO_METHOD
        return self.options.method if self.given_kept is None else GIVEN

    @property
    def mtp(self) -> str:
        """What happens to a multi-token-prediction block: pruned, kept, dropped or none."""
        if self.model.facts.has_mtp:
            return "pruned" if self.target.prunes else "kept"
        return "dropped" if self.drops_mtp else "none"

    @property
    def drops_mtp(self) -> bool:
        roles = (self.model.role(name) for name in self.checkpoint.tensors)
        return any(isinstance(role, Dropped) for role in roles)


def make_plan(options: BuildOptions, note: Note = ignore_note) -> Plan:
    """Read headers, config and recipes, and decide everything that follows from them.

    `note` receives each failed request to the Hub.
    Raises SourceError, CheckpointError, UnsupportedModelError, RecipeError or UsageError.
    """
    asked = read_options(options, other_labels(options))
    source = resolve_model(options.model, note, options.follow_links)
    opened, caveats = _opened(source, options, note)
    checkpoint, model = opened.checkpoint, opened.model
    given_kept = given_kept_of(options, model.facts)
    asked_for = within_context(options, model.facts, note)
    options, counts, target = asked_target(asked_for, opened)
    if given_kept is not None:
        target = given_kept.target
    check_changes(options, opened, target, note)
    pruned = with_first_experts(checkpoint, model, target)
    tensors = pruned.model.gguf_tensors(pruned.tensors)
    recipes = recipes_of(asked.recipes, checkpoint, model, tensors, target, options)
    plan = Plan(
        options=options,
        calibration=asked.calibration,
        source=source,
        checkpoint=checkpoint,
        model=model,
        target=target,
        name=_name(options, source, target, note),
        pruned=pruned,
        recipes=recipes,
        side_files=(),
        files=asked.files,
        tokenizer_caveats=caveats,
        history=opened.history,
        given_kept=given_kept,
        counts=counts,
    )
    plan = _with_files(_with_given(plan, opened), opened, note)
    check_types(plan, note)
    check_texts(plan, asked.is_checked)
    return plan


def _opened(source: Source, options: BuildOptions, note: Note) -> tuple[Opened, tuple[str, ...]]:
    """The model before pruning, and what a user should know of its tokenizer."""
    checkpoint = _as_asked(source.open(note), options, note)
    model = describe(checkpoint, keep_mtp=options.mtp == "prune")
    check_with_transformers(model)
    caveats = tokenizer_notes(checkpoint, model)
    history = read_history(checkpoint, model.facts, note)
    return Opened(checkpoint, model, source.short_name, history), caveats


def _as_asked(checkpoint: Checkpoint, options: BuildOptions, note: Note) -> Checkpoint:
    """The source, or its values in BF16 if they are quantized and to be written so."""
    if options.dequantize is None:
        return checkpoint
    if checkpoint.decoding is None:
        note(f"--dequantize: {checkpoint.folder.name} is not quantized, so it changes nothing")
    return checkpoint.dequantized()


def _name(options: BuildOptions, source: Source, target: Target, note: Note) -> str:
    """The name of the bundle, which replaces none of the given files."""
    name = bundle_name(options, source, target, note)
    folders = BundleFolders(options.output, name)
    keep_given(folders, (options.kept, options.observations, options.imatrix), target.prunes)
    return name


def _with_given(plan: Plan, opened: Opened) -> Plan:
    """The plan with the files that take the place of stages, and a check that they can."""
    options, target = plan.options, plan.target
    observations = _observations(options, plan.checkpoint, plan.model, target)
    if plan.given_kept is None:
        check_choice_of_experts(options, opened, target, observations)
    if plan.counts:
        check_matrix(options, opened, observations)
    tensors = plan.pruned.model.gguf_tensors(plan.pruned.tensors)
    imatrix = given_imatrix(options, plan.model.facts, tensors, observations)
    return replace(plan, observations=observations, imatrix=imatrix)


def _with_files(plan: Plan, opened: Opened, note: Note) -> Plan:
    """The plan with the file whose types are chosen for a size, if any, and with side files."""
    header = opened.header(plan.pruned)
    sized, recipes = with_sized(plan.options, plan.pruned, header, plan.weighted, plan.recipes)
    sides = planned_side_files(plan.model, plan.checkpoint)
    for line in (line for side in sides for line in side.notes):
        note(line)
    return replace(plan, sized=sized, recipes=recipes, side_files=sides)


def _observations(
    options: BuildOptions, checkpoint: Checkpoint, model: MoeModel, target: Target
) -> GivenObservations | None:
    """Observations in place of those that would be made. Raises what `read_observations` does."""
    if options.observations is None:
        return None
    # any method tells whether they are of this model
    how = target, METHODS[0] if options.method == AUTO else options.method
    return read_observations(options.observations, checkpoint, model.facts, *how)
