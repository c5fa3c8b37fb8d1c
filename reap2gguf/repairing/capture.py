"""What a repair learns of a layer: the inputs of its experts, their routes, and what is missing.

Each batch runs through the pruned layer. What enters its experts then runs through the original
block too, with all experts and their own routing: that sum is the target. A shared expert is common
to both, so only the routed sums are compared. Both are computed by the model's own code.

The rows wait in two spools as hidden states do: on the device, in host memory or on disk.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from reap2gguf.errors import UnsupportedModelError
from reap2gguf.observing.compute.crew import current_slice
from reap2gguf.observing.compute.experts import RoutedPairs, watch
from reap2gguf.repairing.features import RoutedRows

if TYPE_CHECKING:
    from reap2gguf.observing.batches import Batch
    from reap2gguf.observing.compute.experts import RealTokens
    from reap2gguf.observing.decoder import StreamedDecoder
    from reap2gguf.observing.spool import Span, Spool


class _Unseen:
    """Watches experts only so that they leave out the padding."""

    wants_norms = False
    wants_squares = False
    real_tokens: RealTokens | None = None

    def see(self, pairs: RoutedPairs) -> None:
        """Nothing is counted."""


class Tap:
    """Takes what goes into and comes out of the experts of a layer, of one batch at a time."""

    def __init__(
        self,
        experts: torch.nn.Module,
        block: torch.nn.Module | None = None,
        option: str = "--repair",
    ) -> None:
        """`block`: what routes to the experts, where `take_entering` is wanted.

        `option`: what the user asked for. Raises UnsupportedModelError for experts whose outputs
        are not linear in `down_proj`.
        """
        watch(experts, watcher := _Unseen())
        others = ("is_transposed", "has_bias", "has_post_expert_norm")
        if any(getattr(experts, name, False) for name in others):
            raise UnsupportedModelError(
                f"{type(experts).__name__}: {option} is not defined for experts with biases or a "
                "norm after them, or whose matrices transformers keeps transposed; leave it out"
            )
        self._watcher = watcher
        self._parts: dict[int, tuple[Tensor, ...]] = {}  # by the first position of a slice
        self._entering: dict[int, Tensor] = {}
        self._handles = [experts.register_forward_hook(self._keep, with_kwargs=True)]
        if block is not None:
            entering = block.register_forward_pre_hook(self._keep_entering, with_kwargs=True)
            self._handles.append(entering)

    def expect(self, real: RealTokens | None) -> None:
        """A batch is coming, of which these positions are tokens."""
        self._watcher.real_tokens = real

    def _keep_entering(self, module: Any, args: Any, kwargs: Any) -> None:
        self._entering[_first_position()] = next(iter((*args, *kwargs.values())))

    def _keep(self, module: Any, args: Any, kwargs: Any, output: Tensor) -> None:
        inputs = (*args, *kwargs.values())
        self._parts[_first_position()] = (*inputs[:3], output)

    def take_entering(self) -> Tensor:
        """What went into the block, (B, T, H)."""
        parts = [part for _, part in sorted(self._entering.items())]
        self._entering.clear()
        return torch.cat(parts)

    def take(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Inputs (N, L), chosen experts and gate weights (N, K), and the routed sum (N, L).

        L is H, or the width of a latent that the block makes for its experts.
        """
        parts = [part for _, part in sorted(self._parts.items())]
        self._parts.clear()
        inputs, index, gates, output = (torch.cat(one) for one in zip(*parts, strict=True))
        return inputs, index, gates, output

    def close(self) -> None:
        """Take nothing any more."""
        for handle in self._handles:
            handle.remove()


def _first_position() -> int:
    """The first position of the slice that this thread computes."""
    part = current_slice()
    return 0 if part is None else part.begin


@dataclass(frozen=True)
class _Entry:
    """Rows of which the inputs and errors are in the spools."""

    span: Span
    rows: RoutedRows  # without inputs and errors


@dataclass
class StoredRows:
    """Rows whose inputs and errors wait in spools."""

    inputs: Spool
    errors: Spool
    entries: list[_Entry] = field(default_factory=list)

    @property
    def n_rows(self) -> int:
        return sum(entry.span[1] - entry.span[0] for entry in self.entries)

    @property
    def target_square(self) -> float:
        return sum(entry.rows.target_square for entry in self.entries)

    def __iter__(self) -> Iterator[RoutedRows]:
        for entry, following in zip(self.entries, [*self.entries[1:], None], strict=True):
            ahead = None if following is None else following.span
            inputs, errors = (
                self.inputs.load(entry.span, ahead),
                self.errors.load(entry.span, ahead),
            )
            yield replace(entry.rows, inputs=inputs, errors=errors)
        self.flush()

    def flush(self) -> None:
        """Wait until everything stored can be loaded again."""
        self.inputs.flush()
        self.errors.flush()


@dataclass
class LayerRows:
    """The rows of a layer: those that it is fitted on, and those that are held out."""

    fitted: StoredRows
    held_out: StoredRows

    @classmethod
    def empty(cls, inputs: Spool, errors: Spool) -> LayerRows:
        """No rows yet; both kinds are in the same spools."""
        return cls(StoredRows(inputs, errors), StoredRows(inputs, errors))

    def add(self, kind: StoredRows, rows: RoutedRows, position: int) -> int:
        """Put rows into the spools at a position; the position after them."""
        span = position, position + len(rows)
        if len(rows):
            kind.inputs.store(span, rows.inputs)
            kind.errors.store(span, rows.errors)
            empty = rows.inputs.new_empty(0)
            kind.entries.append(_Entry(span, replace(rows, inputs=empty, errors=empty)))
        return span[1]


@contextmanager
def _tapped(layer: torch.nn.Module, path: str) -> Iterator[Tap]:
    block = layer.get_submodule(path.rpartition(".")[0])
    with closing(Tap(layer.get_submodule(path), block)) as tap:
        yield tap


@dataclass(frozen=True)
class Sides:
    """A layer of the pruned model and the original one, both with their weights."""

    index: int
    pruned: StreamedDecoder
    original: StreamedDecoder
    pruned_layer: torch.nn.Module
    original_layer: torch.nn.Module

    @property
    def path(self) -> str:
        """Where the experts are in both."""
        return self.pruned.model.experts_path(self.index)


@torch.inference_mode()
def capture(
    sides: Sides, batches: Sequence[Batch], waiting: Spool, inputs: Spool, errors: Spool
) -> LayerRows:
    """Run all batches through both sides; `waiting` has the hidden states that enter the layer.

    A row of values that are not finite is left out.
    """
    found, position, n_before = LayerRows.empty(inputs, errors), 0, 0
    n_kept = sides.pruned.model.facts.n_experts
    with ExitStack() as stack:
        pruned = stack.enter_context(_tapped(sides.pruned_layer, sides.path))
        original = stack.enter_context(_tapped(sides.original_layer, sides.path))
        for number, batch in enumerate(batches):
            following = batches[number + 1].span if number + 1 < len(batches) else None
            hidden = waiting.load(batch.span, following)
            values = _compared(sides, batch, hidden, pruned, original)
            flags = torch.tensor(split_rows(batch.lengths.tolist(), n_before))
            n_before += len(flags)
            for kind, wanted in ((found.fitted, ~flags), (found.held_out, flags)):
                rows = _chosen(batch, wanted.to(hidden.device), values, n_kept)
                position = found.add(kind, rows, position)
    waiting.flush()
    found.fitted.flush()
    return found


Compared = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def _compared(sides: Sides, batch: Batch, hidden: Tensor, pruned: Tap, original: Tap) -> Compared:
    """Inputs, routes and gates of the pruned model's experts, their sum, and the target."""
    shape = (*batch.tokens.shape, hidden.shape[-1])
    real = batch.real(hidden.device)
    pruned.expect(real)
    original.expect(real)
    sides.pruned.run_layer(sides.index, hidden.view(shape))
    inputs, index, gates, output = pruned.take()
    if path := sides.path.rpartition(".")[0]:
        block = sides.original_layer.get_submodule(path)
        entering = pruned.take_entering().view(shape)
        sides.original.by_rows(lambda rows: block(entering[rows]), entering)
    else:
        # the layer itself holds router and experts; its attention has the pruned layer's weights
        pruned.take_entering()
        sides.pruned.run_layer(sides.index, hidden.view(shape), sides.original_layer)
    original.take_entering()
    return inputs, index, gates, output, original.take()[3]


def _chosen(batch: Batch, wanted: Tensor, values: Compared, n_experts: int) -> RoutedRows:
    """The tokens of the wanted rows (B,), but of those with values that are not finite."""
    inputs, index, gates, output, target = values
    errors = target.float() - output.float()
    width = batch.tokens.shape[1]
    real = torch.arange(width)[None] < batch.lengths[:, None]  # (B, T)
    mask = real.to(wanted.device) & wanted[:, None]
    finite = (errors.isfinite().all(-1) & inputs.isfinite().all(-1)).view(-1, width)
    mask &= (finite | ~real.to(wanted.device)).all(dim=1, keepdim=True)
    places = mask.reshape(-1).nonzero().squeeze(1)
    rows = RoutedRows.of(
        inputs[places], index[places], gates[places], errors[places].to(inputs.dtype), n_experts
    )
    return replace(rows, target_square=float(target[places].double().square().sum()))


def split_rows(lengths: Sequence[int], first: int) -> list[bool]:
    """Which of a batch's rows are held out: every eighth of all, of which `first` came before."""
    return [(first + number) % 8 == 7 for number in range(len(lengths))]
