"""The GGUF files of a model: one for each recipe, and side files such as a vision projector.

What their headers say besides tokenizer, tensors and importance matrix is made by `model_header`
and `side_header`, from a folder, a model and names alone, so that `verify` can make it again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from gguf import GGUFValueType, LlamaFileType

from reap2gguf import __version__
from reap2gguf.bundle.front_matter import PrunedFrom
from reap2gguf.bundle.layout import IMATRIX_FILE
from reap2gguf.exporting.general import General, general_values
from reap2gguf.exporting.gguf_export import GgufOutput, export_gguf
from reap2gguf.exporting.header import SIZE_LABEL, HeaderFacts
from reap2gguf.gguf_files.imatrix import Imatrix, load_imatrix
from reap2gguf.models.description import HeaderValue, SideFile

if TYPE_CHECKING:
    from reap2gguf.bundle.manifest import Manifest
    from reap2gguf.checkpoint.weights import Weights
    from reap2gguf.exporting.journal import ExportJournal
    from reap2gguf.models.contract import MoeModel
    from reap2gguf.progress import Progress
    from reap2gguf.pruning.select import Kept
    from reap2gguf.quantizing.resolve import ResolvedRecipe

_UNWEIGHTED_TYPES = ("F32", "F16", "BF16", "Q8_0")


@dataclass(frozen=True)
class WeightedBy:
    """An importance matrix, and the name of its file as headers record it."""

    imatrix: Imatrix
    file: str = IMATRIX_FILE

    @classmethod
    def of(cls, imatrix: Imatrix | Path | str) -> WeightedBy:
        """A matrix as a value, or in a file of either format; ArtifactError if that is broken."""
        if isinstance(imatrix, Imatrix):
            return cls(imatrix)
        return cls(load_imatrix(Path(imatrix)), Path(imatrix).name)

    def digest(self) -> str:
        """A hash of all its sums and counts."""
        digest = hashlib.sha256()
        for name, entry in sorted(self.imatrix.entries.items()):
            digest.update(name.encode() + entry.sums.tobytes() + entry.counts.tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class HeaderNames:
    """What headers say of a model that its folder does not hold."""

    name: str  # general.name
    pruned: PrunedFrom | None = None  # None: not pruned here
    own: tuple[HeaderValue, ...] = ()  # reap2gguf.*, as `pruning_values` makes them

    @classmethod
    def of(cls, manifest: Manifest) -> HeaderNames:
        """The names in the headers of a finished bundle."""
        pruning = manifest.pruning
        own = pruning_values(
            manifest.source.label,
            pruning.method,
            pruning.n_experts,
            {layer: tuple(kept) for layer, kept in pruning.kept.items()},
            manifest.program.get("reap2gguf", ""),
        )
        return cls(manifest.name, PrunedFrom.of(manifest), tuple(own))


def model_header(
    weights: Weights, model: MoeModel, names: HeaderNames, recipe: str
) -> tuple[HeaderValue, ...]:
    """All keys of a model's file but tokenizer, importance matrix, file type and computed size.

    `weights` is the model to quantize, or the pruned view of the source; the pruned checkpoint of
    the bundle gives the same.
    """
    return _model_values(_general(weights, model, names), model, names, recipe)


def _model_values(
    general: General, model: MoeModel, names: HeaderNames, recipe: str
) -> tuple[HeaderValue, ...]:
    return (*general.values, *model.gguf_metadata(), *names.own, _text("reap2gguf.recipe", recipe))


def side_header(
    weights: Weights, model: MoeModel, names: HeaderNames, side: SideFile
) -> tuple[HeaderValue, ...]:
    """The same for a side file, which says what the model's file says of where it comes from."""
    values = _general(weights, model, names).values
    # the size is that of this file's own tensors
    return (*(value for value in values if value.key != SIZE_LABEL), *side.values)


def _general(weights: Weights, model: MoeModel, names: HeaderNames) -> General:
    tensors = model.gguf_tensors(weights.tensors)
    n_parameters = sum(prod(tensor.shape) for tensor in tensors)
    return general_values(weights.folder, names.name, n_parameters, names.pruned)


def export_model(
    weights: Weights,
    model: MoeModel,
    names: HeaderNames,
    files: Mapping[Path, ResolvedRecipe],
    weighted_by: WeightedBy | None,
    n_threads: int,
    progress: Progress,
    journal: ExportJournal | None = None,
) -> None:
    """Write one GGUF file for each recipe, all in one pass; with a journal, resume from it.

    Raises what `export_gguf` raises.
    """
    if weighted_by is not None:
        _report_unweighted(files.values(), weighted_by.imatrix, progress)
    general = _general(weights, model, names)
    for problem in general.problems:
        progress.note(problem)
    outputs = [
        GgufOutput(path, _header(general, model, names, recipe, weighted_by))
        for path, recipe in files.items()
    ]
    imatrix = None if weighted_by is None else weighted_by.imatrix
    tensors = model.gguf_tensors(weights.tensors)
    export_gguf(weights, tensors, outputs, imatrix, n_threads, progress, journal)


def _header(
    general: General,
    model: MoeModel,
    names: HeaderNames,
    recipe: ResolvedRecipe,
    weighted_by: WeightedBy | None,
) -> HeaderFacts:
    by_imatrix = weighted_by if uses_imatrix(recipe) else None
    return HeaderFacts(
        arch=model.facts.gguf_arch,
        values=_model_values(general, model, names, recipe.name),
        vocab_size=model.facts.vocab_size,
        pre_tokenizers=model.pre_tokenizers,
        file_type=recipe.llama_file_type,
        tensor_types=recipe.tensor_types(),
        imatrix=None if by_imatrix is None else by_imatrix.imatrix,
        imatrix_file=IMATRIX_FILE if by_imatrix is None else by_imatrix.file,
    )


def export_side(
    weights: Weights,
    model: MoeModel,
    names: HeaderNames,
    path: Path,
    side: SideFile,
    n_threads: int,
    progress: Progress,
    journal: ExportJournal | None = None,
) -> None:
    """Write a side file, such as a vision projector, in half precision.

    Raises what `export_gguf` raises.
    """
    facts = HeaderFacts(
        arch=side.arch,
        values=side_header(weights, model, names, side),
        general_type=side.general_type,
        file_type=LlamaFileType.MOSTLY_F16,
        tensor_types=side.tensor_types(),
    )
    outputs = [GgufOutput(path, facts)]
    export_gguf(weights, side.tensors, outputs, None, n_threads, progress, journal)


def _report_unweighted(
    recipes: Iterable[ResolvedRecipe], imatrix: Imatrix, progress: Progress
) -> None:
    """Note which matrices are quantized without importance, llama-imatrix's own gaps aside."""
    for recipe in recipes:
        missing = [
            name
            for name, tensor_type in recipe.tensor_types().items()
            if name.startswith("blk.")
            and tensor_type.name not in _UNWEIGHTED_TYPES
            and name not in imatrix.entries
        ]
        if missing:
            progress.note(
                f"{recipe.name}: the importance matrix has no entry for {len(missing)} "
                f"tensors, such as {missing[0]}; they are quantized unweighted"
            )


def uses_imatrix(recipe: ResolvedRecipe) -> bool:
    """Whether any tensor of a recipe is quantized with importance (Q8_0 ignores it)."""
    return any(t.name not in _UNWEIGHTED_TYPES for t in recipe.tensor_types().values())


def pruning_values(
    source_label: str, method: str, n_experts: int, kept: Kept, version: str = __version__
) -> list[HeaderValue]:
    """Keys of our own, so that a GGUF file alone records where its experts come from."""
    flat = [expert for layer in sorted(kept) for expert in kept[layer]]
    return [
        _text("reap2gguf.version", version),
        _text("reap2gguf.source", source_label),
        _text("reap2gguf.method", method),
        HeaderValue("reap2gguf.source_expert_count", n_experts, GGUFValueType.UINT32),
        # layer after layer, expert_count ids each
        HeaderValue("reap2gguf.kept_experts", flat, GGUFValueType.ARRAY),
    ]


def _text(key: str, value: str) -> HeaderValue:
    return HeaderValue(key, value, GGUFValueType.STRING)
