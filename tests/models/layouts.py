"""A tiny checkpoint of every architecture in the table, in every layout that it is stored in.

A file of tests/families has, of one family: `LAYOUTS` by the name that config.json has in
`architectures`, each a factory of a checkpoint, the published layout first; `FIELDS`, what is read,
refused and carried of transformers' config classes; `CONFIGS`, strategies that draw configs; and,
where it has any, `DIFFERENCES` from the header that llama.cpp's converter writes, and `PUBLISHED`,
by architecture, further layouts for the tests that take the first one, and `RECORDED`, further ones
of which only the converter's bytes and keys are compared.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import torch

from reap2gguf.checkpoint.safetensors_header import StoredTensor
from reap2gguf.models.contract import MoeModel
from reap2gguf.models.table import ARCHITECTURES

DTYPES = {
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float32: "F32",
    torch.uint8: "U8",
    torch.float8_e4m3fn: "F8_E4M3",
}


FAMILIES = Path(__file__).resolve().parent.parent / "families"


class Tiny(Protocol):
    """A factory of tests/tiny.py: hashable, and the same checkpoint every time."""

    def config(self) -> dict[str, Any]: ...
    def tensors(self) -> dict[str, torch.Tensor]: ...
    def write(self, folder: Any) -> Any: ...


def every_family() -> list[Any]:
    """The files of tests/families, in the order of their names."""
    names = sorted(file.stem for file in FAMILIES.glob("*.py"))
    return [import_module(f"tests.families.{name}") for name in names]


# By architecture. The first of each is the published layout.
LAYOUTS: dict[str, dict[str, Any]] = {
    architecture: layouts
    for family in every_family()
    for architecture, layouts in family.LAYOUTS.items()
}


@dataclass(frozen=True)
class Case:
    """One layout of one architecture, with its MTP block or without."""

    architecture: str
    layout: str
    keep_mtp: bool = True

    def __str__(self) -> str:
        return f"{self.architecture}, {self.layout}{'' if self.keep_mtp else ', MTP dropped'}"

    @property
    def record(self) -> str:
        """The name of what is recorded of it: an architecture's first layout has its name."""
        is_first = self.layout == next(iter(LAYOUTS[self.architecture]))
        return self.architecture if is_first else f"{self.architecture}-{self.layout}"

    @property
    def tiny(self) -> Any:
        return LAYOUTS[self.architecture][self.layout]

    @property
    def model(self) -> MoeModel:
        return _model(self)

    @property
    def stored(self) -> Mapping[str, StoredTensor]:
        return stored_of(tensors_of(self.tiny))


PUBLISHED: dict[str, tuple[str, ...]] = {
    architecture: layouts
    for family in every_family()
    for architecture, layouts in getattr(family, "PUBLISHED", {}).items()
}
FIRST = [
    Case(name, layout)
    for name, layouts in LAYOUTS.items()
    for layout in (next(iter(layouts)), *PUBLISHED.get(name, ()))
]
# what llama.cpp's converter makes of them is recorded
RECORDED = [
    *FIRST,
    *(
        Case(architecture, layout)
        for family in every_family()
        for architecture, layouts in getattr(family, "RECORDED", {}).items()
        for layout in layouts
    ),
]
CASES = [Case(name, layout) for name, layouts in LAYOUTS.items() for layout in layouts]
CASES += [replace(case, keep_mtp=False) for case in CASES if getattr(case.tiny, "mtp", False)]


@cache
def tensors_of(tiny: Any) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = tiny.tensors()
    return found


@cache
def _model(case: Case) -> MoeModel:
    config, names = case.tiny.config(), tensors_of(case.tiny).keys()
    return ARCHITECTURES[case.architecture](config, "here/config.json", names, case.keep_mtp)


def stored_of(tensors: Mapping[str, torch.Tensor]) -> dict[str, StoredTensor]:
    return {
        name: StoredTensor(name, DTYPES[t.dtype], tuple(t.shape)) for name, t in tensors.items()
    }


def rows_of_slabs(
    tensors: Iterable[Any], stored: Mapping[str, StoredTensor]
) -> list[tuple[str, int, int]]:
    """Every stored row (or column) that GGUF tensors are made of: name, index on axis 0, row."""
    found = []
    for tensor in tensors:
        for slab in tensor.slabs:
            shape = stored[slab.stored].shape
            matrix = shape if slab.index is None else shape[1:]
            n_rows = matrix[-1] if slab.transposed else matrix[0]
            rows = range(*(slab.rows or (0, n_rows)), slab.step)
            if slab.columns is not None:  # whole stored rows, of which a matrix has all entries
                assert slab.transposed
                assert rows == range(n_rows)
                rows = range(*slab.columns)
            found += [(slab.stored, slab.index or 0, row) for row in rows]
    return found
