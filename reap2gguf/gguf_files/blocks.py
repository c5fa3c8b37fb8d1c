"""Tensors as a GGUF file has them: blocks of rows, in whatever type."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import numpy as np
    import numpy.typing as npt

    from reap2gguf.gguf_files.reader import GgufTensorInfo


class Blocks(Protocol):
    """Those of a file's header, some of their experts, or made when they are read."""

    @property
    def path(self) -> Path:
        """What errors name."""

    @property
    def tensors(self) -> Mapping[str, GgufTensorInfo]:
        """All of them, by name."""

    def read(self, name: str, first: int = 0, last: int | None = None) -> npt.NDArray[np.uint8]:
        """Rows [first, last) of one tensor, as bytes (n_rows, row_bytes)."""
