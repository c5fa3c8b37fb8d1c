"""One sweep over a checkpoint: every row through every layer, a layer in memory at a time.

Rows of equal length are batched under a token budget; the others are right-padded, which causal
attention never looks at, and padding counts nowhere. A multi-token-prediction block runs as one
more layer, on positions that have a next token. Passengers are rows that pass through unobserved:
on them the MTP block's predictions are counted. Memory: the embedding or one decoder layer,
the activations of one batch, and the hidden states of all rows, tokens x H x 2 or 4 bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from reap2gguf.checkpoint.checkpoint import Checkpoint
from reap2gguf.errors import ObservationError, UsageError
from reap2gguf.models.contract import MoeModel
from reap2gguf.observe.decoder import StreamedDecoder
from reap2gguf.observe.mtp import count_hits
from reap2gguf.progress import Progress, Task

MAX_BAD_ROWS = 0.01
_BATCH_TOKENS = {"cpu": 8192, "cuda": 32768}
Row = npt.NDArray[np.int64]


class LayerObserver(Protocol):
    """Watches one layer at a time."""

    real_tokens: Tensor | None

    def last_layer(self) -> int: ...
    def attach(self, index: int, layer: torch.nn.Module) -> None: ...
    def commit(self) -> None: ...
    def discard(self) -> None: ...
    def finish(self, index: int) -> None: ...


@dataclass(frozen=True)
class SweepOptions:
    """Where and how a sweep computes."""

    device: str = "auto"  # auto, cpu or cuda
    dtype: str = "auto"  # auto, float32 or bfloat16
    n_threads: int | None = None

    def resolve(self) -> tuple[torch.device, torch.dtype]:
        """The device and dtype: a GPU in bfloat16 where there is one, else float32 on the CPU.

        Raises UsageError if a GPU is asked for and there is none.
        """
        has_gpu = torch.cuda.is_available()
        if self.device == "cuda" and not has_gpu:
            raise UsageError("--device cuda: torch sees no CUDA device; `reap2gguf doctor` tells")
        device = torch.device("cuda" if has_gpu and self.device != "cpu" else "cpu")
        if self.dtype == "auto":
            return device, torch.bfloat16 if device.type == "cuda" else torch.float32
        return device, {"float32": torch.float32, "bfloat16": torch.bfloat16}[self.dtype]


@dataclass(frozen=True)
class SweepReport:
    """What a sweep ran over."""

    n_rows: int
    n_tokens: int
    n_dropped_rows: int
    mtp_hits: int = 0  # of the passengers' next-next tokens, those the MTP block predicted
    mtp_tokens: int = 0


@dataclass
class _Batch:
    """Rows that are computed together; `hidden` moves from layer to layer."""

    tokens: Tensor  # (B, T)
    lengths: Tensor  # (B,)
    hidden: Tensor
    observed: bool = True

    def real_tokens(self, n_ahead: int = 0) -> Tensor | None:
        """(B * T,) true where a token, and one `n_ahead` of it, is no padding; None if all are."""
        width = self.tokens.shape[1]
        lengths = self.lengths - n_ahead
        if bool((lengths == width).all()):
            return None
        mask = torch.arange(width) < lengths[:, None]
        return mask.reshape(-1).to(self.hidden.device)

    def keep(self, rows: Tensor) -> None:
        """Leave out the rows that are false in `rows` (B,)."""
        self.lengths = self.lengths[rows]
        self.tokens = self.tokens[rows]
        self.hidden = self.hidden[rows.to(self.hidden.device)]


def sweep(
    checkpoint: Checkpoint,
    model: MoeModel,
    rows: Sequence[Row],
    observer: LayerObserver,
    options: SweepOptions,
    title: str,
    progress: Progress,
    passengers: Sequence[Row] = (),
) -> SweepReport:
    """Run all rows through the layers that `observer` wants to see.

    Raises ObservationError if more than 1 % of the rows are not finite.
    """
    device, dtype = options.resolve()
    if options.n_threads is not None:
        torch.set_num_threads(options.n_threads)
    decoder = StreamedDecoder(checkpoint, model, dtype, device)
    n_layers = observer.last_layer() + 1
    n_tokens = sum(len(row) for row in rows)
    total = n_tokens + sum(len(row) for row in passengers)
    with progress.task(title, n_layers * total, "tokens") as task:
        decoder.load_embedding()
        batches = _embed_all(decoder, rows, device, observed=True)
        batches += _embed_all(decoder, passengers, device, observed=False)
        decoder.drop_embedding()
        for index in range(n_layers):
            layer = decoder.load_layer(index)
            observer.attach(index, layer)
            if index == model.facts.mtp_layer:
                decoder.load_ends()
            for batch in batches:
                _run_layer(decoder, index, batch, observer, task)
            _check_losses(len(rows) + len(passengers), batches, index)
            observer.finish(index)
            if index != model.facts.mtp_layer:
                decoder.drop_layer(index)
    hits, tried = _count_mtp_hits(decoder, batches) if model.facts.has_mtp else (0, 0)
    n_left = sum(len(batch.lengths) for batch in batches if batch.observed)
    return SweepReport(len(rows), n_tokens, len(rows) - n_left, hits, tried)


def _count_mtp_hits(decoder: StreamedDecoder, batches: Sequence[_Batch]) -> tuple[int, int]:
    """Of the passengers' next-next tokens: predicted by the MTP block, and all."""
    counts = [
        count_hits(decoder.mtp_best(batch.hidden), batch.tokens, batch.lengths)
        for batch in batches
        if not batch.observed
    ]
    return sum(hits for hits, _ in counts), sum(tried for _, tried in counts)


def _group(rows: Sequence[Row], max_tokens: int) -> list[list[Row]]:
    """Rows by falling length, in groups of at most `max_tokens` padded tokens."""
    groups: list[list[Row]] = []
    for row in sorted(rows, key=len, reverse=True):
        # the first row of a group is its longest
        if groups and (len(groups[-1]) + 1) * len(groups[-1][0]) <= max_tokens:
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups


def _embed_all(
    decoder: StreamedDecoder, rows: Sequence[Row], device: torch.device, observed: bool
) -> list[_Batch]:
    groups = _group(rows, _BATCH_TOKENS[device.type])
    return [_embed(decoder, group, observed) for group in groups]


def _embed(decoder: StreamedDecoder, rows: list[Row], observed: bool) -> _Batch:
    lengths = torch.tensor([len(row) for row in rows])
    tokens = torch.zeros(len(rows), int(lengths.max()), dtype=torch.int64)
    for index, row in enumerate(rows):
        tokens[index, : len(row)] = torch.from_numpy(row)
    return _Batch(tokens, lengths, decoder.embed(tokens), observed)


def _run_layer(
    decoder: StreamedDecoder, index: int, batch: _Batch, observer: LayerObserver, task: Task
) -> None:
    """Move a batch through a layer; rows that are not finite are left out and it runs again."""
    n_tokens = int(batch.lengths.sum())
    is_mtp = index == decoder.mtp_layer
    while len(batch.lengths):
        real = batch.real_tokens(n_ahead=1 if is_mtp else 0)
        observer.real_tokens = real
        if is_mtp:
            output = decoder.run_mtp(batch.hidden, batch.tokens)
        else:
            output = decoder.run_layer(index, batch.hidden)
        finite = _finite_rows(output, real)
        if bool(finite.all()) and batch.observed:
            observer.commit()
        else:
            observer.discard()
        if bool(finite.all()):
            batch.hidden = output
            break
        batch.keep(finite)
    task.advance(n_tokens)


def _finite_rows(hidden: Tensor, real: Tensor | None) -> Tensor:
    """(B,) true where every real token of a row is finite."""
    finite = torch.isfinite(hidden).all(-1)  # (B, T)
    if real is not None:
        finite |= ~real.view_as(finite)
    return finite.all(-1).cpu()


def _check_losses(n_rows: int, batches: Sequence[_Batch], index: int) -> None:
    lost = n_rows - sum(len(batch.lengths) for batch in batches)
    if lost > MAX_BAD_ROWS * n_rows:
        raise ObservationError(
            f"layer {index}: {lost} of {n_rows} rows are NaN or infinite, expected at most "
            f"{MAX_BAD_ROWS:.0%}; the weights are damaged, or values overflow, which in bfloat16 "
            "--dtype float32 mends"
        )
