"""A sweep under way: its batches, the spool in which they wait, and a layer at a time."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from reap2gguf.errors import ObservationError
from reap2gguf.machine import available_bytes
from reap2gguf.observing.batches import Batch, Row, padded_batches, settle_places
from reap2gguf.observing.budget import Budget, Need, fit, position_bytes, room_on
from reap2gguf.observing.compute.ranks import Ranks
from reap2gguf.observing.decoder import StreamedDecoder
from reap2gguf.observing.deltanet import deltanet_path, installed_version
from reap2gguf.observing.mtp import count_hits
from reap2gguf.observing.observer import LayerObserver
from reap2gguf.observing.spool import Spool, open_spool
from reap2gguf.observing.state import StateKeeper, SweepState
from reap2gguf.options import Resume
from reap2gguf.progress import Progress, Task

MAX_BAD_ROWS = 0.01


class SweepRun:
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
        self.first_layer = 0  # more than none where an interrupted sweep goes on
        self.budget: Budget
        self.spool: Spool | None = None
        self.keeper: StateKeeper

    @property
    def n_tokens(self) -> int:
        return sum(batch.n_tokens for batch in self.batches)

    def begin(
        self,
        rows: Sequence[Row],
        passengers: Sequence[Row],
        dtype: torch.dtype,
        memory: int | None,
        spool: str,
        folder: Path,
        resume: Resume | None = None,
    ) -> None:
        """Decide on batches and spool, and fill it: from a kept state, or with embedded rows."""
        need = self._need([*rows, *passengers], dtype)
        # the same in all processes: batches, and so sums, are those of one
        host = self.ranks.least(available_bytes() // self.ranks.size)
        room = self.ranks.least(room_on(self.device, host, memory, self.ranks.size))
        self.budget = fit(need, self.device.type, room, host, spool)
        most = self.budget.batch_tokens
        self.batches = self.ranks.share(padded_batches(rows, most, observed=True))
        self.batches += self.ranks.share(padded_batches(passengers, most, observed=False))
        self.n_rows = sum(len(batch.lengths) for batch in self.batches)
        width = self.decoder.model.facts.hidden_size
        self.keeper = StateKeeper(resume, self.ranks, self.progress.note)
        state = self.keeper.load(self.observer, width, dtype, most)
        if state is not None:
            self.batches, self.first_layer = state.batches, state.layer
        n_positions = settle_places(self.batches)
        self.spool = open_spool(self.budget.spool, (n_positions, width), dtype, self.device, folder)
        for line in self._first_lines(n_positions * need.hidden, dtype):
            self.progress.note(line)
        self.decoder.load_embedding()
        self._read_ahead(self.first_layer)
        self._fill(state, dtype)
        self.spool.flush()
        self.decoder.drop_embedding()

    @torch.inference_mode()
    def _fill(self, state: SweepState | None, dtype: torch.dtype) -> None:
        """Let the hidden states of every batch wait in the spool."""
        assert self.spool is not None
        for index, batch in enumerate(self.batches):
            if state is None:
                hidden = self.decoder.embed(batch.tokens).flatten(0, 1)
            else:
                self.decoder.record(batch.tokens)
                hidden = state.hidden(index, dtype).to(self.device)
            self.spool.store(batch.place, hidden)
        if state is not None:
            state.close()
            self.progress.note(f"going on from layer {state.layer} of {self.n_layers}")

    def _read_ahead(self, index: int) -> None:
        """Begin to read a layer, if there is room for two."""
        if not self.budget.ahead:
            return
        try:
            self.decoder.ask_layer(index)
        except torch.OutOfMemoryError:
            self.budget = replace(self.budget, ahead=False)
            self.progress.note("the GPU's memory is too little to read weights ahead")

    def _need(self, rows: Sequence[Row], dtype: torch.dtype) -> Need:
        model = self.decoder.model
        on_gpu = self.device.type == "cuda"
        reference_deltanet = self.decoder.has_deltanet and not (on_gpu and installed_version())
        return Need(
            layer=max(self.decoder.layer_bytes(index) for index in range(self.n_layers)),
            position=position_bytes(model, dtype, on_gpu, reference_deltanet),
            hidden=model.facts.hidden_size * dtype.itemsize,
            n_positions=-(-sum(map(len, rows)) // self.ranks.size),
            longest_row=max(map(len, rows), default=1),
            embedding=self.decoder.embedding_bytes(),
            has_mtp=self.decoder.mtp_layer is not None and self.decoder.mtp_layer < self.n_layers,
        )

    def _first_lines(self, spool_bytes: int, dtype: torch.dtype) -> Iterator[str]:
        """What the user should know of how it runs."""
        on_gpu = self.device.type == "cuda"
        name = torch.cuda.get_device_name(self.device) if on_gpu else "the CPU"
        several = f"{self.ranks.size} x " if self.ranks.size > 1 else ""
        where = {"device": name, "host": "host memory", "disk": "disk"}[self.budget.spool]
        ahead = "" if self.budget.ahead else "; memory is short: weights are not read ahead"
        yield (
            f"computing on {several}{name} in {str(dtype).removeprefix('torch.')}, batches of up "
            f"to {self.budget.batch_tokens:,} tokens; {spool_bytes / 2**30:.2f} GiB of hidden "
            f"states wait on {where}{ahead}"
        )
        if self.decoder.has_deltanet and on_gpu:
            yield deltanet_path()

    def layer(self, index: int, task: Task) -> None:
        """Move every batch through a layer."""
        layer = self.decoder.load_layer(index)
        if index + 1 < self.n_layers:
            self.decoder.fetch_layer(index + 1)
            self._read_ahead(index + 1)
        self.observer.attach(index, layer)
        if index == self.decoder.mtp_layer:
            self.decoder.load_ends()
        flags = self._all_batches(index, task)
        assert self.spool is not None
        self.spool.flush()
        # the one time that the host waits for the device; a process may have no batch at all
        finite = torch.cat(flags).cpu() if flags else torch.ones(0, dtype=torch.bool)
        if not bool(finite.all()):
            self._without_bad_rows(index, finite)
        self._check_losses(index)
        self.ranks.add(self.observer.sums())
        self.ranks.peak(self.observer.peaks())
        self.observer.finish(index)
        if index != self.decoder.mtp_layer:
            self.decoder.drop_layer(index)
        if index + 1 < self.n_layers:
            most = self.budget.batch_tokens
            self.keeper.keep(index + 1, self.batches, self.spool, self.observer, most)

    def _all_batches(self, index: int, task: Task) -> list[Tensor]:
        """Per batch, which rows (B,) came out finite; those that did not fit are halved."""
        assert self.spool is not None
        waiting, done, flags = deque(self.batches), [], []
        while waiting:
            batch = waiting.popleft()
            try:
                hidden = self.spool.load(batch.place, waiting[0].place if waiting else None)
                flags.append(self._through(index, batch, hidden))
            except torch.OutOfMemoryError as error:
                self.observer.discard()
                waiting.extendleft(reversed(self._halved(batch, error)))
                continue
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
        kept = torch.where(good, output.flatten(0, 1), hidden)
        del output
        self.observer.settle(good & batch.observed)
        self.spool.store(batch.place, kept)
        self.observer.commit()
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
                if not len(batch.lengths):
                    break
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
