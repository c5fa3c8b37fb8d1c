"""How a checkpoint's quantized weights become tensors of floats: the hook of `Checkpoint`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from reap2gguf.checkpoint.quantized.finding import Finder
from reap2gguf.checkpoint.quantized.keys import BLOCKS, WRITTEN_AS_BF16, without_quantization
from reap2gguf.checkpoint.quantized.settings import read_settings
from reap2gguf.checkpoint.safetensors_header import StoredTensor
from reap2gguf.checkpoint.weights import FLOATS

if TYPE_CHECKING:
    from pathlib import Path

    from reap2gguf.checkpoint.quantized.coded import CodedWeight


@dataclass(frozen=True)
class Decoding:
    """The quantized weights of a checkpoint, and how they are read."""

    config: dict[str, Any]  # as the file has it
    weights: Mapping[str, CodedWeight]  # by the names that they would have without quantization
    is_written: bool = False  # as BF16, and no longer as they are stored

    def dtype_of(self, weight: CodedWeight) -> str:
        """What a weight is read as."""
        return "BF16" if self.is_written else weight.dtype

    @cached_property
    def weight_names(self) -> Mapping[str, str]:
        """The weight that each stored part is of."""
        return {part: name for name, weight in self.weights.items() for part in weight.parts}

    @property
    def plain_config(self) -> dict[str, Any]:
        """The config as if nothing was quantized."""
        return without_quantization(self.config)

    @property
    def caveats(self) -> tuple[str, ...]:
        """What a user should know of the values, one sentence each."""
        kinds = ", ".join(sorted({weight.kind for weight in self.weights.values()}))
        if kinds == BLOCKS and not self.is_written:
            kept = (
                f"the source is quantized ({kinds}): what is {kinds} in a GGUF file too has its "
                "blocks bit for bit, and what is in another type has lost precision twice"
            )
            return (kept,)
        twice = (
            f"the source is quantized ({kinds}): GGUF files are made of its decoded values, so "
            "they have lost precision twice"
        )
        return (twice, WRITTEN_AS_BF16) if self.is_written else (twice,)

    def tensors(self, files: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
        """What is read, in the order of the files: a weight stands where its values do."""
        found: dict[str, StoredTensor] = {}
        for name, tensor in files.items():
            weight = self.weights.get(self.weight_names.get(name, ""))
            if weight is None:
                found[name] = tensor
            elif name == weight.values:
                dtype = self.dtype_of(weight)
                coded = "" if self.is_written else weight.kind
                found[weight.name] = StoredTensor(weight.name, dtype, weight.shape, coded=coded)
        return found

    def parts(self, name: str) -> tuple[str, ...]:
        """The stored tensors that hold a tensor which is read."""
        weight = self.weights.get(name)
        return (name,) if weight is None else weight.parts

    def written(self) -> Decoding:
        """The same, with every weight rounded to BF16, as a checkpoint that is not quantized."""
        return replace(self, is_written=True)


def read_decoding(
    config: dict[str, Any], files: Mapping[str, StoredTensor], folder: Path
) -> Decoding | None:
    """How to read the weights of a checkpoint; None if they are no quantized ones known here.

    The stored tensors decide: a `quantization_config` alone may be left over from a model that was
    merged or dequantized since. Raises CheckpointError and UnsupportedModelError as
    `read_settings` and `Finder.find` do.
    """
    if all(tensor.dtype in FLOATS for tensor in files.values()):
        return None
    settings = read_settings(config, str(folder / "config.json"))
    if settings is None:
        return None
    weights = {one.name: one for one in Finder(files, settings, str(folder)).find()}
    return Decoding(config, weights) if weights else None
