"""The header of a GGUF file: keys, tokenizer, and where every tensor will lie."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from gguf import (
    GGML_QUANT_VERSION,
    GGUFWriter,
    Keys,
    size_label,
)

from reap2gguf.gguf_files.tensor_types import LOADER, LOADER_KEY, is_ik, row_bytes
from reap2gguf.gguf_files.writer import HeaderWriter
from reap2gguf.tokenizer.gguf_keys import add_tokenizer

if TYPE_CHECKING:
    from reap2gguf.exporting.header_facts import HeaderFacts
    from reap2gguf.gguf_files.reader import GgufHeader
    from reap2gguf.models.description import GgufTensor


_TOKENIZER = "tokenizer."  # how its keys begin


@dataclass(frozen=True)
class GgufLayout:
    """The header of a file, where each of its tensors begins, and how long the file is."""

    header: bytes
    offsets: Mapping[str, int]
    n_bytes: int


def lay_out(
    tokenizer_folder: Path, tensors: Sequence[GgufTensor], facts: HeaderFacts
) -> GgufLayout:
    """Everything before the tensor bytes, and where each tensor will begin."""
    writer = HeaderWriter(facts.arch)
    _add_keys(writer, tokenizer_folder, facts)
    for tensor in tensors:
        tensor_type = facts.tensor_types[tensor.name]
        n_bytes = prod(tensor.shape[:-1]) * row_bytes(tensor_type, tensor.n_columns)
        # the dtype is gguf-py's name for "not yet quantized"; raw_dtype is what is written
        writer.add_tensor_info(
            tensor.name, tensor.shape, np.dtype(np.float32), n_bytes, tensor_type
        )
    if not any(value.key == Keys.General.SIZE_LABEL for value in facts.values):
        writer.add_size_label(size_label(*writer.get_total_parameter_count()))
    header = writer.header()
    offsets: dict[str, int] = {}
    position = len(header)
    for name, info in writer.tensors[0].items():
        offsets[name] = position
        position += GGUFWriter.ggml_pad(info.nbytes, writer.data_alignment)
    return GgufLayout(header, offsets, position)


def _add_keys(writer: GGUFWriter, tokenizer_folder: Path, facts: HeaderFacts) -> None:
    writer.add_type(facts.general_type)
    for value in facts.values:
        writer.add_key_value(value.key, value.value, value.value_type)
    writer.add_file_type(facts.file_type)
    if any(map(is_ik, facts.tensor_types.values())):
        writer.add_string(LOADER_KEY, LOADER)
    writer.add_quantization_version(GGML_QUANT_VERSION)
    if facts.tokenizer_of is not None:
        _copy_tokenizer(writer, facts.tokenizer_of)
    elif facts.vocab_size is not None:
        add_tokenizer(writer, tokenizer_folder, facts.vocab_size, facts.tokenizers)
    if facts.imatrix is not None:
        writer.add_string("quantize.imatrix.file", facts.imatrix_file)
        writer.add_string("quantize.imatrix.dataset", facts.imatrix.dataset)
        writer.add_uint32("quantize.imatrix.entries_count", len(facts.imatrix.entries))
        writer.add_uint32("quantize.imatrix.chunks_count", facts.imatrix.n_chunks)


def _copy_tokenizer(writer: GGUFWriter, header: GgufHeader) -> None:
    """Add the tokenizer of another file, with the types of its values."""
    for key, value in header.metadata.items():
        if key.startswith(_TOKENIZER):
            kind, *of_items = header.kinds[key]
            writer.add_key_value(key, value, kind, *of_items)
