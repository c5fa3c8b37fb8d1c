"""The size of a GGUF file before it is written."""

from __future__ import annotations

from typing import TYPE_CHECKING

from reap2gguf.bundle.layout import IMATRIX_FILE
from reap2gguf.exporting.header import lay_out
from reap2gguf.exporting.header_facts import FileTypes, HeaderNames, model_facts

if TYPE_CHECKING:
    from reap2gguf.checkpoint.checkpoint import Checkpoint
    from reap2gguf.exporting.header import GgufLayout
    from reap2gguf.gguf_files.imatrix import Imatrix
    from reap2gguf.models.contract import MoeModel
    from reap2gguf.quantizing.resolve import ResolvedRecipe


def planned_file(
    checkpoint: Checkpoint,
    model: MoeModel,
    name: str,
    recipe: ResolvedRecipe,
    imatrix: Imatrix | None = None,
    imatrix_file: str = IMATRIX_FILE,
) -> GgufLayout:
    """The file that `quantize` writes of a checkpoint: its header, and where its tensors end.

    `name` is the model's in the header. Raises what writing the header raises, such as a
    TokenizerError. Memory: the header.
    """
    types = FileTypes(recipe.name, recipe.llama_file_type, recipe.tensor_types())
    facts = model_facts(checkpoint, model, HeaderNames(name), types, imatrix, imatrix_file)
    return lay_out(checkpoint.folder, model.gguf_tensors(checkpoint.tensors), facts)
