"""The two calibration passes over a model, each from rows of tokens to its result.

torch and transformers are loaded inside, so that planning and refusing are quick.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING

from reap2gguf.artifacts.made_with import COMPUTING, versions
from reap2gguf.artifacts.observations import Observations
from reap2gguf.artifacts.observed_sums import MatrixSums, ObservedSums
from reap2gguf.gguf_files.growing import GrowingEntries
from reap2gguf.gguf_files.imatrix import Imatrix, ImatrixEntry
from reap2gguf.gguf_files.imatrix_coverage import hits_line, layer_hits
from reap2gguf.machine import processes
from reap2gguf.models.description import sums_shape
from reap2gguf.observing.probe import mtp_probe
from reap2gguf.tokenizer.identity import tokens_of_folder, tokens_of_header

if TYPE_CHECKING:
    from reap2gguf.artifacts.texts import ImatrixChunks, ObservationRows, Row
    from reap2gguf.checkpoint.checkpoint import Checkpoint
    from reap2gguf.checkpoint.weights import Weights
    from reap2gguf.models.contract import MoeModel
    from reap2gguf.observing.sweep import SweepReport
    from reap2gguf.observing.sweep_plan import HasRoom
    from reap2gguf.options import ComputeOptions
    from reap2gguf.progress import Progress


def observe(
    checkpoint: Checkpoint,
    model: MoeModel,
    rows: ObservationRows,
    compute: ComputeOptions,
    progress: Progress,
    with_imatrix: bool = False,
) -> Observations:
    """Sum what each expert of the unpruned model does on the rows.

    With `with_imatrix`, the squares of what each matrix multiplies are summed in the same sweep.
    Raises ObservationError, CheckpointError, UsageError or OutputError, as `sweep` does.
    """
    from reap2gguf.observing.importance import ImportanceObserver
    from reap2gguf.observing.joint import JointObserver
    from reap2gguf.observing.saliency import SaliencyObserver
    from reap2gguf.observing.sweep import sweep

    _check_same_rows(rows.sha256)
    tokens = _tokens(checkpoint, model)
    saliency = SaliencyObserver(model)
    joint = JointObserver(model, saliency, ImportanceObserver(model)) if with_imatrix else None
    probe = mtp_probe(model, rows)
    report = sweep(
        checkpoint,
        model,
        rows.rows,
        joint or saliency,
        compute,
        "Observing experts",
        progress,
        probe,
    )
    return Observations(
        layers=saliency.layers,
        model_fingerprint=checkpoint.fingerprint(),
        calibration=rows.label,
        calibration_sha256=rows.sha256,
        n_rows=report.n_rows,
        n_tokens=report.n_tokens,
        n_dropped_rows=report.n_dropped_rows,
        n_mtp_hits=report.mtp_hits,
        n_mtp_tokens=report.mtp_tokens,
        made_with=versions(COMPUTING),
        imatrix=None if joint is None else _of_rows(joint.importance.entries, rows),
        architecture=model.facts.gguf_arch,
        tokens_sha256=tokens,
    )


def _tokens(checkpoint: Checkpoint, model: MoeModel) -> str:
    """The hash by which observations are known to be of a model with these tokens."""
    if checkpoint.gguf is not None:
        return tokens_of_header(checkpoint.gguf)
    return tokens_of_folder(checkpoint.folder, model.facts.vocab_size, model.tokenizers)


def _of_rows(entries: Mapping[str, ImatrixEntry], rows: ObservationRows) -> ObservedSums:
    """The sums of the rows that rank the experts."""
    found = {name: MatrixSums(name, one.sums, one.counts) for name, one in entries.items()}
    return ObservedSums(found, len(rows.rows), max(map(len, rows.rows), default=0))


def compute_imatrix(
    weights: Weights,
    model: MoeModel,
    chunks: ImatrixChunks,
    compute: ComputeOptions,
    progress: Progress,
    probe: Sequence[Row] = (),
    entries: GrowingEntries | None = None,
    beside: Callable[[HasRoom], None] = lambda has_room: None,
) -> tuple[Imatrix, SweepReport]:
    """Sum the squares of what each matrix of a model multiplies.

    On the rows of `probe`, which are not observed, the MTP block's predictions are counted.
    `entries` gets each entry when it is final, for those who wait for it; if the sweep fails, they
    are stopped. `beside` is `sweep`'s. Raises what `observe` raises.
    """
    from reap2gguf.observing.importance import ImportanceObserver
    from reap2gguf.observing.sweep import sweep

    _check_same_rows(chunks.tokens_sha256)
    progress.note(f"imatrix: {chunks.summary}")
    observer = ImportanceObserver(model, None if entries is None else entries.publish)
    with nullcontext() if entries is None else entries.filled():
        report = sweep(
            weights,
            model,
            chunks.chunks,
            observer,
            compute,
            "Importance matrix",
            progress,
            probe,
            beside,
        )
    imatrix = imatrix_of(observer.entries, chunks)
    if unseen := imatrix.unseen_experts():
        progress.note(f"imatrix: {_unweighted(imatrix, unseen)}")
    if hits := layer_hits(imatrix):
        progress.note(f"imatrix: {hits_line(hits)}")
    return imatrix, report


def _check_same_rows(digest: str) -> None:
    """Refuse rows that differ among processes: a dataset may change while they start."""
    if processes().size > 1:
        from reap2gguf.observing.compute.ranks import join

        join().check_same(
            "the hash of the calibration rows",
            digest,
            "pass the same texts on all machines, and a dataset on the Hub as owner/name@revision",
        )


def announced_entries(weights: Weights, model: MoeModel) -> GrowingEntries:
    """The entries that `compute_imatrix` will fill, by the headers of the weights alone."""
    names = model.weighted_matrices()
    tensors = model.gguf_tensors(weights.tensors)
    return GrowingEntries({t.name: sums_shape(t.name, t.shape) for t in tensors if t.name in names})


def imatrix_of(entries: Mapping[str, ImatrixEntry], chunks: ImatrixChunks) -> Imatrix:
    """An importance matrix that is computed on some chunks."""
    return Imatrix(entries, chunks.label, len(chunks.chunks), chunks.chunk_size)


def _unweighted(imatrix: Imatrix, unseen: Mapping[str, int]) -> str:
    """Which experts have no importance, in one line for all layers."""
    layers = sum(1 for _ in imatrix.expert_entries())
    n_experts = sum(len(entry.counts) for entry in imatrix.expert_entries())
    where = f"{len(unseen)} of {layers} layers, {next(iter(unseen))} the first of them"
    if layers == 1:
        where = next(iter(unseen))
    return (
        f"no token of the text reached {sum(unseen.values())} of {n_experts} experts ({where}); "
        "they are quantized unweighted"
    )
