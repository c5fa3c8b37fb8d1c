"""Which file of a bundle for which memory, by what was measured or else by bits per weight.

Cards and reports recommend the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from reap2gguf.bundle.markdown import code, table
from reap2gguf.messages import size

if TYPE_CHECKING:
    from reap2gguf.bundle.evaluation import Estimate
    from reap2gguf.bundle.manifest import GgufRecord, Manifest

_GIB = 2**30
# what graphics cards and computers have
_MEMORIES = (2, 4, 6, 8, 12, 16, 24, 32, 48, 64, 80, 96, 128, 192, 256, 384, 512, 768, 1024)
_CONTEXT = _GIB  # left free at least, and a tenth of the file: context and buffers


@dataclass(frozen=True)
class Choice:
    """The best file from some memory on, in bytes."""

    memory: int
    record: GgufRecord

    @property
    def title(self) -> str:
        """The memory in words."""
        whole, rest = divmod(self.memory, _GIB)
        is_listed = whole in _MEMORIES and not rest
        return f"from {whole:,} GiB" if is_listed else f"from {size(self.memory)}"


def choice_section(manifest: Manifest) -> str:
    """The table of memories; "" if there is only one file."""
    if len(manifest.gguf) < 2:
        return ""
    rows = [(one.title, code(one.record.label), code(one.record.file)) for one in choices(manifest)]
    return (
        f"### Which file to choose\n\n{table(('memory', 'type', 'file'), rows)}\n\n"
        f"{how_chosen(manifest)}"
    )


def how_chosen(manifest: Manifest) -> str:
    """What the choice is made by, and what memory stands for."""
    how = (
        "the one with the lowest KL divergence from the source that fits; of files that cannot be "
        "told apart within the standard error, the smallest"
        if _divergences(manifest)
        else "the one with the most bits per weight that fits. The files were not compared by "
        "quality; below 4 bits the difference is often felt"
    )
    return (
        "Memory is that of the GPU, or of GPU and computer together where llama.cpp keeps experts "
        f"in the computer's. The choice is {how}. A file leaves 1 GiB and a tenth of its size for "
        "context and buffers; a long context needs more."
    )


def choices(manifest: Manifest) -> list[Choice]:
    """The best file from each memory on, from the smallest memory to the largest."""
    found: list[Choice] = []
    for memory in _MEMORIES:
        fitting = [one for one in manifest.gguf if needed_bytes(manifest, one) <= memory * _GIB]
        if not fitting:
            continue
        best = _best(manifest, fitting)
        if not found or found[-1].record is not best:
            found.append(Choice(memory * _GIB, best))
    if not found:  # larger than any machine of the list
        smallest = min(manifest.gguf, key=lambda one: one.n_bytes)
        found.append(Choice(needed_bytes(manifest, smallest), smallest))
    return found


def needed_bytes(manifest: Manifest, record: GgufRecord) -> int:
    """Memory for a file with its projector, some context and buffers, in bytes."""
    n_bytes = record.n_bytes + sum(side.n_bytes for side in manifest.side_files)
    return n_bytes + n_bytes // 10 + _CONTEXT


def _divergences(manifest: Manifest) -> dict[str, Estimate]:
    """The divergence of every file from the source; none if one was not measured."""
    evaluation = manifest.evaluation
    if evaluation is None:
        return {}
    found = {one.file: evaluation.divergence(one.file, "source") for one in manifest.gguf}
    measured = {name: one.mean for name, one in found.items() if one is not None}
    return measured if len(measured) == len(found) else {}


def _best(manifest: Manifest, fitting: list[GgufRecord]) -> GgufRecord:
    means = _divergences(manifest)
    if not means:
        return max(fitting, key=lambda one: (one.bits_per_weight, -one.n_bytes))
    lowest = min((means[one.file] for one in fitting), key=lambda mean: mean.value)
    alike = [one for one in fitting if means[one.file].value <= lowest.value + lowest.error]
    return min(alike, key=lambda one: one.n_bytes)
