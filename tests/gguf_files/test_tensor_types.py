from __future__ import annotations

import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType

from reap2gguf.gguf_files.tensor_types import (
    IkFileType,
    IkType,
    block_of,
    columns_of,
    file_type_of_number,
    is_ik,
    is_type_name,
    row_bytes,
    type_of_name,
    type_of_number,
)

TYPES = [*(one for one in GGMLQuantizationType if one in GGML_QUANT_SIZES), *IkType]


@pytest.mark.parametrize("one", TYPES, ids=lambda one: one.name)
def test_types_by_number_and_name(one: GGMLQuantizationType | IkType) -> None:
    assert type_of_number(int(one)) is one
    assert type_of_name(one.name) is one
    assert is_type_name(one.name)
    assert is_ik(one) is isinstance(one, IkType)


@pytest.mark.parametrize("one", TYPES, ids=lambda one: one.name)
def test_bytes_of_a_row(one: GGMLQuantizationType | IkType) -> None:
    block, size = block_of(one)
    before = row_bytes(one, 0)
    assert row_bytes(one, 3 * block) == before + 3 * size
    assert columns_of(one, row_bytes(one, 3 * block)) == 3 * block
    assert (before > 0) is (is_ik(one) and not one.name.endswith("_K"))


def test_no_number_means_two_types() -> None:
    assert not {int(one) for one in IkType} & {int(one) for one in GGMLQuantizationType}
    assert not {int(one) for one in IkFileType} & {int(one) for one in LlamaFileType}
    assert {f"MOSTLY_{one.name}" for one in IkType} == {one.name for one in IkFileType}


def test_file_types_by_number() -> None:
    for one in (*LlamaFileType, *IkFileType):
        assert file_type_of_number(int(one)) is one


def test_what_is_not_known() -> None:
    with pytest.raises(ValueError, match="339"):
        type_of_number(339)  # IQ4_K with rows in another order
    with pytest.raises(ValueError, match="340"):
        file_type_of_number(340)
    assert not is_type_name("IQ4_K_R4")
    with pytest.raises(KeyError):
        type_of_name("IQ4_K_R4")
