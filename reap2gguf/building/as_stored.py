"""A build that quantizes nothing: the types of a GGUF source, tensor by tensor, as a recipe."""

from __future__ import annotations

from typing import TYPE_CHECKING

from reap2gguf.errors import UsageError
from reap2gguf.importing.foreign_types import usual_file_type
from reap2gguf.pruning.methods import merges
from reap2gguf.quantizing.file_types import IK_MIXTURES, MIXTURES
from reap2gguf.quantizing.labels import hub_label
from reap2gguf.quantizing.named import DEFAULT_RECIPES
from reap2gguf.quantizing.recipe import Recipe
from reap2gguf.quantizing.resolve import ResolvedRecipe, ResolvedTensor, resolve
from reap2gguf.tokenizer.check import check_tokenizer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from reap2gguf.checkpoint.checkpoint import Checkpoint
    from reap2gguf.gguf_files.reader import GgufHeader
    from reap2gguf.models.contract import MoeModel
    from reap2gguf.models.description import GgufTensor
    from reap2gguf.options import BuildOptions
    from reap2gguf.pruning.select import Target

NAME = "as stored"
_FILE_TYPE = "general.file_type"


def is_sliced(options: BuildOptions, checkpoint: Checkpoint) -> bool:
    """Whether a build slices its source: a GGUF file, and no recipe or size was asked for."""
    return checkpoint.gguf is not None and options.recipes is DEFAULT_RECIPES


def check_gguf_options(options: BuildOptions, checkpoint: Checkpoint, target: Target) -> None:
    """Raises UsageError for what a build cannot make of a GGUF file."""
    if checkpoint.gguf is None:
        return
    if options.dequantize is not None:
        raise UsageError(
            "--dequantize: no safetensors are made of a GGUF file; leave it out, or pass the "
            "safetensors checkpoint"
        )
    if options.repair != "none" or merges(options.method):
        how = "--repair" if options.repair != "none" else f"--method {options.method}"
        raise UsageError(
            f"{how}: it makes new weights, which a bundle keeps as safetensors, and of a GGUF file "
            "there are none; leave it out, or pass the safetensors checkpoint"
        )
    if not is_sliced(options, checkpoint):
        return
    if options.tensor_types or options.labels:
        how = "--set or --tensor-type" if options.tensor_types else "--label"
        raise UsageError(
            f"{how}: without --recipe the blocks of {checkpoint.gguf.path} stay as they are, in "
            f"its types and under its label; pass --recipe too, or leave {how} out"
        )
    if not target.prunes:
        raise UsageError(
            f"{checkpoint.gguf.path}: all experts are kept, in the types that the file has: "
            "nothing would change; pass --compression or --keep-experts, or a --recipe"
        )


def as_stored(checkpoint: Checkpoint, tensors: Sequence[GgufTensor]) -> ResolvedRecipe:
    """The types of a GGUF file, for the tensors of the pruned model."""
    header = checkpoint.gguf
    assert header is not None
    file_type = _file_type(header)
    label = hub_label(header.path.name.rpartition(":")[2]) or file_type
    title = f"The types of {header.path.name.rpartition(':')[2]}, block for block"
    recipe = Recipe(NAME, title, label, file_type, (), "")
    table = [ResolvedTensor(one, header.tensors[one.name].tensor_type, None) for one in tensors]
    return ResolvedRecipe(recipe, tuple(table))


def _file_type(header: GgufHeader) -> str:
    """The name of the file type in a header; without one that is known, that of most tensors."""
    number = header.metadata.get(_FILE_TYPE)
    for name, mixture in (MIXTURES | IK_MIXTURES).items():
        if type(number) is int and number == mixture.file_type.value:
            return name
    return usual_file_type([info.tensor_type for info in header.tensors.values()])


def recipes_of(
    asked: Sequence[Recipe],
    checkpoint: Checkpoint,
    model: MoeModel,
    tensors: Sequence[GgufTensor],
    target: Target,
    options: BuildOptions,
) -> tuple[ResolvedRecipe, ...]:
    """The recipes with the types of all tensors; of a GGUF file that is sliced, its own types."""
    if is_sliced(options, checkpoint):
        return (as_stored(checkpoint, tensors),)
    return tuple(
        resolve(recipe, tensors, model.facts, target.n_kept, has_imatrix=True) for recipe in asked
    )


def tokenizer_notes(checkpoint: Checkpoint, model: MoeModel) -> tuple[str, ...]:
    """What a user should know of the tokenizer; that of a GGUF file stays as it is.

    Raises what `check_tokenizer` raises.
    """
    if checkpoint.gguf is not None:
        return ()
    return check_tokenizer(checkpoint.folder, model.facts.vocab_size, model.tokenizers)
