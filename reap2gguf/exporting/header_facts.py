"""What the header of each GGUF file says, made from weights, a model and a few names.

The export writes it, and `verify` makes it again from a finished bundle. Tokenizer, tensors and the
bytes are `header.lay_out`'s.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from gguf import GGUFValueType, Keys, LlamaFileType

from reap2gguf import __version__
from reap2gguf.bundle.front_matter import PrunedFrom
from reap2gguf.bundle.layout import IMATRIX_FILE
from reap2gguf.bundle.manifest import NO_METHOD
from reap2gguf.exporting.general import General, general_values
from reap2gguf.ggml import UNWEIGHTED_TYPES
from reap2gguf.models.description import HeaderValue
from reap2gguf.models.tokenizer_families import QWEN, TokenizerFamily

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType

    from reap2gguf.bundle.manifest import EarlierPruning, Manifest
    from reap2gguf.checkpoint.weights import Weights
    from reap2gguf.gguf_files.imatrix import Imatrix
    from reap2gguf.gguf_files.reader import GgufHeader
    from reap2gguf.models.contract import MoeModel
    from reap2gguf.models.description import SideFile

# keys of our own that say where the experts of a file come from
VERSION_KEY, SOURCE_KEY, METHOD_KEY = (
    f"reap2gguf.{one}" for one in ("version", "source", "method")
)
COUNT_KEY, KEPT_KEY = "reap2gguf.source_expert_count", "reap2gguf.kept_experts"
ORIGINAL_PREFIX = "reap2gguf.original."  # of a source that was pruned before: what it comes from


@dataclass(frozen=True)
class HeaderFacts:
    """What a header says besides the tokenizer and the tensors."""

    arch: str  # general.architecture
    values: Sequence[HeaderValue]  # where the model comes from, and the architecture's own keys
    file_type: LlamaFileType
    tensor_types: Mapping[str, GGMLQuantizationType]
    imatrix: Imatrix | None = None
    imatrix_file: str = ""
    general_type: str = "model"  # general.type
    vocab_size: int | None = None  # None: the file has no tokenizer
    tokenizers: TokenizerFamily = QWEN  # which the model may have
    tokenizer_of: GgufHeader | None = None  # whose keys are taken as they are; None: of the folder


@dataclass(frozen=True)
class HeaderNames:
    """What headers say of a model that its folder does not hold."""

    name: str  # general.name
    pruned: PrunedFrom | None = None  # None: not pruned here
    own: tuple[HeaderValue, ...] = ()  # reap2gguf.*, as `pruning_values` makes them

    @classmethod
    def of(cls, manifest: Manifest, version: str | None = None) -> HeaderNames:
        """The names in the headers of a finished bundle; `version` is the writer's."""
        pruning = manifest.pruning
        own = pruning_values(
            manifest.source.label,
            pruning.method,
            pruning.n_experts,
            pruning.kept,
            manifest.program.get("reap2gguf", "") if version is None else version,
            manifest.source.earlier,
        )
        return cls(manifest.name, PrunedFrom.of(manifest), tuple(own))


@dataclass(frozen=True)
class FileTypes:
    """What a recipe decides for one file."""

    recipe: str  # its name
    file_type: LlamaFileType
    tensor_types: Mapping[str, GGMLQuantizationType]

    @property
    def is_weighted(self) -> bool:
        """Whether any tensor is quantized with importance."""
        return any(one.name not in UNWEIGHTED_TYPES for one in self.tensor_types.values())


def model_facts(
    weights: Weights,
    model: MoeModel,
    names: HeaderNames,
    types: FileTypes,
    imatrix: Imatrix | None,
    imatrix_file: str = IMATRIX_FILE,
) -> HeaderFacts:
    """What the header of a model's file says."""
    return HeaderFacts(
        arch=model.facts.gguf_arch,
        values=model_header(weights, model, names, types.recipe),
        vocab_size=model.facts.vocab_size,
        tokenizers=model.tokenizers,
        tokenizer_of=weights.gguf,
        file_type=types.file_type,
        tensor_types=types.tensor_types,
        imatrix=imatrix if types.is_weighted else None,
        imatrix_file=imatrix_file,
    )


def side_facts(
    weights: Weights, model: MoeModel, names: HeaderNames, side: SideFile
) -> HeaderFacts:
    """What the header of a side file says."""
    return HeaderFacts(
        arch=side.arch,
        values=side_header(weights, model, names, side),
        general_type=side.general_type,
        file_type=LlamaFileType.MOSTLY_F16,
        tensor_types=side.tensor_types(),
    )


def model_header(
    weights: Weights, model: MoeModel, names: HeaderNames, recipe: str
) -> tuple[HeaderValue, ...]:
    """All keys of a model's file but tokenizer, importance matrix, file type and computed size.

    `weights` is the model to quantize, or the pruned view of the source; the pruned checkpoint of
    the bundle gives the same.
    """
    general = general_of(weights, model, names).values
    return (*general, *model.gguf_metadata(), *names.own, recipe_value(recipe))


def side_header(
    weights: Weights, model: MoeModel, names: HeaderNames, side: SideFile
) -> tuple[HeaderValue, ...]:
    """The same for a side file, which says what the model's file says of where it comes from."""
    values = general_of(weights, model, names).values
    # the size is that of this file's own tensors
    return (*(value for value in values if value.key != Keys.General.SIZE_LABEL), *side.values)


def general_of(weights: Weights, model: MoeModel, names: HeaderNames) -> General:
    """The general.* keys of a model's files, and what could not be read for them."""
    tensors = model.gguf_tensors(weights.tensors)
    n_parameters = sum(prod(tensor.shape) for tensor in tensors)
    return general_values(weights.folder, names.name, n_parameters, names.pruned)


def pruning_values(
    source_label: str,
    method: str,
    n_experts: int,
    kept: Mapping[int, Sequence[int]],
    version: str = __version__,
    earlier: EarlierPruning | None = None,
) -> list[HeaderValue]:
    """Keys of our own, so that a GGUF file alone records where its experts come from.

    With `earlier`, also those of the original: the source was pruned before. A file with all
    experts of a source that was never pruned says only its source.
    """
    values = [_text(VERSION_KEY, version), _text(SOURCE_KEY, source_label)]
    if method == NO_METHOD and earlier is None:
        return values
    values += [
        _text(METHOD_KEY, method),
        HeaderValue(COUNT_KEY, n_experts, GGUFValueType.UINT32),
        _experts(KEPT_KEY, kept),
    ]
    if earlier is not None:
        values += [
            _text(f"{ORIGINAL_PREFIX}source", earlier.label),
            HeaderValue(f"{ORIGINAL_PREFIX}expert_count", earlier.n_experts, GGUFValueType.UINT32),
            _experts(f"{ORIGINAL_PREFIX}kept_experts", earlier.kept),
        ]
    return values


def _experts(key: str, kept: Mapping[int, Sequence[int]]) -> HeaderValue:
    """Ids of experts, layer after layer, expert_count ids each."""
    flat = [expert for layer in sorted(kept) for expert in kept[layer]]
    return HeaderValue(key, flat, GGUFValueType.ARRAY)


def recipe_value(recipe: str) -> HeaderValue:
    """The key that records the name of a file's recipe."""
    return _text("reap2gguf.recipe", recipe)


def _text(key: str, value: str) -> HeaderValue:
    return HeaderValue(key, value, GGUFValueType.STRING)
