"""Typed, bounded reads from the header of a GGUF file that any program may have written."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from gguf import Keys

from reap2gguf.checkpoint.config import ConfigReader
from reap2gguf.errors import UnsupportedModelError
from reap2gguf.messages import shown

if TYPE_CHECKING:
    from reap2gguf.gguf_files.reader import GgufTensorInfo

_BLOCK = re.compile(r"blk\.(0|[1-9][0-9]{0,5})\.(.+)")


class GgufKeys:
    """The header of one GGUF file, asked under gguf-py's names of the keys.

    Each error names the file, the key and the value.
    """

    def __init__(
        self, metadata: Mapping[str, Any], tensors: Mapping[str, GgufTensorInfo], path: Path
    ) -> None:
        self.where = str(path)
        self.tensors = tensors
        self._read = ConfigReader(metadata, self.where)
        found = metadata.get(Keys.General.ARCHITECTURE)
        if not isinstance(found, str):
            raise UnsupportedModelError(
                f"{path}: {Keys.General.ARCHITECTURE} is {shown(found)}, expected the name of an "
                "architecture; is this the GGUF file of a model?"
            )
        self.arch = found

    def has(self, key: str) -> bool:
        """Whether the header has a key."""
        return self._value(key) is not None

    def integer(self, key: str, low: int, high: int, default: int | None = None) -> int:
        """A whole number within [low, high].

        Some programs write one per layer: those must be the same in all layers.
        """
        name, value = self._name(key), self._value(key)
        if isinstance(value, list) and value:
            if any(one != value[0] for one in value):
                raise UnsupportedModelError(
                    f"{self.where}: {name} is {shown(value)}, expected the same in every layer"
                )
            return self._read.with_values({name: value[0]}).integer(name, low=low, high=high)
        return self._read.integer(name, low=low, high=high, default=default)

    def number(self, key: str, low: float, high: float, default: float | None = None) -> float:
        """A number within [low, high], with the fewest digits that are the same in float32.

        Headers hold float32; the config that they were made from had 1e-06, not
        9.999999974752427e-07.
        """
        found = self._read.number(self._name(key), low=low, high=high, default=default)
        return float(str(np.float32(found)))

    def text(self, key: str, default: str) -> str:
        """A text, or `default` without the key."""
        value = self._value(key)
        if value is None:
            return default
        if not isinstance(value, str):
            raise UnsupportedModelError(
                f"{self.where}: {self._name(key)} is {shown(value)}, expected a text"
            )
        return value

    def boolean(self, key: str, default: bool) -> bool:
        """True or false."""
        return self._read.boolean(self._name(key), default=default)

    def integers(self, key: str, low: int, high: int, n_items: int) -> tuple[int, ...]:
        """A list of `n_items` whole numbers within [low, high]."""
        name = self._name(key)
        found = self._read.integers(name, low, high)
        if len(found) != n_items:
            raise UnsupportedModelError(
                f"{self.where}: {name} has {len(found)} values, expected {n_items}"
            )
        return found

    def flags(self, key: str, n_items: int) -> Sequence[bool] | None:
        """A list of at least `n_items` times true or false; None without the key."""
        value = self._value(key)
        if value is None:
            return None
        is_list = isinstance(value, list) and len(value) >= n_items
        if not is_list or any(one not in (0, 1) for one in value):
            raise UnsupportedModelError(
                f"{self.where}: {self._name(key)} is {shown(value)}, expected {n_items} times true "
                "or false"
            )
        return [bool(one) for one in value[:n_items]]

    def expect(self, key: str, *allowed: Any, why: str) -> None:
        """Refuse the file unless the key is absent or has one of these values."""
        self._read.expect(self._name(key), *allowed, why=why)

    def rows(self, name: str) -> int:
        """How many rows a tensor has: its slowest size."""
        if name not in self.tensors:
            raise UnsupportedModelError(
                f"{self.where}: tensor {name!r} is missing, expected a whole model of the "
                f"architecture {self.arch}"
            )
        return self.tensors[name].shape[0]

    def blocks_with(self, name: str) -> set[int]:
        """The numbers of the blocks that have a tensor of this name below `blk.N.`."""
        found = set()
        for tensor in self.tensors:
            match = _BLOCK.fullmatch(tensor)
            if match is not None and match[2] == name:
                found.add(int(match[1]))
        return found

    def _name(self, key: str) -> str:
        return key.format(arch=self.arch)

    def _value(self, key: str) -> Any:
        return self._read.values.get(self._name(key))


def block_of(name: str) -> int | None:
    """The number of the block that a GGUF tensor is in; None outside the blocks.

    >>> block_of("blk.7.attn_q.weight"), block_of("output.weight")
    (7, None)
    """
    match = _BLOCK.fullmatch(name)
    return None if match is None else int(match[1])
