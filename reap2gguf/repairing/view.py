"""The repaired model as a view: a pruned view, some of whose tensors are read from elsewhere."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from reap2gguf.checkpoint.weights import Weights
from reap2gguf.errors import CheckpointError
from reap2gguf.pruning.view import PrunedView

if TYPE_CHECKING:
    from reap2gguf.checkpoint.checkpoint import Checkpoint


class RepairedView(PrunedView):
    """A pruned view with new `down_proj` tensors, from the files of a repair.

    Everything that reads a pruned view reads this one, with the same names, types and shapes.
    """

    def __init__(self, pruned: PrunedView, replaced: Checkpoint) -> None:
        """Raises CheckpointError if a new tensor is not one of the view's, in type and shape."""
        super().__init__(pruned.source, pruned.source_model, pruned.kept)
        for name, tensor in replaced.tensors.items():
            own = self.tensors.get(name)
            if own is None or (own.dtype, own.shape) != (tensor.dtype, tensor.shape):
                raise CheckpointError(
                    f"{replaced.folder}: tensor {name!r} is {tensor.dtype} {list(tensor.shape)}, "
                    "which is no tensor of the pruned model; run the build again with --fresh"
                )
        self._replaced = replaced

    @property
    def replaced(self) -> Mapping[str, object]:
        """The tensors that are not the source's, by name."""
        return self._replaced.tensors

    def close(self) -> None:
        """Close the files of the new tensors."""
        self._replaced.close()

    def read_bytes(self, name: str, first: int, buffer: npt.NDArray[np.uint8]) -> None:
        if name in self._replaced.tensors:
            self._replaced.read_bytes(name, first, buffer)
        else:
            super().read_bytes(name, first, buffer)

    def expect_bytes(self, name: str, first: int, n_bytes: int) -> None:
        if name in self._replaced.tensors:
            self._replaced.expect_bytes(name, first, n_bytes)
        else:
            super().expect_bytes(name, first, n_bytes)

    def have_same_values(self, one: str, other: str) -> bool:
        if one in self._replaced.tensors or other in self._replaced.tensors:
            return Weights.have_same_values(self, one, other)
        return super().have_same_values(one, other)

    def fetch_ahead(self, names: Iterable[str]) -> None:
        super().fetch_ahead([name for name in names if name not in self._replaced.tensors])
