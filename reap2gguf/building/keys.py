"""The keys of a build's stages: hashes of everything that their results depend on.

A stage that was finished with the same key is reused. Keys leave out threads and the spool: results
do not depend on them. Keys leave out memory, the number of processes and the versions of libraries
too: they may change last bits (`sweep.py`), which is no reason to repeat hours of work. Versions
are recorded beside each result, and a reuse by others is reported (`artifacts/made_with.py`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reap2gguf import __version__
from reap2gguf.building.finished import Inputs
from reap2gguf.bundle.layout import CARD_FILE
from reap2gguf.bundle.manifest import hash_file
from reap2gguf.calibration.sources import local_hashes
from reap2gguf.checkpoint.companions import Purpose, companions
from reap2gguf.choosing.names import AUTO, BEST_REPAIRED
from reap2gguf.errors import CheckpointError, Reap2ggufError
from reap2gguf.files import file_sha256
from reap2gguf.fitting.target import MEASURED, PROBE_FORMAT
from reap2gguf.ggml import load_ggml
from reap2gguf.pruning.write import companion_files
from reap2gguf.quantizing.ik.workers import PACKAGE, package_version

if TYPE_CHECKING:
    from reap2gguf.artifacts.texts import ImatrixChunks, ObservationRows, Row
    from reap2gguf.building.plan import Plan
    from reap2gguf.pruning.select import Kept
    from reap2gguf.pruning.view import PrunedView
    from reap2gguf.quantizing.resolve import ResolvedRecipe

# Raise one of these where a change of the program makes other results of the same inputs: where an
# earlier result was wrong, or lacks something that later stages read. A higher number is another
# key, so what users have is made again, and all that depends on it. Leave it where only the speed,
# a message or a library changes.
TEXTS_FORMAT = 2  # how texts become rows and chunks: samples, templates, cutting, drawing
OBSERVE_FORMAT = 2  # what is summed per expert, and the file of it
REPAIR_FORMAT = 1  # which weights a repair gives, and the files of them
MERGE_FORMAT = 1  # which experts become one, their new weights, and the files of them
PRUNE_FORMAT = 1  # how tensors, config and files of the model are written as safetensors
IMATRIX_FORMAT = 1  # what is summed per matrix
FIT_FORMAT = 2  # how types are chosen for a size
WEIGHTS_FORMAT = 1  # how experts are scored by their weights alone
EXPORT_FORMAT = 1  # headers and tensors of GGUF files
CHOOSE_FORMAT = 1  # which rows are held out, what is measured on which texts, and the rule
WEIGH_FORMAT = 1  # which numbers of experts are weighed, on what, and how damage is predicted
EVALUATE_FORMAT = 1  # what is measured, and how
VERIFY_FORMAT = 1  # what is compared before a bundle is finished


@dataclass(frozen=True)
class BuildKeys:
    """The keys of one plan; each stage's holds those before it that it depends on."""

    plan: Plan

    def of(self, plan: Plan) -> BuildKeys:
        """The keys of another plan for the same source, which is not read again."""
        found = BuildKeys(plan)
        vars(found)["fingerprint"] = self.fingerprint  # where `cached_property` keeps it
        return found

    @cached_property
    def fingerprint(self) -> str:
        """The fingerprint of the source's config and weights."""
        return self.plan.checkpoint.fingerprint()

    @cached_property
    def _companions(self) -> list[tuple[str, str]]:
        """Hashes of tokenizer, template and licence files, which a bundle contains as well."""
        folder = self.plan.source.folder
        published = companion_files(folder)
        # not published, but the tokenizer may choose one of them for samples with tools
        templates = companions(folder, Purpose.TEMPLATE)
        named = [template for template in templates if template.parent != folder]
        return _hashes([*published, *named], CheckpointError)

    @property
    def _source(self) -> tuple[object, ...]:
        """The source, and what its values are read as."""
        asked = self.plan.options.dequantize
        found = self.fingerprint, self.plan.checkpoint.stamps()
        return found if asked is None else (*found, asked)

    @property
    def _card(self) -> list[tuple[str, str]]:
        """The hash of the source's own card, whose front matter cards and headers use."""
        card = self.plan.source.folder / CARD_FILE
        return _hashes([card] if card.is_file() else [], CheckpointError)

    @cached_property
    def texts(self) -> str:
        """The key of the text files as they are, the tokenizer, and how both become rows.

        A dataset on the Hub counts only by what was asked for. Its rows, once drawn, are kept with
        their commit, so that a build resumes without a network, and on the same rows whatever is
        committed there later. `owner/name@revision` pins a commit; --fresh draws again.
        """
        calibration, text = self.plan.calibration, self.plan.options.imatrix_text
        reads = self.plan.reads_calibration
        hashes = local_hashes(calibration, self.plan.files) if reads else []
        if text is not None:
            hashes.append((text.name, self.plan.files.text(text).sha256))
        return stage_key(
            TEXTS_FORMAT,
            self._companions,
            calibration.spec if reads else None,
            calibration.label,
            hashes,
            str(text),
            self.plan.reads_rows,
            self.plan.computes_imatrix,
            calibration.samples,
            calibration.seed,
            calibration.pack,
            self.plan.max_length,
            self.chunk,
            self.plan.options.imatrix_chunks,
            self.plan.model.facts.vocab_size,
        )

    @property
    def chunk(self) -> int:
        """Tokens per chunk of the importance matrix, within the model's context."""
        return min(self.plan.options.chunk, self.plan.model.facts.context_length)

    def observe(self, rows: ObservationRows) -> str:
        """The key of the observations."""
        calibration = self.plan.calibration
        return stage_key(
            OBSERVE_FORMAT,
            self._source,
            rows.label,
            rows.sha256,
            self.plan.max_length,
            calibration.samples,
            calibration.seed,
            *self._computing,
            self.plan.mtp,
            *self._sums,
        )

    @property
    def _sums(self) -> list[str]:
        """What only observations with the sums of an importance matrix depend on."""
        return ["with imatrix", str(IMATRIX_FORMAT)] if self.plan.takes_sums else []

    def repair(self, pruned: PrunedView, rows: ObservationRows, kind: str) -> str:
        """The key of a repair of the pruned model on the rows."""
        text = rows.label, rows.sha256, self.plan.max_length
        return stage_key(REPAIR_FORMAT, self.pruned(pruned), kind, *text, *self._computing)

    def merge(self, rows: ObservationRows, protected: Kept) -> str:
        """The key of a merge on the rows; nothing is merged into protected experts."""
        plan = self.plan
        how = plan.method, plan.target.n_kept, plan.group_size, sorted(protected.items())
        text = rows.label, rows.sha256, plan.max_length
        return stage_key(MERGE_FORMAT, self._source, how, plan.mtp, *text, *self._computing)

    def pruned(self, pruned: PrunedView) -> str:
        """The key of the pruned model, in whatever format; repaired, merged or neither."""
        return self.pruned_of(pruned.kept, pruned.identity)

    def pruned_of(self, kept: Kept, identity: str = "") -> str:
        """The same, given the experts and a hash of weights that are not the source's."""
        kept_experts, changed = sorted(kept.items()), (identity,) if identity else ()
        inputs = self._source, kept_experts, self._companions, self.plan.mtp, *changed
        return stage_key(PRUNE_FORMAT, *inputs)

    def imatrix(self, pruned: str, chunks: ImatrixChunks, probe: Sequence[Row]) -> str:
        """The key of the importance matrix."""
        rows = [row.tolist() for row in probe]
        text = chunks.label, chunks.tokens_sha256, chunks.chunk_size
        return stage_key(IMATRIX_FORMAT, pruned, *text, rows, *self._computing)

    def export(
        self, imatrix: str, datasets: Sequence[str], recipes: Sequence[ResolvedRecipe]
    ) -> str:
        """The key of the GGUF files; their headers name the datasets of the calibration."""
        plan = self.plan
        names = (plan.name, plan.source.label, plan.method, datasets)
        sources = [(recipe.name, recipe.label, recipe.source) for recipe in recipes]
        ik = ik_identity(recipes)
        return export_key(imatrix, *names, self._card, sources, self._history, *ik)

    @property
    def inputs(self) -> Inputs:
        """The keys of everything that a bundle depends on."""
        plan = self.plan
        recipes = {plan.gguf_name(recipe): recipe_key(recipe) for recipe in plan.recipes}
        return Inputs(self._base, recipes)

    @property
    def _base(self) -> str:
        plan = self.plan
        if plan.unweighed is not None:  # what was asked for is the same before and after
            return self.of(plan.unweighed)._base
        return stage_key(
            *(TEXTS_FORMAT, OBSERVE_FORMAT, PRUNE_FORMAT, IMATRIX_FORMAT),
            self._source,
            self.texts if plan.reads_texts else self._companions,
            self._given,
            plan.writes_hf,
            self._card,
            plan.name,
            plan.source.label,
            plan.source.revision,
            # what was asked for: it is the same before a choice and after
            self._choosing if plan.chooses else plan.method,
            (plan.options.protect, plan.options.protect_super_experts),
            self._history,
            plan.target.n_kept,
            plan.mtp,
            *self._computing,
            *((REPAIR_FORMAT, self._asked_repair) if self._asked_repair else ()),
            *((MERGE_FORMAT, plan.group_size) if plan.merges else ()),
            *self._sums,
            *((WEIGH_FORMAT, self._weighing) if plan.weighs else ()),
        )

    @property
    def _weighing(self) -> tuple[object, ...]:
        """What was asked for where the number of experts is weighed."""
        options = self.plan.options
        text = options.choose_text
        other = None if text is None else (text.name, self.plan.files.text(text).sha256)
        return self.plan.counts, repr(options.target), options.tensor_types, other, *self._probed

    def weigh(self, kept: Mapping[int, Kept], observations: str, text: str) -> str:
        """The key of a budget's division, by the experts that each number keeps.

        `observations` and `text` are the hashes of the observations' file and of the tokens.
        """
        options, given = self.plan.options, self.plan.imatrix
        choices = [(count, sorted(experts.items())) for count, experts in kept.items()]
        return stage_key(
            WEIGH_FORMAT,
            (FIT_FORMAT, ggml_identity()),
            self._source,
            choices,
            repr(options.target),
            options.tensor_types,
            (observations, None if given is None else given.sha256, text),
            *self._computing,
            *self._probed,
        )

    @property
    def _probed(self) -> list[str]:
        """What only a prediction depends on for which the sensitivity of the source is measured."""
        is_measured = self.plan.options.weigh_sensitivity == MEASURED
        return [MEASURED, str(PROBE_FORMAT)] if is_measured else []

    @property
    def _given(self) -> list[tuple[str, str] | None]:
        """The files that take the place of stages: cards name them."""
        given = (self.plan.given_kept, self.plan.observations, self.plan.imatrix)
        return [None if one is None else (one.file, one.sha256) for one in given]

    @property
    def _asked_repair(self) -> str:
        """The repair that was asked for, also as a candidate; "" for none."""
        plan = self.plan
        if BEST_REPAIRED in plan.candidates:
            return BEST_REPAIRED
        asked = plan.options.repair if plan.target.prunes else "none"
        return "" if asked == "none" else asked

    @property
    def _choosing(self) -> tuple[object, ...]:
        """What a choice of a method depends on, besides the calibration."""
        plan = self.plan
        text = plan.options.choose_text
        other = None if text is None else (text.name, plan.files.text(text).sha256)
        return AUTO, CHOOSE_FORMAT, plan.candidates, other

    def choose(self, kept: Mapping[str, Kept], texts: Sequence[str], repairs: str) -> str:
        """The key of a choice among candidates, by the experts that each keeps.

        `texts` are the hashes of the tokens that it is made on, and `repairs` is that of the rows
        on which the best one is repaired; "" if none is.
        """
        candidates = [(name, sorted(experts.items())) for name, experts in kept.items()]
        inputs = self._source, candidates, texts, (REPAIR_FORMAT, repairs)
        return stage_key(CHOOSE_FORMAT, *inputs, *self._computing)

    @property
    def _history(self) -> dict[str, Any] | None:
        """What was pruned before, as the source's manifest says."""
        return None if self.plan.history is None else asdict(self.plan.history)

    @property
    def _computing(self) -> tuple[str, str]:
        compute = self.plan.options.compute
        return compute.likely_device, compute.likely_dtype


def stage_key(*inputs: object) -> str:
    """A hash that changes when any input of a stage does."""
    text = json.dumps(inputs, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def export_key(*inputs: object) -> str:
    """The key of an export: it names the library that quantizes, and what headers say of it."""
    # headers hold the version of this program, and a file is resumed only with one of them
    return stage_key(EXPORT_FORMAT, __version__, ggml_identity(), *inputs)


def ggml_identity() -> tuple[str, ...]:
    """The ggml that quantizes; it decides the bytes of every quantized tensor."""
    ggml = load_ggml()
    # two builds of one version may round differently; wheels of one version are one file
    return (ggml.version, file_sha256(ggml.path)) if ggml.is_own else (ggml.version,)


def ik_identity(recipes: Iterable[ResolvedRecipe]) -> tuple[str, ...]:
    """The package that makes types of ik_llama.cpp, if any of the recipes has some."""
    has_some = any(recipe.recipe.is_ik for recipe in recipes)
    return (PACKAGE, package_version()) if has_some else ()


def recipe_key(recipe: ResolvedRecipe) -> str:
    """The key of a recipe's GGUF file, among files of the same model and importance matrix."""
    # not of this program: each record in a manifest has the version that its header has
    named = recipe.name, recipe.label, recipe.source
    return stage_key(EXPORT_FORMAT, ggml_identity(), *named, *ik_identity([recipe]))


def _hashes(files: Iterable[Path], error_type: type[Reap2ggufError]) -> list[tuple[str, str]]:
    """Names and SHA-256; an error of `error_type` if a file cannot be read."""
    hashes: list[tuple[str, str]] = []
    for file in files:
        try:
            hashes.append((file.name, hash_file(file).sha256))
        except OSError as error:
            raise error_type(f"{file}: cannot be read ({error.strerror or error})") from error
    return hashes
