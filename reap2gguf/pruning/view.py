"""The pruned model as a view of its source: nothing has to be written before it can be read.

Tensors of the pruned model are tensors of the source, under another number or with fewer entries on
their axis of experts. So three things are enough to read any byte of it: the source, what its
architecture says of its tensors, and which experts are kept.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from reap2gguf.checkpoint.safetensors_header import StoredTensor
from reap2gguf.checkpoint.weights import Weights
from reap2gguf.errors import UnsupportedModelError, UsageError
from reap2gguf.gguf_source.slices import SlicedBlocks, slices_of
from reap2gguf.messages import shown
from reap2gguf.models.description import Dropped, Expert, ModelFacts, Router
from reap2gguf.pruning.quantization import pruned_quantization

if TYPE_CHECKING:
    from pathlib import Path

    from reap2gguf.gguf_files.blocks import Blocks
    from reap2gguf.gguf_files.reader import GgufHeader
    from reap2gguf.models.contract import MoeModel
    from reap2gguf.pruning.select import Kept


@dataclass(frozen=True, slots=True)
class _Origin:
    """The source's tensor that a pruned tensor is read from, and its entries on one axis."""

    name: str
    entries: tuple[int, ...] | None  # None: all of them, in their order
    axis: int = 0  # all axes before it have size 1


class _Slices(Weights):
    """Tensors that are tensors of a source under another name, or some of their entries."""

    def __init__(self, source: Weights, origins: Mapping[str, _Origin]) -> None:
        self.folder = source.folder
        self._source = source
        self._origins = origins
        self.tensors = {
            name: StoredTensor(
                name,
                stored.dtype,
                _shape(stored.shape, origin),
                coded=stored.coded,
                blocks=stored.blocks,
            )
            for name, origin in origins.items()
            for stored in (source.tensors[origin.name],)
        }

    @property
    def source(self) -> Weights:
        """The weights that it is a view of."""
        return self._source

    def origin(self, name: str, entry: int = 0) -> tuple[str, int]:
        origin = self._origins[name]
        at = entry if origin.entries is None else origin.entries[entry]
        return self._source.origin(origin.name, at)

    @property
    def shown(self) -> Path:
        return self._source.shown

    def shown_name(self, name: str, entry: int = 0) -> str:
        origin = self._origins[name]
        at = entry if origin.entries is None else origin.entries[entry]
        return self._source.shown_name(origin.name, at)

    @property
    def gguf(self) -> GgufHeader | None:
        return self._source.gguf

    def kind(self, name: str) -> str:
        return self._source.kind(self._origins[name].name)

    def read_bytes(self, name: str, first: int, buffer: npt.NDArray[np.uint8]) -> None:
        self._check_range(name, first, buffer.nbytes)
        source_name, done = self._origins[name].name, 0
        for source_byte, n_bytes in self._source_runs(name, first, buffer.nbytes):
            self._source.read_bytes(source_name, source_byte, buffer[done : done + n_bytes])
            done += n_bytes

    def expect_bytes(self, name: str, first: int, n_bytes: int) -> None:
        self._check_range(name, first, n_bytes)
        source_name = self._origins[name].name
        for source_byte, count in self._source_runs(name, first, n_bytes):
            self._source.expect_bytes(source_name, source_byte, count)

    def have_same_values(self, one: str, other: str) -> bool:
        origins = [self._origins[name] for name in (one, other)]
        if any(origin.entries is not None for origin in origins):
            return super().have_same_values(one, other)
        return self._source.have_same_values(*(origin.name for origin in origins))

    def fetch_ahead(self, names: Iterable[str]) -> None:
        self._source.fetch_ahead({self._origins[name].name for name in names})

    def without_fetching(self) -> AbstractContextManager[None]:
        return self._source.without_fetching()

    def _source_runs(self, name: str, first: int, n_bytes: int) -> Iterator[tuple[int, int]]:
        """First byte and length, in the source's tensor, of what a byte range is read from.

        Entries that are neighbours in the source are one run.
        """
        entries = self._origins[name].entries
        if entries is None:
            yield first, n_bytes
            return
        entry_bytes = self.tensors[name].n_bytes // len(entries)
        end = first + n_bytes
        while first < end:
            entry, inside = divmod(first, entry_bytes)
            after = entry + 1  # the first entry behind the run
            while after * entry_bytes < end and entries[after] == entries[after - 1] + 1:
                after += 1
            run = min(end, after * entry_bytes) - first
            yield entries[entry] * entry_bytes + inside, run
            first += run


class PrunedView(_Slices):
    """The weights that the pruned checkpoint will have, read from the source.

    It is named after views in databases and in numpy: it looks like the thing itself and has no
    bytes of its own. `model` would be wrong, since a MoeModel explains tensors and does not read
    them, and `checkpoint` would be wrong, since no folder has to exist.

    Names, shapes, order and config are those of the checkpoint that `write_pruned` writes, as it is
    opened; `stored` has those of its files, where they are others. `folder` is the source's,
    whose tokenizer and other small files the pruned checkpoint shares. Memory: one entry per
    tensor; a read holds what it returns. It is closed with its source.
    """

    def __init__(self, source: Weights, model: MoeModel, kept: Kept) -> None:
        """`model` describes the source; a block that it drops is not in the view.

        Raises UsageError if `kept` does not fit the model, UnknownTensorError for a source tensor
        that no rule explains, UnsupportedModelError if what is stored cannot be sliced, and
        CheckpointError as `MoeModel.of` does.
        """
        self.n_kept = _check_kept(kept, model.facts)
        self.kept = kept
        self.source_model = model
        found = {one.name: one.origin for one in _sliced(source, source, model, kept)}
        super().__init__(source, found)
        self.config = model.pruned_config(self.n_kept)
        self._parts: dict[str, tuple[str, ...]] = {}
        self._weight_names: dict[str, str] = {}
        self._files = None if source.stored is source else self._sliced_files(model)
        self.model = type(model).of(self)  # pruning keeps the architecture

    @property
    def replaced(self) -> Collection[str]:
        """Names of tensors whose values are not the source's; see `pruning/replaced.py`."""
        return ()

    @property
    def identity(self) -> str:
        """A hash of what those tensors hold; "" where there are none."""
        return ""

    @property
    def stored(self) -> Weights:
        if self._files is None:
            return self
        if self.replaced:
            raise UnsupportedModelError(
                f"{self.shown}: the weights are quantized, and new ones cannot be stored among "
                "them; pass --dequantize bf16"
            )
        return self._files

    @cached_property
    def blocks(self) -> Blocks | None:
        source = self._source.blocks
        return None if source is None else SlicedBlocks(source, slices_of(self._source, self))

    @cached_property
    def n_bytes(self) -> int:
        if self.blocks is None:
            return super().n_bytes
        return sum(info.n_bytes for info in self.blocks.tensors.values())

    def parts(self, name: str) -> tuple[str, ...]:
        return self._parts.get(name, (name,))

    def weight_name(self, part: str) -> str:
        return self._weight_names.get(part, part)

    def _sliced_files(self, model: MoeModel) -> Weights:
        """What the files will hold: parts of quantized weights, sliced as they are stored."""
        stored = self._source.stored
        origins: dict[str, _Origin] = {}
        for one in _sliced(stored, self._source, model, self.kept):
            origins[one.name] = one.origin
            self._weight_names[one.name] = one.weight
            self._parts[one.weight] = (*self._parts.get(one.weight, ()), one.name)
        found = _Slices(stored, origins)
        found.config = pruned_quantization(self.config, stored.config, model, self.kept)
        return found


def _shape(shape: tuple[int, ...], origin: _Origin) -> tuple[int, ...]:
    """A tensor's shape with the entries that remain."""
    if origin.entries is None:
        return shape
    return (*shape[: origin.axis], len(origin.entries), *shape[origin.axis + 1 :])


@dataclass(frozen=True, slots=True)
class _Sliced:
    """A pruned tensor, or a part of one."""

    name: str
    origin: _Origin
    weight: str  # the pruned tensor that it is, or is a part of


def _sliced(stored: Weights, source: Weights, model: MoeModel, kept: Kept) -> Iterator[_Sliced]:
    """Every pruned tensor of `stored`, in its order.

    `stored` is the source, or the source as its files have it: there, each part of a quantized
    weight is treated as the weight is.
    """
    new_ids = {layer: {old: new for new, old in enumerate(ids)} for layer, ids in kept.items()}
    for name in stored.tensors:
        weight = source.weight_name(name)
        role = model.role(weight)
        if isinstance(role, Dropped):
            continue
        if isinstance(role, Expert) and role.expert is not None:
            new_id = new_ids[role.layer].get(role.expert)
            if new_id is not None:
                new_name, new_weight = (model.renumbered(one, new_id) for one in (name, weight))
                yield _Sliced(new_name, _Origin(name, None), new_weight)
            continue
        origin = _Origin(name, None)
        if isinstance(role, Expert | Router):
            axis = role.axis if isinstance(role, Router) else 0
            is_part = stored is not source and len(source.parts(weight)) > 1
            if is_part and isinstance(role, Router):
                raise UnsupportedModelError(
                    f"{source.shown}: the router {weight!r} is quantized, so its rows cannot be "
                    "taken out of what is stored; pass --dequantize bf16"
                )
            if not is_part or stored.tensors[name].shape[:1] == (model.facts.n_experts,):
                origin = _Origin(name, tuple(kept[role.layer]), axis)
            # else it is one scale of all experts
        yield _Sliced(name, origin, weight)


def _check_kept(kept: Kept, facts: ModelFacts) -> int:
    """The number of experts that every layer keeps; UsageError if the map is not of this model."""
    if kept.keys() != set(facts.moe_layers):
        raise UsageError(
            f"the kept experts are of layers {shown(sorted(kept))}, expected the model's MoE "
            f"layers {shown(list(facts.moe_layers))}"
        )
    count = len(kept[facts.moe_layers[0]])
    for layer, ids in kept.items():
        if len(ids) != count or not ids:
            raise UsageError(
                f"layer {layer} keeps {len(ids)} experts, expected {max(count, 1)} as in the first "
                "MoE layer"
            )
        if list(ids) != sorted(set(ids)) or ids[0] < 0 or ids[-1] >= facts.n_experts:
            raise UsageError(
                f"layer {layer} keeps the experts {shown(list(ids))}, expected ascending numbers "
                f"from 0 to {facts.n_experts - 1}"
            )
    return count
