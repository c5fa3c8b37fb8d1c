"""One pass of all rows through a layer of the source: its sums, scores and sampled inputs.

Each batch runs through the layer by the model's own code. What enters the experts then goes to the
sums, for which every expert computes every token. A sample of these inputs is kept, on which
neurons are compared: every m-th token of each row, at most SAMPLES in all.

A batch in which a row's values are not finite counts nothing; the sweep drops such rows after it.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from reap2gguf.errors import ObservationError
from reap2gguf.merging.room import SAMPLES
from reap2gguf.merging.statistics import Entering, Sums
from reap2gguf.observing.compute.kernels import finite_rows
from reap2gguf.observing.saliency import SaliencyObserver
from reap2gguf.repairing.capture import Tap
from reap2gguf.repairing.features import ModuleExperts

if TYPE_CHECKING:
    from reap2gguf.artifacts.observations import LayerObservation
    from reap2gguf.observing.batches import Batch
    from reap2gguf.observing.decoder import StreamedDecoder
    from reap2gguf.observing.spool import Spool
    from reap2gguf.repairing.features import Map


@dataclass
class Captured:
    """What a layer's experts did."""

    experts: ModuleExperts
    seen: LayerObservation  # of the routed tokens
    n_tokens: int
    samples: list[Tensor] = field(default_factory=list)  # inputs (s, H)


@torch.inference_mode()
def capture(
    decoder: StreamedDecoder,
    index: int,
    module: torch.nn.Module,
    batches: Sequence[Batch],
    waiting: Spool,
    sums: Sums,
    each: Map,
    option: str,
) -> Captured:
    """Run all batches through layer `index`, a module; their hidden states are in `waiting`.

    Raises ObservationError if no batch counts.
    """
    path = decoder.model.experts_path(index)
    experts = ModuleExperts(module.get_submodule(path))
    total = sum(batch.n_tokens for batch in batches)
    found, every = Captured(experts, None, 0), max(1, -(-total // SAMPLES))  # type: ignore[arg-type]
    observer = SaliencyObserver(decoder.model)
    observer.use(decoder.device)
    block = module.get_submodule(path.rpartition(".")[0])
    with closing(Tap(experts.module, block, option)) as tap:
        observer.attach(index, module)
        for number, batch in enumerate(batches):
            following = batches[number + 1].span if number + 1 < len(batches) else None
            hidden = waiting.load(batch.span, following)
            if not _runs(decoder, index, batch, hidden, observer):
                tap.take_entering()
                tap.take()
                continue
            entering = _real(batch, tap.take_entering().flatten(0, 1), *tap.take()[:2])
            sums.add(entering, experts, each)
            found.samples.append(entering.inputs[_sampled(batch, every, decoder.device)])
            found.n_tokens += len(entering.inputs)
    waiting.flush()
    if not found.n_tokens:
        raise ObservationError(f"no rows are left; {decoder.why_not_finite(index)}")
    sums_of_layer = [one.cpu() for one in observer.sums()]
    observer.finish(index, sums_of_layer, [one.cpu() for one in observer.peaks()])
    found.seen = observer.layers[index]
    return found


def _runs(
    decoder: StreamedDecoder, index: int, batch: Batch, hidden: Tensor, observer: SaliencyObserver
) -> bool:
    """Run a batch through the layer and count it; whether all of its rows are finite."""
    real = batch.real(decoder.device)
    observer.real_tokens = real
    output = decoder.run_layer(index, hidden.view(*batch.tokens.shape, hidden.shape[-1]))
    finite = finite_rows(output)
    if real is not None:
        finite |= ~real.mask.view_as(finite)
    good = finite.all()
    observer.settle(good)
    observer.commit()
    return bool(good)


def _real(batch: Batch, routed: Tensor, inputs: Tensor, index: Tensor) -> Entering:
    real = batch.real(inputs.device)
    if real is None:
        return Entering(routed, inputs, index)
    return Entering(*(one[real.positions] for one in (routed, inputs, index)))


def _sampled(batch: Batch, every: int, device: torch.device) -> Tensor:
    """Which of a batch's tokens are sampled, by their places in their rows."""
    places = torch.arange(batch.tokens.shape[1]).expand(batch.tokens.shape)
    inside = places < batch.lengths[:, None]
    return (places[inside] % every == 0).to(device)
