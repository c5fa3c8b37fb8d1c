"""Says which quantizers an export will use: one line, before the long work."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from reap2gguf.exporting.awaited import is_weighted
from reap2gguf.exporting.device_blocks import pays_on_gpu
from reap2gguf.ggml import load_ggml
from reap2gguf.gguf_files.tensor_types import LOADER, IkType
from reap2gguf.options import ComputeOptions
from reap2gguf.progress import working
from reap2gguf.quantizing.kernels.compiled import find_kernels
from reap2gguf.quantizing.kernels.gpu_kernels import FORMS, Weighted
from reap2gguf.quantizing.quantizer import Quantizer

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType

    from reap2gguf.progress import Progress
    from reap2gguf.quantizing.kernels.compiled import Kernels
    from reap2gguf.quantizing.resolve import ResolvedRecipe

_AS_STORED = "F32"  # these tensors are copied


@dataclass(frozen=True)
class Quantizers:
    """What quantizes which types, by their names."""

    target: str = ""  # what the kernels are compiled for; "" without kernels
    problem: str = ""  # why there are none
    on_gpu: tuple[str, ...] = ()
    by_kernels: tuple[str, ...] = ()  # of the processor
    by_libggml: tuple[str, ...] = ()  # since no kernel makes them
    differing: tuple[str, ...] = ()  # by libggml, since the kernel failed its self-test

    @property
    def line(self) -> str:
        """One line for a user; "" if nothing is quantized."""
        types = (*self.on_gpu, *self.by_kernels, *self.by_libggml, *self.differing)
        if not types:
            return ""
        if not self.target:
            return (
                "quantizing: libggml, about ten times slower than compiled kernels; no kernels: "
                f"{self.problem}"
            )
        parts = []
        if self.on_gpu or self.by_kernels:
            where = f", on the GPU for {', '.join(self.on_gpu)}" if self.on_gpu else ""
            parts.append(f"kernels ({self.target}){where}")
        if self.by_libggml:
            parts += _by_library(self.by_libggml)
        if self.differing:
            parts.append(
                f"libggml, which is slower, for {', '.join(self.differing)}: the kernel does not "
                "make its bytes here, please report it"
            )
        return f"quantizing: {'; '.join(parts)}"


def quantizers_of(
    recipes: Collection[ResolvedRecipe],
    weighted: Collection[str],
    device: str,
    progress: Progress | None = None,
) -> Quantizers:
    """What quantizes the files of these recipes on this machine.

    `weighted` are the tensors that have importance, `device` is auto, cpu or cuda. With `progress`,
    kernels of the processor are compared with libggml first, as they are before their first use; a
    GPU is opened later, and a note says if it does not take part after all.
    """
    keys = _keys(recipes, weighted)
    kernels = find_kernels()
    if isinstance(kernels, str):
        return Quantizers(problem=kernels, by_libggml=_names(keys))
    covered = {key for key in keys if kernels.covers(key[0])}
    failed = set[Weighted]()
    if progress is not None:
        with working(progress, "Comparing the kernels with libggml"):
            failed = _failed(kernels, covered)
    has_gpu = ComputeOptions(device=device).likely_device == "cuda"
    n_weights = sum(prod(entry.tensor.shape) for recipe in recipes for entry in recipe.table)
    uses_gpu = has_gpu and pays_on_gpu(device, n_weights)
    on_gpu = {key for key in keys if uses_gpu and key[0] in FORMS}
    return Quantizers(
        kernels.target,
        on_gpu=_names(on_gpu),
        by_kernels=_names(covered - failed - on_gpu),
        by_libggml=_names(keys - covered - on_gpu),
        differing=_names(failed - on_gpu),
    )


def note_quantizers(
    recipes: Collection[ResolvedRecipe],
    weighted: Collection[str],
    device: str,
    progress: Progress,
) -> None:
    """Note which quantizers will run."""
    if line := quantizers_of(recipes, weighted, device, progress).line:
        progress.note(line)


def _failed(kernels: Kernels, covered: Iterable[Weighted]) -> set[Weighted]:
    quantizer = Quantizer(load_ggml(), kernels)
    return {key for key in covered if not quantizer.uses_kernel(*key)}


def _keys(recipes: Iterable[ResolvedRecipe], weighted: Collection[str]) -> set[Weighted]:
    """The types of all tensors, with importance or without, as an export asks for them."""
    types_of: dict[str, set[GGMLQuantizationType]] = {}
    for recipe in recipes:
        for entry in recipe.table:
            if not entry.is_copied:
                types_of.setdefault(entry.tensor.name, set()).add(entry.tensor_type)
    return {
        (one, is_weighted(name, types, weighted))
        for name, types in types_of.items()
        for one in types
        if one.name != _AS_STORED
    }


def _names(keys: Iterable[Weighted]) -> tuple[str, ...]:
    return tuple(sorted({tensor_type.name for tensor_type, _ in keys}))


def _by_library(types: Sequence[str]) -> Iterator[str]:
    """Which library makes the types that no kernel makes."""
    of_ik = [name for name in types if name in IkType.__members__]
    if others := [name for name in types if name not in of_ik]:
        yield f"libggml for {', '.join(others)}"
    if of_ik:
        yield f"{LOADER}'s libggml for {', '.join(of_ik)}"
