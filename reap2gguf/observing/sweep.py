"""One sweep over a checkpoint: every row through every layer, a layer in memory at a time.

While a layer computes, the next one's weights are read; between layers the hidden states of all
rows wait in a spool. The host asks the device once a layer how it went, and otherwise runs ahead. A
multi-token-prediction block runs as one more layer, on positions that have a next token.
Passengers are rows that pass through unobserved: on them the MTP block's predictions are counted.

Memory: the embedding or two decoder layers, the activations of one batch, and the spool, which is
tokens x H x 2 or 4 bytes; `SweepOptions.memory` bounds the sum (`budget.py`).

Bits: on one kind of machine and device the same rows, weights and dtype give the same sums, bit for
bit, whatever the number of threads (`crew.py`) and wherever hidden states wait. They may differ in
their last bits on another kind of processor or GPU, with other versions of torch, with another
number of processes, and where memory is so short that batches are smaller.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from reap2gguf.checkpoint.weights import Weights
from reap2gguf.errors import ObservationError, UsageError
from reap2gguf.machine import available_threads
from reap2gguf.models.contract import MoeModel
from reap2gguf.observing.batches import Row
from reap2gguf.observing.budget import hold_gpu_to
from reap2gguf.observing.compute.ranks import join, meet_on
from reap2gguf.observing.decoder import StreamedDecoder
from reap2gguf.observing.observer import LayerObserver
from reap2gguf.observing.run import SweepRun
from reap2gguf.options import ComputeOptions, Resume
from reap2gguf.progress import Progress


@dataclass(frozen=True)
class SweepOptions:
    """Where and how a sweep computes."""

    device: str = "auto"  # auto, cpu or cuda
    dtype: str = "auto"  # auto, float32 or bfloat16
    n_threads: int | None = None
    memory: int | None = None  # bytes of the GPU, or resident ones without; None: what is free
    spool: str = "auto"  # auto, device, host or disk
    folder: Path = Path()  # where a spool on disk goes
    resume: Resume | None = None  # where to keep what is done between layers

    @classmethod
    def of(cls, compute: ComputeOptions) -> SweepOptions:
        return cls(
            compute.device,
            compute.dtype,
            compute.threads,
            compute.memory,
            compute.spool,
            compute.scratch,
            compute.resume,
        )

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
    seconds_waited: float = field(default=0.0, compare=False)  # of this process, for weights


def sweep(
    checkpoint: Weights,
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
    is too little, OutputError if a spool on disk finds no room, PeerError if another process ended.
    """
    ranks = join()
    device, dtype = options.resolve()
    n_threads = max(1, (options.n_threads or available_threads()) // ranks.size)
    if device.type == "cuda":
        torch.set_num_threads(n_threads)  # on a CPU the decoder's crew has them
    meet_on(ranks, device)
    hold_gpu_to(device, options.memory)
    observer.use(device)
    decoder = StreamedDecoder(checkpoint, model, dtype, device, n_threads)
    run = SweepRun(decoder, observer, ranks, progress, device)
    try:
        run.begin(
            rows, passengers, dtype, options.memory, options.spool, options.folder, options.resume
        )
        with progress.task(title, run.n_layers * run.n_tokens, "tokens") as task:
            task.advance(run.first_layer * run.n_tokens)
            for index in range(run.first_layer, run.n_layers):
                run.layer(index, task)
            hits, tried = run.count_mtp_hits() if model.facts.has_mtp else (0, 0)
    except torch.OutOfMemoryError as error:
        raise ObservationError(
            "the GPU's memory is too little for the layers and hidden states of this sweep; pass "
            "--spool host, a smaller --max-length, or --device cpu"
        ) from error
    finally:
        run.close()
    n_left = sum(len(batch.lengths) for batch in run.batches if batch.observed)
    n_left, hits, tried = ranks.total([n_left, hits, tried])
    n_tokens = sum(len(row) for row in rows)
    waited = decoder.loader.seconds_waited
    progress.note(f"{title}: {waited:.1f} s spent waiting for weights")
    return SweepReport(len(rows), n_tokens, len(rows) - n_left, hits, tried, waited)
