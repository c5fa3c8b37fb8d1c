"""The stages of a build as functions from checkpoints to files, for `build` and single commands.

torch and transformers load inside the stages that compute, so that planning and refusing are quick.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gguf import GGUFValueType, LlamaFileType

from reap2gguf import __version__
from reap2gguf.artifacts.observations import Observations
from reap2gguf.atomic import disk_errors_told, rename, write_whole
from reap2gguf.building import checks
from reap2gguf.calibration.texts import ImatrixChunks, ObservationRows
from reap2gguf.checkpoint.checkpoint import Checkpoint
from reap2gguf.checkpoint.weights import Weights
from reap2gguf.errors import ArtifactError, OutputError, VerificationError
from reap2gguf.exporting.gguf_export import GgufOutput, export_gguf
from reap2gguf.exporting.header import HeaderFacts
from reap2gguf.exporting.journal import ExportJournal
from reap2gguf.gguf_files.imatrix import Imatrix, save_dat, save_gguf
from reap2gguf.models import HeaderValue, MoeModel, SideFile
from reap2gguf.options import ComputeOptions
from reap2gguf.progress import Progress
from reap2gguf.pruning.select import Kept, Target, select_experts
from reap2gguf.pruning.view import PrunedView
from reap2gguf.pruning.write import KEPT_FILE, write_pruned
from reap2gguf.quantizing.resolve import ResolvedRecipe

if TYPE_CHECKING:
    from reap2gguf.observing.batches import Row
    from reap2gguf.observing.sweep import SweepReport

_UNWEIGHTED_TYPES = ("F32", "F16", "BF16", "Q8_0")
_PROBE_TOKENS = 16384  # on which an MTP block's predictions are counted


def observe(
    checkpoint: Checkpoint,
    model: MoeModel,
    rows: ObservationRows,
    compute: ComputeOptions,
    progress: Progress,
) -> Observations:
    """Sweep the unpruned model and sum what each expert does."""
    from reap2gguf.observing.saliency import SaliencyObserver
    from reap2gguf.observing.sweep import SweepOptions, sweep

    observer = SaliencyObserver(model)
    options = SweepOptions(**_sweep_arguments(compute))
    report = sweep(
        checkpoint, model, rows.rows, observer, options, "Observing experts", progress,
        mtp_probe(model, rows),
    )  # fmt: skip
    return Observations(
        layers=observer.layers,
        model_fingerprint=checkpoint.fingerprint(),
        calibration=rows.label,
        calibration_sha256=rows.sha256,
        n_rows=report.n_rows,
        n_tokens=report.n_tokens,
        n_dropped_rows=report.n_dropped_rows,
        n_mtp_hits=report.mtp_hits,
        n_mtp_tokens=report.mtp_tokens,
    )


def _sweep_arguments(compute: ComputeOptions) -> dict[str, Any]:
    """What `SweepOptions` takes, which cannot be imported before torch is wanted."""
    return {
        "device": compute.device,
        "dtype": compute.dtype,
        "n_threads": compute.threads,
        "memory": compute.memory,
        "spool": compute.spool,
        "folder": compute.scratch,
        "resume": compute.resume,
    }


def mtp_probe(model: MoeModel, rows: ObservationRows) -> Sequence[Row]:
    """The first rows, on which an MTP block is asked for its predictions; none without a block."""
    if not model.facts.has_mtp:
        return ()
    chosen: list[Row] = []
    for row in rows.rows:
        if sum(map(len, chosen)) >= _PROBE_TOKENS:
            break
        chosen.append(row)
    return chosen


def compute_imatrix(
    checkpoint: Weights,
    model: MoeModel,
    chunks: ImatrixChunks,
    compute: ComputeOptions,
    progress: Progress,
    probe: Sequence[Row] = (),
) -> tuple[Imatrix, SweepReport]:
    """Sweep a model and sum the squares of what its matrices multiply; `probe` as in observe."""
    from reap2gguf.observing.importance import ImportanceObserver
    from reap2gguf.observing.sweep import SweepOptions, sweep

    observer = ImportanceObserver(model)
    options = SweepOptions(**_sweep_arguments(compute))
    report = sweep(
        checkpoint, model, chunks.chunks, observer, options, "Importance matrix", progress, probe
    )
    imatrix = Imatrix(observer.entries, chunks.label, len(chunks.chunks), chunks.chunk_size)
    for name, count in imatrix.uncovered().items():
        if name.endswith("ffn_down_exps.weight"):
            progress.note(
                f"imatrix: {name}: no token of the text reached {count} of "
                f"{len(imatrix.entries[name].counts)} experts; they are quantized unweighted"
            )
    return imatrix, report


def save_imatrix(imatrix: Imatrix, gguf_path: Path) -> None:
    """Write both formats, `.dat` beside the GGUF; OutputError if the disk refuses."""
    save_gguf(imatrix, gguf_path)
    save_dat(imatrix, gguf_path.with_suffix(".dat"))


def export(
    checkpoint: Weights,
    model: MoeModel,
    name: str,
    files: Mapping[Path, ResolvedRecipe],
    imatrix: Imatrix | None,
    extra: Sequence[HeaderValue],
    n_threads: int,
    progress: Progress,
    imatrix_file: str = "imatrix.gguf",
    journal: ExportJournal | None = None,
) -> None:
    """Write one GGUF per recipe in one pass; with a journal, from where it stopped."""
    tensors = model.gguf_tensors(checkpoint.tensors)
    if imatrix is not None:
        _tell_unweighted(files.values(), imatrix, progress)
    outputs = [
        GgufOutput(
            path,
            HeaderFacts(
                name=name,
                arch=model.facts.gguf_arch,
                values=(
                    *model.gguf_metadata(),
                    *extra,
                    _text("reap2gguf.recipe", recipe.recipe.name),
                ),
                vocab_size=model.facts.vocab_size,
                file_type=recipe.recipe.mixture.file_type,
                tensor_types=recipe.tensor_types(),
                imatrix=imatrix if uses_imatrix(recipe) else None,
                imatrix_file=imatrix_file,
            ),
        )
        for path, recipe in files.items()
    ]
    export_gguf(checkpoint, tensors, outputs, imatrix, n_threads, progress, journal)


def export_side(
    checkpoint: Weights, name: str, path: Path, side: SideFile, n_threads: int,
    progress: Progress, journal: ExportJournal | None = None,
) -> None:  # fmt: skip
    """Write a side file, such as a vision projector, in half precision."""
    facts = HeaderFacts(
        name=name,
        arch=side.arch,
        values=side.values,
        general_type=side.general_type,
        file_type=LlamaFileType.MOSTLY_F16,
        tensor_types=side.tensor_types(),
    )
    outputs = [GgufOutput(path, facts)]
    export_gguf(checkpoint, side.tensors, outputs, None, n_threads, progress, journal)


def _tell_unweighted(
    recipes: Iterable[ResolvedRecipe], imatrix: Imatrix, progress: Progress
) -> None:
    """Say which matrices are quantized without importance, llama-imatrix's own gaps aside."""
    for recipe in recipes:
        missing = [
            name
            for name, tensor_type in recipe.tensor_types().items()
            if name.startswith("blk.") and tensor_type.name not in _UNWEIGHTED_TYPES
            and name not in imatrix.entries
        ]  # fmt: skip
        if missing:
            progress.note(
                f"{recipe.recipe.name}: the importance matrix has no entry for {len(missing)} "
                f"tensors, such as {missing[0]}; they are quantized unweighted"
            )


def uses_imatrix(recipe: ResolvedRecipe) -> bool:
    """Whether any tensor of a recipe is quantized with importance (Q8_0 ignores it)."""
    return any(
        tensor_type.name not in _UNWEIGHTED_TYPES for tensor_type in recipe.tensor_types().values()
    )


def header_values(source_label: str, method: str, n_experts: int, kept: Kept) -> list[HeaderValue]:
    """Keys of our own, so that a GGUF alone tells where its experts come from."""
    flat = [expert for layer in sorted(kept) for expert in kept[layer]]
    return [
        _text("reap2gguf.version", __version__),
        _text("reap2gguf.source", source_label),
        _text("reap2gguf.method", method),
        HeaderValue("reap2gguf.source_expert_count", n_experts, GGUFValueType.UINT32),
        # layer after layer, expert_count ids each
        HeaderValue("reap2gguf.kept_experts", flat, GGUFValueType.ARRAY),
    ]


def prune_to_folder(
    checkpoint: Checkpoint,
    model: MoeModel,
    observations: Observations,
    method: str,
    target: Target,
    folder: Path,
    progress: Progress,
) -> None:
    """Prune on its own: write, verify, then give the folder its name.

    Raises ArtifactError if the observations are of another checkpoint, OutputError if the folder
    exists, VerificationError if what was written is not what was planned.
    """
    if folder.exists():
        raise OutputError(f"{folder}: exists already; pass another -o or move it away")
    if observations.model_fingerprint != checkpoint.fingerprint():
        raise ArtifactError(
            f"the observations are of another checkpoint than {checkpoint.folder}; run `reap2gguf "
            "observe` on this one"
        )
    kept = select_experts(observations, method, target, model.facts)
    with disk_errors_told(folder):
        made = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        _prune_and_verify(PrunedView(checkpoint, model, kept), method, made, progress)
        with disk_errors_told(folder):
            made.chmod(0o755)
        rename(made, folder)
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise


def _prune_and_verify(pruned: PrunedView, method: str, made: Path, progress: Progress) -> None:
    write_pruned(pruned, made, progress)
    kept = {str(layer): ids for layer, ids in sorted(pruned.kept.items())}
    record = {"method": method, "kept_experts": kept}
    write_whole(made / KEPT_FILE, json.dumps(record, indent=1) + "\n")
    violations = checks.verify_pruned(made, pruned, progress)
    if violations:
        raise VerificationError(violations)


def _text(key: str, value: str) -> HeaderValue:
    return HeaderValue(key, value, GGUFValueType.STRING)
