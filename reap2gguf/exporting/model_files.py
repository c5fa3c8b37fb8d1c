"""The GGUF files of a model: one for each recipe, and side files such as a vision projector."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from reap2gguf.bundle.layout import IMATRIX_FILE
from reap2gguf.errors import ArtifactError
from reap2gguf.exporting.gguf_export import GgufOutput, export_gguf
from reap2gguf.exporting.header_facts import (
    FileTypes,
    HeaderNames,
    general_of,
    model_facts,
    side_facts,
)
from reap2gguf.ggml import NEEDS_IMPORTANCE, UNWEIGHTED_TYPES
from reap2gguf.gguf_files.imatrix import Imatrix, load_imatrix
from reap2gguf.quantizing.quantizer import SAMPLE

if TYPE_CHECKING:
    from reap2gguf.checkpoint.weights import Weights
    from reap2gguf.disk.hashing import Hashes
    from reap2gguf.exporting.journal import ExportJournal
    from reap2gguf.models.contract import MoeModel
    from reap2gguf.models.description import SideFile
    from reap2gguf.progress import Progress
    from reap2gguf.quantizing.resolve import ResolvedRecipe


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
    names: HeaderNames,
    files: Mapping[Path, ResolvedRecipe],
    weighted_by: WeightedBy | None,
    n_threads: int,
    progress: Progress,
    journal: ExportJournal | None = None,
    hashes: Hashes | None = None,
    device: str = "auto",
    checked: float = SAMPLE,
) -> None:
    """Write one GGUF file for each recipe, all in one pass; with a journal, resume from it.

    With `hashes`, they are hashed while they are written. `device` is auto, cpu or cuda: what
    quantizes. `checked` is the share of what kernels quantize that libggml makes again.

    Raises what `export_gguf` raises, and ArtifactError if a file type needs an importance matrix
    that is not there.
    """
    _refuse_unweighted(files.values(), None if weighted_by is None else weighted_by.imatrix)
    if weighted_by is not None:
        _report_unweighted(files.values(), weighted_by.imatrix, progress)
    for problem in general_of(weights, model, names).problems:
        progress.note(problem)
    imatrix = None if weighted_by is None else weighted_by.imatrix
    imatrix_file = IMATRIX_FILE if weighted_by is None else weighted_by.file
    outputs = []
    for path, recipe in files.items():
        types = FileTypes(recipe.name, recipe.llama_file_type, recipe.tensor_types())
        facts = model_facts(weights, model, names, types, imatrix, imatrix_file)
        outputs.append(GgufOutput(path, facts))
    tensors = model.gguf_tensors(weights.tensors)
    export_gguf(
        weights, tensors, outputs, imatrix, n_threads, progress, journal, hashes, device, checked
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
    hashes: Hashes | None = None,
) -> None:
    """Write a side file, such as a vision projector, in half precision.

    Raises what `export_gguf` raises.
    """
    outputs = [GgufOutput(path, side_facts(weights, model, names, side))]
    export_gguf(weights, side.tensors, outputs, None, n_threads, progress, journal, hashes)


def _refuse_unweighted(recipes: Iterable[ResolvedRecipe], imatrix: Imatrix | None) -> None:
    """Raise ArtifactError for a file type that needs importance where another one does not.

    What a tensor type needs by itself, `export_gguf` looks at.
    """
    entries = imatrix.entries if imatrix else {}
    for recipe in recipes:
        types = recipe.tensor_types()
        for name in recipe.needs_importance():
            if types[name] not in NEEDS_IMPORTANCE and name not in entries:
                raise ArtifactError(
                    f"imatrix: no entry for {name}, but {types[name].name} in a file of type "
                    f"{recipe.file_type} needs one; compute one with `reap2gguf imatrix`"
                )


def _report_unweighted(
    recipes: Iterable[ResolvedRecipe], imatrix: Imatrix, progress: Progress
) -> None:
    """Note which matrices are quantized without importance, llama-imatrix's own gaps aside."""
    for recipe in recipes:
        missing = [
            name
            for name, tensor_type in recipe.tensor_types().items()
            if name.startswith("blk.")
            and tensor_type.name not in UNWEIGHTED_TYPES
            and name not in imatrix.entries
        ]
        if missing:
            progress.note(
                f"{recipe.name}: the importance matrix has no entry for {len(missing)} "
                f"tensors, such as {missing[0]}; they are quantized unweighted"
            )
