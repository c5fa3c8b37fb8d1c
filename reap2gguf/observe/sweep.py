"""One sweep over a checkpoint: every row through every layer, a layer in memory at a time.

While a layer computes, the next one's weights are read; between layers the hidden states of all
rows wait in a spool. The host asks the device once a layer how it went, and otherwise runs ahead. A
multi-token-prediction block runs as one more layer, on positions that have a next token.
Passengers are rows that pass through unobserved: on them the MTP block's predictions are counted.

Memory: the embedding or two decoder layers, the activations of one batch, and the spool, which is
tokens x H x 2 or 4 bytes; `SweepOptions.memory` bounds the sum (`budget.py`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from reap2gguf.checkpoint.checkpoint import Checkpoint
from reap2gguf.errors import ObservationError, UsageError
from reap2gguf.models.contract import MoeModel
from reap2gguf.observe.batches import Batch, Row, padded_batches
from reap2gguf.observe.budget import Budget, Need, fit, hold_gpu_to, position_bytes
from reap2gguf.observe.decoder import StreamedDecoder
from reap2gguf.observe.mtp import count_hits
from reap2gguf.observe.observer import LayerObserver
from reap2gguf.observe.ranks import Ranks, join
from reap2gguf.observe.spool import DeviceSpool, FileSpool, PinnedSpool, Spool
from reap2gguf.progress import Progress, Task

MAX_BAD_ROWS = 0.01


@dataclass(frozen=True)
class SweepOptions:
    """Where and how a sweep computes."""

    device: str = "auto"  # auto, cpu or cuda
    dtype: str = "auto"  # auto, float32 or bfloat16
    n_threads: int | None = None
    memory: int | None = None  # bytes of the GPU, or resident ones without; None: what is free
    spool: str = "auto"  # auto, device, host or disk
    folder: Path = Path()  # where a spool on disk goes

    def resolve(self) -> tuple[torch.device, torch.dtype]:
        """The device and dtype: a GPU in bfloat16 where there is one, else float32 on the CPU.

        Raises UsageError if a GPU is asked for and there is none.
        """
        has_gpu = torch.cuda.is_available()
        if self.device == "cuda" and not has_gpu:
            raise UsageError("--device cuda: torch sees no CUDA device; `reap2gguf doctor` tells")
        if has_gpu and self.device != "cpu":
            device = torch.device("cuda", torch.cuda.current_device())
        else:
            device = torch.device("cpu")
        if self.dtype == "auto":
            return device, torch.bfloat16 if device.type == "cuda" else torch.float32
        return device, {"float32": torch.float32, "bfloat16": torch.bfloat16}[self.dtype]


@dataclass(frozen=True)
class SweepReport:
    """What a sweep ran over, in all processes together."""

    n_rows: int
    n_tokens: int
    n_dropped_rows: int
    mtp_hits: int = 0  # of the passengers' next-next tokens, those the MTP block predicted
    mtp_tokens: int = 0
    seconds_waited: float = 0.0  # of this process, for weights


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

    Raises ObservationError if more than 1 % of the rows are not finite, UsageError if the memory
    is too little, OutputError if a spool on disk finds no room.
    """
    ranks = join()
    device, dtype = options.resolve()
    if options.n_threads is not None:
        torch.set_num_threads(options.n_threads)
    hold_gpu_to(device, options.memory)
    observer.use(device)
    decoder = StreamedDecoder(checkpoint, model, dtype, device)
    run = _Run(decoder, observer, ranks, progress, device)
    try:
        run.begin(ranks.share(rows), ranks.share(passengers), options, dtype)
        with progress.task(title, run.n_layers * run.n_tokens, "tokens") as task:
            for index in range(run.n_layers):
                run.layer(index, task)
            hits, tried = run.count_mtp_hits() if model.facts.has_mtp else (0, 0)
    finally:
        run.close()
    n_left = sum(len(batch.lengths) for batch in run.batches if batch.observed)
    n_left, hits, tried = ranks.total([n_left, hits, tried])
    n_tokens = sum(len(row) for row in rows)
    waited = decoder.loader.seconds_waited
    return SweepReport(len(rows), n_tokens, len(rows) - n_left, hits, tried, waited)


class _Run:
    """A sweep under way: its batches, and the spool in which they wait."""

    def __init__(
        self,
        decoder: StreamedDecoder,
        observer: LayerObserver,
        ranks: Ranks,
        progress: Progress,
        device: torch.device,
    ) -> None:
        self.decoder = decoder
        self.observer = observer
        self.ranks = ranks
        self.progress = progress
        self.device = device
        self.n_layers = observer.last_layer() + 1
        self.batches: list[Batch] = []
        self.n_rows = 0
        self.budget: Budget
        self.spool: Spool | None = None

    @property
    def n_tokens(self) -> int:
        return sum(batch.n_tokens for batch in self.batches)

    def begin(
        self,
        rows: Sequence[Row],
        passengers: Sequence[Row],
        options: SweepOptions,
        dtype: torch.dtype,
    ) -> None:
        """Decide on batches and spool, and embed every row while the first layer is read."""
        self.n_rows = len(rows) + len(passengers)
        width = self.decoder.model.facts.hidden_size
        everyone = [*rows, *passengers]
        longest = max((len(row) for row in everyone), default=1)
        need = Need(
            layer=max(self.decoder.layer_bytes(index) for index in range(self.n_layers)),
            position=position_bytes(self.decoder.model, dtype, self.device.type == "cuda"),
            hidden=width * dtype.itemsize,
            n_positions=sum(map(len, everyone)),
            longest_row=longest,
        )
        self.budget = fit(need, self.device, options.memory, options.spool)
        most = self.budget.batch_tokens
        self.batches = padded_batches(rows, most, 0, observed=True)
        start = self.batches[-1].place[1] if self.batches else 0
        self.batches += padded_batches(passengers, most, start, observed=False)
        n_positions = self.batches[-1].place[1] if self.batches else 0
        self.spool = _spool(self.budget, (n_positions, width), dtype, self.device, options.folder)
        self.decoder.load_embedding()
        if self.budget.ahead:
            self.decoder.ask_layer(0)
        with torch.inference_mode():
            for batch in self.batches:
                self.spool.store(batch.place, self.decoder.embed(batch.tokens).flatten(0, 1))
        self.spool.flush()
        self.decoder.drop_embedding()

    def layer(self, index: int, task: Task) -> None:
        """Move every batch through a layer."""
        layer = self.decoder.load_layer(index)
        if self.budget.ahead and index + 1 < self.n_layers:
            self.decoder.ask_layer(index + 1)
        self.observer.attach(index, layer)
        if index == self.decoder.mtp_layer:
            self.decoder.load_ends()
        flags = self._all_batches(index, task)
        assert self.spool is not None
        self.spool.flush()
        finite = torch.cat(flags).cpu()  # the one time that the host waits for the device
        if not bool(finite.all()):
            self._without_bad_rows(index, finite)
        self._check_losses(index)
        self.ranks.add(self.observer.sums())
        self.ranks.peak(self.observer.peaks())
        self.observer.finish(index)
        if index != self.decoder.mtp_layer:
            self.decoder.drop_layer(index)

    def _all_batches(self, index: int, task: Task) -> list[Tensor]:
        """Per batch, which rows (B,) came out finite; those that did not fit are halved."""
        assert self.spool is not None
        waiting, done, flags = deque(self.batches), [], []
        while waiting:
            batch = waiting.popleft()
            hidden = self.spool.load(batch.place, waiting[0].place if waiting else None)
            try:
                flags.append(self._through(index, batch, hidden))
            except torch.OutOfMemoryError as error:
                self.observer.discard()
                waiting.extendleft(reversed(self._halved(batch, error)))
                continue
            finally:
                del hidden
            done.append(batch)
            task.advance(batch.n_tokens)
        self.batches = done
        return flags

    @torch.inference_mode()
    def _through(self, index: int, batch: Batch, hidden: Tensor) -> Tensor:
        """One batch through one layer, into the spool; which rows (B,) are finite.

        If any row is not, nothing is counted and the spool keeps what went in.
        """
        assert self.spool is not None
        is_mtp = index == self.decoder.mtp_layer
        shape = (*batch.tokens.shape, hidden.shape[-1])
        real = batch.real(self.device, n_ahead=1 if is_mtp else 0)
        self.observer.real_tokens = real
        if is_mtp:
            output = self.decoder.run_mtp(hidden.view(shape), batch.tokens)
        else:
            output = self.decoder.run_layer(index, hidden.view(shape))
        finite = torch.isfinite(output).all(-1)  # (B, T)
        if real is not None:
            finite |= ~real.mask.view_as(finite)
        rows = finite.all(-1)
        good = rows.all()
        self.observer.settle(good & batch.observed)
        self.spool.store(batch.place, torch.where(good, output.flatten(0, 1), hidden))
        return rows

    @torch.inference_mode()
    def _without_bad_rows(self, index: int, finite: Tensor) -> None:
        """Run batches again that had rows which are not finite, without these."""
        assert self.spool is not None
        first = 0
        for batch in self.batches:
            rows = finite[first : first + len(batch.lengths)]
            first += len(rows)
            while not bool(rows.all()):
                hidden = self.spool.load(batch.place).view(*batch.tokens.shape, -1)
                hidden = hidden[rows.to(hidden.device)].flatten(0, 1)
                batch.keep(rows)
                self.spool.store(batch.place, hidden)
                rows = self._through(index, batch, hidden).cpu()
                self.spool.flush()
        self.batches = [batch for batch in self.batches if len(batch.lengths)]

    def _halved(self, batch: Batch, error: torch.OutOfMemoryError) -> tuple[Batch, Batch]:
        if len(batch.lengths) == 1:
            raise ObservationError(
                f"the GPU's memory is too little for one row of {batch.tokens.numel()} tokens; "
                "pass a smaller --max-length, or --device cpu"
            ) from error
        torch.cuda.empty_cache()
        self.progress.note(
            f"the GPU's memory was too little for a batch of {batch.tokens.numel():,} tokens; it "
            "is halved"
        )
        return batch.halves()

    def _check_losses(self, index: int) -> None:
        n_left = sum(len(batch.lengths) for batch in self.batches)
        n_rows, lost = self.ranks.total([self.n_rows, self.n_rows - n_left])
        if lost > MAX_BAD_ROWS * n_rows:
            raise ObservationError(
                f"layer {index}: {lost} of {n_rows} rows are NaN or infinite, expected at most "
                f"{MAX_BAD_ROWS:.0%}; the weights are damaged, or values overflow, which in "
                "bfloat16 --dtype float32 mends"
            )

    def count_mtp_hits(self) -> tuple[int, int]:
        """Of the passengers' next-next tokens: predicted by the MTP block, and all."""
        assert self.spool is not None
        hits = tried = 0
        for batch in self.batches:
            if batch.observed:
                continue
            hidden = self.spool.load(batch.place).view(*batch.tokens.shape, -1)
            found = count_hits(self.decoder.mtp_best(hidden), batch.tokens, batch.lengths)
            hits, tried = hits + found[0], tried + found[1]
        return hits, tried

    def close(self) -> None:
        self.decoder.close()
        if self.spool is not None:
            self.spool.close()


def _spool(
    budget: Budget, shape: tuple[int, int], dtype: torch.dtype, device: torch.device, folder: Path
) -> Spool:
    if budget.spool == "device":
        return DeviceSpool(*shape, dtype, device)
    if budget.spool == "host":
        return PinnedSpool(*shape, dtype, device)
    return FileSpool(*shape, dtype, device, folder)
