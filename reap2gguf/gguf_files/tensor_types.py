"""Tensor types: those of llama.cpp, which gguf-py numbers, and those of ik_llama.cpp alone.

Numbers and blocks of the latter are facts of ik_llama.cpp (`ggml.h`); the tests compare them with
what its library says. Rows of some begin with a scale, so that they are longer than their blocks.
"""

from __future__ import annotations

from enum import IntEnum

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType


class IkType(IntEnum):
    """Tensor types that only ik_llama.cpp loads."""

    IQ2_K = 137
    IQ3_K = 138
    IQ4_K = 139
    IQ5_K = 140
    IQ6_K = 141
    IQ4_KS = 144
    IQ2_KS = 145
    IQ4_KSS = 146
    IQ5_KS = 152
    IQ2_KT = 153
    IQ3_KT = 154
    IQ4_KT = 155
    IQ3_KS = 156
    IQ2_KL = 157
    IQ1_KT = 158


class IkFileType(IntEnum):
    """Numbers of `general.file_type` that only ik_llama.cpp knows."""

    MOSTLY_IQ2_K = 138
    MOSTLY_IQ3_K = 139
    MOSTLY_IQ4_K = 140
    MOSTLY_IQ5_K = 141
    MOSTLY_IQ6_K = 142
    MOSTLY_IQ4_KS = 145
    MOSTLY_IQ2_KS = 147
    MOSTLY_IQ4_KSS = 148
    MOSTLY_IQ5_KS = 150
    MOSTLY_IQ2_KT = 151
    MOSTLY_IQ3_KT = 152
    MOSTLY_IQ4_KT = 153
    MOSTLY_IQ3_KS = 154
    MOSTLY_IQ2_KL = 155
    MOSTLY_IQ1_KT = 156


LOADER = "ik_llama.cpp"  # what loads files with such tensors
LOADER_KEY = "general.loadable_only_in"  # the key of a header that says so
_BLOCK = 256
# bytes of a block, and of what stands before the blocks of a row
_LAYOUTS = {
    IkType.IQ2_K: (76, 0),
    IkType.IQ3_K: (110, 0),
    IkType.IQ4_K: (144, 0),
    IkType.IQ5_K: (176, 0),
    IkType.IQ6_K: (212, 0),
    IkType.IQ4_KS: (136, 4),
    IkType.IQ2_KS: (70, 2),
    IkType.IQ4_KSS: (128, 4),
    IkType.IQ5_KS: (168, 4),
    IkType.IQ2_KT: (68, 4),
    IkType.IQ3_KT: (100, 4),
    IkType.IQ4_KT: (128, 4),
    IkType.IQ3_KS: (102, 2),
    IkType.IQ2_KL: (86, 2),
    IkType.IQ1_KT: (56, 4),
}

_BY_NUMBER = {int(one): one for one in IkType}
_FILE_TYPES = {int(one): one for one in IkFileType}


def type_of_number(number: int) -> GGMLQuantizationType | IkType:
    """The type that a GGUF file means. Raises ValueError for a number that is not known."""
    return _BY_NUMBER.get(number) or GGMLQuantizationType(number)


def file_type_of_number(number: int) -> LlamaFileType | IkFileType:
    """What `general.file_type` means. Raises ValueError for a number that is not known."""
    return _FILE_TYPES.get(number) or LlamaFileType(number)


def type_of_name(name: str) -> GGMLQuantizationType | IkType:
    """The type of a name in capitals. Raises KeyError for one that is not known."""
    if name in IkType.__members__:
        return IkType[name]
    return GGMLQuantizationType[name]


def is_type_name(name: str) -> bool:
    """Whether a type has this name."""
    return name in IkType.__members__ or name in GGMLQuantizationType.__members__


def block_of(tensor_type: GGMLQuantizationType | IkType) -> tuple[int, int]:
    """Values and bytes of a block."""
    if isinstance(tensor_type, IkType):
        return _BLOCK, _LAYOUTS[tensor_type][0]
    block, size = GGML_QUANT_SIZES[tensor_type]
    return int(block), int(size)


def row_bytes(tensor_type: GGMLQuantizationType | IkType, n_columns: int) -> int:
    """Bytes of a row of `n_columns` values, which must fill whole blocks."""
    block, size = block_of(tensor_type)
    before = _LAYOUTS[tensor_type][1] if isinstance(tensor_type, IkType) else 0
    return before + n_columns // block * size


def columns_of(tensor_type: GGMLQuantizationType | IkType, n_bytes: int) -> int:
    """The values of a row that has so many bytes: the reverse of `row_bytes`."""
    block, size = block_of(tensor_type)
    return (n_bytes - row_bytes(tensor_type, 0)) // size * block


def is_ik(tensor_type: object) -> bool:
    """Whether only ik_llama.cpp has a type."""
    return isinstance(tensor_type, IkType)
