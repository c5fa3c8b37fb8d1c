"""A tiny checkpoint of every architecture in the table, in every layout that it is stored in."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Protocol

import torch

from reap2gguf.checkpoint.safetensors_header import StoredTensor
from reap2gguf.models.contract import MoeModel
from reap2gguf.models.table import ARCHITECTURES
from tests.tiny import TinyQwen3Moe, TinyQwen35Moe

DTYPES = {
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float32: "F32",
    torch.uint8: "U8",
    torch.float8_e4m3fn: "F8_E4M3",
}


class Tiny(Protocol):
    """A factory of tests/tiny.py: hashable, and the same checkpoint every time."""

    def config(self) -> dict[str, Any]: ...
    def tensors(self) -> dict[str, torch.Tensor]: ...
    def write(self, folder: Any) -> Any: ...


QWEN3 = TinyQwen3Moe()
QWEN35 = TinyQwen35Moe()
FLAT = replace(QWEN35, nested=False)
# By architecture. The first of each is the published layout.
LAYOUTS: dict[str, dict[str, Any]] = {
    "Qwen3MoeForCausalLM": {
        "2D": QWEN3,
        "3D": replace(QWEN3, fused=True),
        "tied": replace(QWEN3, tied=True),
        "dense": replace(QWEN3, n_layers=4, dense_layers=(0, 3)),
        "3D dense": replace(QWEN3, n_layers=3, fused=True, dense_layers=(2,)),
        "local experts": replace(QWEN3, count_key="num_local_experts"),
    },
    "Qwen3_5MoeForConditionalGeneration": {
        "the Hub's": QWEN35,
        "2D": replace(QWEN35, fused=False),
        "3D": replace(QWEN35, fused_mtp=True),
        "2D trunk, 3D MTP": replace(QWEN35, fused=False, fused_mtp=True),
        "without MTP": replace(QWEN35, mtp=False),
        "without tower": replace(QWEN35, vision=False),
        "tied": replace(QWEN35, tied=True),
        "equal heads": replace(QWEN35, value_heads=4),
        "other layers": replace(QWEN35, layers="flfl"),
    },
    "Qwen3_5MoeForCausalLM": {
        "flat": FLAT,
        "flat 2D without MTP": replace(FLAT, fused=False, mtp=False),
    },
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
    def tiny(self) -> Any:
        return LAYOUTS[self.architecture][self.layout]

    @property
    def model(self) -> MoeModel:
        return _model(self)

    @property
    def stored(self) -> Mapping[str, StoredTensor]:
        return stored_of(tensors_of(self.tiny))


FIRST = [Case(name, next(iter(layouts))) for name, layouts in LAYOUTS.items()]
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
            found += [(slab.stored, slab.index or 0, row) for row in rows]
    return found
