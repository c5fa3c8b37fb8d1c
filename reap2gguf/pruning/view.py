"""The pruned model as a view of its source: nothing has to be written before it can be read.

Tensors of the pruned model are tensors of the source, under another number or with fewer entries on
their axis of experts. So three things are enough to read any byte of it: the source, what its
architecture says of its tensors, and which experts are kept.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from reap2gguf.checkpoint.safetensors_header import StoredTensor
from reap2gguf.checkpoint.weights import Weights
from reap2gguf.errors import UsageError
from reap2gguf.messages import shown
from reap2gguf.models.description import Dropped, Expert, ModelFacts, Router
from reap2gguf.models.table import describe

if TYPE_CHECKING:
    from reap2gguf.models.contract import MoeModel
    from reap2gguf.pruning.select import Kept


@dataclass(frozen=True, slots=True)
class _Origin:
    """The source's tensor that a pruned tensor is read from, and its entries on one axis."""

    name: str
    entries: tuple[int, ...] | None  # None: all of them, in their order
    axis: int = 0  # all axes before it have size 1


class PrunedView(Weights):
    """The weights that the pruned checkpoint will have, read from the source.

    It is named after views in databases and in numpy: it looks like the thing itself and has no
    bytes of its own. `model` would be wrong, since a MoeModel explains tensors and does not read
    them, and `checkpoint` would be wrong, since no folder has to exist.

    Names, shapes, order and config are those that `write_pruned` writes. `folder` is the source's,
    whose tokenizer and other small files the pruned checkpoint shares. Memory: one entry per
    tensor; a read holds what it returns. It is closed with its source.
    """

    def __init__(self, source: Weights, model: MoeModel, kept: Kept) -> None:
        """`model` describes the source; a block that it drops is not in the view.

        Raises UsageError if `kept` does not fit the model, UnknownTensorError for a source tensor
        that no rule explains, and CheckpointError as `describe` does.
        """
        self.n_kept = _check_kept(kept, model.facts)
        self.kept = kept
        self.folder = source.folder
        self.config = model.pruned_config(self.n_kept)
        self._source = source
        self.source_model = model
        self._origins: dict[str, _Origin] = {}
        tensors: dict[str, StoredTensor] = {}
        for name, origin in _origins(source, model, kept):
            stored = source.tensors[origin.name]
            shape = stored.shape
            if origin.entries is not None:
                axis = origin.axis
                shape = (*shape[:axis], len(origin.entries), *shape[axis + 1 :])
            tensors[name] = StoredTensor(name, stored.dtype, shape)
            self._origins[name] = origin
        self.tensors = tensors
        self.model = describe(self)

    @property
    def replaced(self) -> Collection[str]:
        """Names of tensors whose values are not the source's; see `repairing/view.py`."""
        return ()

    @property
    def identity(self) -> str:
        """A hash of what those tensors hold; "" where there are none."""
        return ""

    @property
    def source(self) -> Weights:
        """The weights that it is a view of."""
        return self._source

    def origin(self, name: str, entry: int = 0) -> tuple[str, int]:
        origin = self._origins[name]
        at = entry if origin.entries is None else origin.entries[entry]
        return self._source.origin(origin.name, at)

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


def _origins(source: Weights, model: MoeModel, kept: Kept) -> Iterator[tuple[str, _Origin]]:
    """Name and origin of every pruned tensor, in the source's order."""
    new_ids = {layer: {old: new for new, old in enumerate(ids)} for layer, ids in kept.items()}
    for name in source.tensors:
        role = model.role(name)
        if isinstance(role, Dropped):
            continue
        if isinstance(role, Expert) and role.expert is not None:
            if role.expert in new_ids[role.layer]:
                new_id = new_ids[role.layer][role.expert]
                yield model.renumbered(name, new_id), _Origin(name, None)
        elif isinstance(role, Expert | Router):
            axis = role.axis if isinstance(role, Router) else 0
            yield name, _Origin(name, tuple(kept[role.layer]), axis)
        else:
            yield name, _Origin(name, None)


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
