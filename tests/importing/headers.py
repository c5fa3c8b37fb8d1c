"""Headers of files that llama.cpp would write, without the time to write them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from reap2gguf.gguf_files.reader import GgufHeader, read_gguf_header
from reap2gguf.gguf_files.tensor_types import type_of_name
from reap2gguf.importing.from_file import FoundRecipe
from reap2gguf.models.description import GgufTensor, ModelFacts
from reap2gguf.models.from_gguf import model_from_gguf
from reap2gguf.models.table import BY_GGUF
from reap2gguf.quantizing.recipe import parse_recipe
from reap2gguf.quantizing.resolve import resolve
from tests.exporting.files import export_files, gguf_tensors, mean_squares, plain, random_imatrix


@dataclass(frozen=True)
class Unquantized:
    """A tiny model as a BF16 file."""

    path: Path
    header: GgufHeader
    importance: dict[str, np.ndarray]
    tensors: tuple[GgufTensor, ...]
    facts: ModelFacts

    def with_types(self, types: Mapping[str, str], **metadata: Any) -> GgufHeader:
        """The header of a file with these types, of another program."""
        tensors = {
            name: replace(info, tensor_type=type_of_name(types.get(name, info.tensor_type.name)))
            for name, info in self.header.tensors.items()
        }
        values = {**self.header.metadata, **metadata}
        values.pop("reap2gguf.recipe")
        return replace(self.header, tensors=tensors, metadata=values)

    def types_by(self, toml: str, has_imatrix: bool = True) -> dict[str, str]:
        """What a recipe gives the model's tensors, read from its text."""
        recipe = parse_recipe(toml, "found", "found.toml")
        found = resolve(recipe, self.tensors, self.facts, self.facts.n_experts, has_imatrix)
        return {name: kind.name for name, kind in found.tensor_types().items()}


def unquantized(made: Any, folder: Path) -> Unquantized:
    """The BF16 file of a tiny checkpoint."""
    model = made.write(folder / "model")
    path = export_files(model, folder, [plain("BF16")])["BF16"]
    header = read_gguf_header(path)
    found = model_from_gguf(header, BY_GGUF)
    tensors = gguf_tensors(model)
    importance = mean_squares(random_imatrix(tensors))
    return Unquantized(path, header, importance, tensors, found.model.facts)


def types_in(header: GgufHeader) -> dict[str, str]:
    return {name: info.tensor_type.name for name, info in header.tensors.items()}


def is_exact(found: FoundRecipe, header: GgufHeader, model: Unquantized) -> bool:
    """Whether the TOML gives every tensor the type that it has in the header."""
    return model.types_by(found.as_toml()) == types_in(header)
