"""What a build will do, decided from headers alone: counts, types, sizes, memory, time."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from reap2gguf.building.workdir import RESERVED_NAMES
from reap2gguf.bundle.layout import GGUF_SUFFIX, BundleFolders, model_file, side_file
from reap2gguf.calibration.scanned_files import ScannedFiles
from reap2gguf.calibration.sources import check_calibration
from reap2gguf.calibration.spec import Calibration, decide
from reap2gguf.errors import CalibrationError, UsageError
from reap2gguf.hub.retry import Note, ignore_note
from reap2gguf.hub.source import Source, resolve_source
from reap2gguf.models.description import Dropped, SideFile
from reap2gguf.models.table import describe
from reap2gguf.models.transformers_config import check_with_transformers
from reap2gguf.pruning.select import Kept, Target, choose_target
from reap2gguf.pruning.view import PrunedView
from reap2gguf.quantizing.recipe import load_recipe
from reap2gguf.quantizing.resolve import ResolvedRecipe, resolve
from reap2gguf.tokenizer.gguf_keys import check_tokenizer

if TYPE_CHECKING:
    from reap2gguf.checkpoint.checkpoint import Checkpoint
    from reap2gguf.models.contract import MoeModel
    from reap2gguf.options import BuildOptions


_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")  # what the Hub allows


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

    @property
    def hf_bytes(self) -> int:
        """Size of the safetensors."""
        return self.pruned.n_bytes

    @property
    def n_parameters(self) -> int:
        """Parameters of the pruned model."""
        return self.pruned.n_parameters

    @property
    def max_length(self) -> int:
        """Tokens per row: what was asked for, within the model's context."""
        return min(self.calibration.max_length, self.model.facts.context_length)

    def gguf_name(self, recipe: ResolvedRecipe) -> str:
        return model_file(self.name, recipe.label)

    def side_name(self, side: SideFile) -> str:
        return side_file(side.prefix, self.name)

    @property
    def mtp(self) -> str:
        """What happens to a multi-token-prediction block: pruned, dropped or none."""
        if self.model.facts.has_mtp:
            return "pruned"
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
    # what is cheap to check comes first
    recipes = [load_recipe(name) for name in options.recipes]
    labels = [recipe.label for recipe in recipes]
    if twice := next((label for label in labels if labels.count(label) > 1), None):
        raise UsageError(f"two recipes have the label {twice!r} and so the same file name")
    calibration = decide(options.calibration)
    files = ScannedFiles()
    check_calibration(calibration, files)
    if options.imatrix_text is not None:
        _check_there(options.imatrix_text)
        files.text(options.imatrix_text)
    source = resolve_source(options.model, note)
    checkpoint = source.open(note)
    model = describe(checkpoint, keep_mtp=options.mtp == "prune")
    check_with_transformers(model)
    check_tokenizer(checkpoint.folder, model.facts.vocab_size, model.pre_tokenizers)
    target = choose_target(model.facts, options.keep_experts, options.compression)
    first_ones: Kept = {layer: tuple(range(target.n_kept)) for layer in model.facts.moe_layers}
    pruned = PrunedView(checkpoint, model, first_ones)
    tensors = pruned.model.gguf_tensors(pruned.tensors)
    resolved = tuple(
        resolve(recipe, tensors, model.facts, target.n_kept, has_imatrix=True) for recipe in recipes
    )
    name = _bundle_name(options, source, target)
    sides = model.side_files(checkpoint.folder, checkpoint.tensors)
    return Plan(
        options,
        calibration,
        source,
        checkpoint,
        model,
        target,
        name,
        pruned,
        resolved,
        sides,
        files,
    )


def _check_there(text: Path) -> None:
    """Refuse a missing text before anything else is read."""
    if not os.path.exists(os.path.expanduser(text)):
        raise CalibrationError(f"{text}: no such file; pass a text file")


def _bundle_name(options: BuildOptions, source: Source, target: Target) -> str:
    """The given name, or `<source>-REAP-<compression>` with two decimals, or more if needed."""
    ratio = target.compression if options.compression is None else options.compression
    shown = f"{ratio:.2f}" if round(ratio, 2) == ratio else f"{ratio:.4g}"
    name = f"{source.short_name}-REAP-{shown}" if options.name is None else options.name
    if not _NAME.fullmatch(name) or name in RESERVED_NAMES or name.endswith(GGUF_SUFFIX):
        raise UsageError(
            f"the name {name!r} is not allowed; pass --name with letters, digits, '.', '_' and '-' "
            f"(not ending in {GGUF_SUFFIX}), as the Hub requires"
        )
    folders = BundleFolders(options.output, name)
    if source.folder.resolve() in (folders.hf.resolve(), folders.gguf.resolve()):
        raise UsageError(
            f"{source.folder}: the result would replace the source; pass another --name"
        )
    return name
