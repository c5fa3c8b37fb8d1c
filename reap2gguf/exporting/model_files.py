"""The GGUF files of a model: one for each recipe, and side files such as a vision projector."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gguf import GGUFValueType, LlamaFileType

from reap2gguf import __version__
from reap2gguf.bundle.layout import IMATRIX_FILE
from reap2gguf.exporting.gguf_export import GgufOutput, export_gguf
from reap2gguf.exporting.header import HeaderFacts
from reap2gguf.gguf_files.imatrix import Imatrix, load_imatrix
from reap2gguf.models.description import HeaderValue, SideFile

if TYPE_CHECKING:
    from reap2gguf.bundle.manifest import EarlierPruning
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


def export_model(
    weights: Weights,
    model: MoeModel,
    name: str,
    files: Mapping[Path, ResolvedRecipe],
    weighted_by: WeightedBy | None,
    extra: Sequence[HeaderValue],
    n_threads: int,
    progress: Progress,
    journal: ExportJournal | None = None,
) -> None:
    """Write one GGUF file for each recipe, all in one pass; with a journal, resume from it.

    Raises what `export_gguf` raises.
    """
    if weighted_by is not None:
        _report_unweighted(files.values(), weighted_by.imatrix, progress)
    outputs = [
        GgufOutput(path, _header(model, name, recipe, weighted_by, extra))
        for path, recipe in files.items()
    ]
    imatrix = None if weighted_by is None else weighted_by.imatrix
    tensors = model.gguf_tensors(weights.tensors)
    export_gguf(weights, tensors, outputs, imatrix, n_threads, progress, journal)


def _header(
    model: MoeModel,
    name: str,
    recipe: ResolvedRecipe,
    weighted_by: WeightedBy | None,
    extra: Sequence[HeaderValue],
) -> HeaderFacts:
    by_imatrix = weighted_by if uses_imatrix(recipe) else None
    return HeaderFacts(
        name=name,
        arch=model.facts.gguf_arch,
        values=(*model.gguf_metadata(), *extra, _text("reap2gguf.recipe", recipe.name)),
        vocab_size=model.facts.vocab_size,
        pre_tokenizers=model.pre_tokenizers,
        file_type=recipe.llama_file_type,
        tensor_types=recipe.tensor_types(),
        imatrix=None if by_imatrix is None else by_imatrix.imatrix,
        imatrix_file=IMATRIX_FILE if by_imatrix is None else by_imatrix.file,
    )


def export_side(
    weights: Weights,
    name: str,
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
        name=name,
        arch=side.arch,
        values=side.values,
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
    source_label: str,
    method: str,
    n_experts: int,
    kept: Kept,
    earlier: EarlierPruning | None = None,
) -> list[HeaderValue]:
    """Keys of our own, so that a GGUF file alone records where its experts come from.

    With `earlier`, also those of the original: the source was pruned before.
    """
    values = [
        _text("reap2gguf.version", __version__),
        _text("reap2gguf.source", source_label),
        _text("reap2gguf.method", method),
        HeaderValue("reap2gguf.source_expert_count", n_experts, GGUFValueType.UINT32),
        _experts("reap2gguf.kept_experts", kept),
    ]
    if earlier is not None:
        values += [
            _text("reap2gguf.original.source", earlier.label),
            HeaderValue("reap2gguf.original.expert_count", earlier.n_experts, GGUFValueType.UINT32),
            _experts("reap2gguf.original.kept_experts", earlier.kept),
        ]
    return values


def _experts(key: str, kept: Mapping[int, Sequence[int]]) -> HeaderValue:
    """Ids of experts, layer after layer, expert_count ids each."""
    flat = [expert for layer in sorted(kept) for expert in kept[layer]]
    return HeaderValue(key, flat, GGUFValueType.ARRAY)


def _text(key: str, value: str) -> HeaderValue:
    return HeaderValue(key, value, GGUFValueType.STRING)
