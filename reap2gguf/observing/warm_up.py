"""Compiles the kernels of a sweep before its first batch, while the first weights are read.

Triton compiles a kernel when it is called for the first time with arguments of a kind, and
flash-linear-attention then tries several variants of each. The compiled code is kept on disk
(`TRITON_CACHE_DIR`, by default `~/.triton/cache`), so it is made once per machine and version; but
the first time takes long, which is no speed from which the time left can be told.

So one layer of each kind runs on a batch of zeros, with weights of zero, and is observed as a real
one would be: whatever is compiled for it is compiled here. Memory: one more layer and the
activations of one batch, which is what the sweep takes anyway.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from reap2gguf.errors import ObservationError
from reap2gguf.observing.compute.compiling import variants_compiled_together
from reap2gguf.observing.compute.kernels import copy_if, finite_rows
from reap2gguf.progress import COMPILING, working_if_long

if TYPE_CHECKING:
    from collections.abc import Sequence

    from reap2gguf.observing.batches import Batch
    from reap2gguf.observing.decoder import StreamedDecoder
    from reap2gguf.observing.observer import LayerObserver
    from reap2gguf.progress import Progress


def warm_up(
    decoder: StreamedDecoder,
    observer: LayerObserver,
    layers: range,
    batches: Sequence[Batch],
    progress: Progress,
) -> None:
    """Run the first of `layers` of each kind on zeros, in the shape of the first batch.

    `observer` sees nothing of it: another of its class does. An error of torch, such as too little
    memory, is only a note, since kernels are compiled at their first use as well.
    """
    if not batches:
        return
    shape = (*batches[0].tokens.shape, decoder.model.facts.hidden_size)
    try:
        with (
            working_if_long(progress, COMPILING),
            variants_compiled_together(torch.get_num_threads()),
        ):
            for index in decoder.first_of_each_kind(layers):
                _try_layer(decoder, observer.unused(), index, shape)
            if decoder.device.type == "cuda":
                torch.cuda.synchronize(decoder.device)
    except (RuntimeError, ObservationError) as error:
        if decoder.device.type == "cuda":
            torch.cuda.empty_cache()
        reason = " ".join(str(error).split()).partition(". ")[0] or repr(error)
        progress.note(f"kernels could not be compiled before the first batch: {reason}")


@torch.inference_mode()
def _try_layer(
    decoder: StreamedDecoder, observer: LayerObserver, index: int, shape: tuple[int, int, int]
) -> None:
    with decoder.zeros_in(index) as layer:
        observer.attach(index, layer)
        try:
            hidden = torch.zeros(shape, dtype=decoder.dtype, device=decoder.device)
            output = decoder.run_layer(index, hidden)
            good = finite_rows(output).all()
            observer.settle(good)
            copy_if(good, output, hidden)
            observer.commit()
        finally:
            observer.detach()
