"""A pruned view with new weights: some of its tensors are read from the files of a work folder.

A repair gives the kept experts new `down_proj`, and a merge gives some of them new matrices.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from reap2gguf.checkpoint.weights import Weights
from reap2gguf.errors import CheckpointError
from reap2gguf.pruning.view import PrunedView

if TYPE_CHECKING:
    from reap2gguf.checkpoint.checkpoint import Checkpoint


class ReplacedView(PrunedView):
    """A pruned view some of whose tensors are new, from the files of a repair or a merge.

    Everything that reads a pruned view reads this one, with the same names, types and shapes.
    """

    _names: frozenset[str] = frozenset()  # while the view without them is made

    def __init__(
        self,
        pruned: PrunedView,
        replaced: Checkpoint,
        names: Collection[str] | None = None,
        identity: str = "",
    ) -> None:
        """`names`: the tensors of `replaced` that are taken; None: all of them.

        Raises CheckpointError if one is not a tensor of the view, in type and shape.
        """
        super().__init__(pruned.source, pruned.source_model, pruned.kept)
        self._names = frozenset(replaced.tensors if names is None else names)
        self._identity = identity
        for name in sorted(self._names):
            own, tensor = self.tensors.get(name), replaced.tensors.get(name)
            if (
                own is None
                or tensor is None
                or (own.dtype, own.shape)
                != (
                    tensor.dtype,
                    tensor.shape,
                )
            ):
                raise CheckpointError(
                    f"{replaced.shown}: tensor {name!r} is not in the pruned model, or has "
                    "another type or shape there; run the build again with --fresh"
                )
        self._other = replaced
        # no file has the blocks of new weights
        new = {name: replace(self.tensors[name], blocks={}) for name in self._names}
        self.tensors = {**self.tensors, **new}

    @property
    def replaced(self) -> Collection[str]:
        return self._names

    @property
    def identity(self) -> str:
        return self._identity

    def close(self) -> None:
        """Close the files of the new tensors."""
        self._other.close()

    def read_bytes(self, name: str, first: int, buffer: npt.NDArray[np.uint8]) -> None:
        if name in self._names:
            self._other.read_bytes(name, first, buffer)
        else:
            super().read_bytes(name, first, buffer)

    def expect_bytes(self, name: str, first: int, n_bytes: int) -> None:
        if name in self._names:
            self._other.expect_bytes(name, first, n_bytes)
        else:
            super().expect_bytes(name, first, n_bytes)

    def have_same_values(self, one: str, other: str) -> bool:
        if one in self._names or other in self._names:
            return Weights.have_same_values(self, one, other)
        return super().have_same_values(one, other)

    def fetch_ahead(self, names: Iterable[str]) -> None:
        super().fetch_ahead([name for name in names if name not in self._names])
