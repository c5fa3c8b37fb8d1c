"""Header values at which llama.cpp would end the process are refused before it reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from gguf import GGMLQuantizationType

from reap2gguf.errors import ArtifactError
from reap2gguf.gguf_files.reader import GgufHeader, GgufTensorInfo, read_gguf_header
from reap2gguf.gguf_files.tensor_types import IkType
from reap2gguf.local.header_check import check_header, ik_types
from tests.conftest import Bundle
from tests.local.altered import altered

# of Qwen3.5's tiny model, as llama.cpp reads them
QWEN35 = {
    "general.architecture": "qwen35moe",
    "qwen35moe.block_count": 5,
    "qwen35moe.embedding_length": 256,
    "qwen35moe.attention.head_count": 4,
    "qwen35moe.attention.key_length": 64,
    "qwen35moe.attention.layer_norm_rms_epsilon": 1e-6,
    "qwen35moe.rope.dimension_count": 16,
    "qwen35moe.rope.dimension_sections": [4, 2, 2, 0],
    "qwen35moe.expert_count": 16,
    "qwen35moe.expert_used_count": 4,
    "qwen35moe.nextn_predict_layers": 1,
    "qwen35moe.ssm.time_step_rank": 8,
    "qwen35moe.ssm.state_size": 32,
    "qwen35moe.ssm.inner_size": 256,
    "tokenizer.ggml.tokens": ["a", "b"],
    "tokenizer.ggml.token_type": [1, 1],
}
NAN = float("nan")


def header(**values: Any) -> GgufHeader:
    given = {f"qwen35moe.{key.replace('__', '.')}": value for key, value in values.items()}
    return GgufHeader(Path("x.gguf"), {**QWEN35, **given}, {}, 0)


def test_the_values_of_a_right_file_pass(built: Bundle) -> None:
    check_header(Path("x.gguf"), header())
    for path in built.gguf.glob("example-*.gguf"):
        check_header(path, read_gguf_header(path))


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("block_count", [0, 513, 2**32 - 1, "5", -1]),
        ("nextn_predict_layers", [6]),
        ("expert_count", [0, 3, 1025]),
        ("expert_used_count", [0, 17, [4, 4, 99]]),
        ("expert_group_count", [2, 3, 16, 100]),
        ("attention__layer_norm_rms_epsilon", [-1.0, NAN, float("inf"), "1"]),
        ("rope__scaling__type", ["xyz", "", 5]),
        ("rope__dimension_count", [0, 1, 65, 66, 15, 2**31 - 1, "16"]),
        (
            "rope__dimension_sections",
            [[0, 0, 0, 0], [100, 0, 0, 0], [0, 0, 0, 4], [-1, 4, 4, 4], ["a"]],
        ),
        ("ssm__inner_size", [0, 1, 257]),
    ],
)
def test_values_at_which_llama_cpp_aborts(key: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(ArtifactError, match=r"^x.gguf: qwen35moe\.\w+"):
            check_header(Path("x.gguf"), header(**{key: value}))


@pytest.mark.parametrize(
    ("used", "right"), [(0, False), (1, True), (3, True), (4, False), (5, False)]
)
def test_groups_of_experts(used: int, right: bool) -> None:
    grouped = header(expert_group_count=4, expert_group_used_count=used)
    if right:
        check_header(Path("x.gguf"), grouped)
    else:
        with pytest.raises(ArtifactError, match="expert_group_used_count"):
            check_header(Path("x.gguf"), grouped)


@pytest.mark.parametrize("key", ["token_type", "scores"])
def test_a_list_that_is_shorter_than_the_vocabulary(key: str) -> None:
    short = GgufHeader(Path("x.gguf"), {**QWEN35, f"tokenizer.ggml.{key}": [1]}, {}, 0)
    with pytest.raises(
        ArtifactError, match=f"tokenizer.ggml.{key} does not have one entry for each of"
    ):
        check_header(Path("x.gguf"), short)


def test_a_rotation_of_half_a_head_is_refused_for_qwen3(built: Bundle, tmp_path: Path) -> None:
    """llama.cpp's graph of qwen3moe rotates whole heads and ends the process otherwise."""
    source = built.gguf / "example-BF16.gguf"
    path = altered(source, tmp_path / "x.gguf", arch__rope__dimension_count=32)
    with pytest.raises(ArtifactError, match=r"rope.dimension_count is 32, expected 64, as many as"):
        check_header(path, read_gguf_header(path))
    path = altered(source, tmp_path / "y.gguf", arch__rope__dimension_count=64)
    check_header(path, read_gguf_header(path))


def test_types_of_ik_llama_cpp_are_named() -> None:
    """llama.cpp calls them invalid, and names neither the program nor a way out."""
    tensors = {
        name: GgufTensorInfo(name, kind, (256, 256), 0, 1)
        for name, kind in {
            "blk.0.attn_q.weight": IkType.IQ4_K,
            "blk.0.attn_k.weight": IkType.IQ2_KS,
            "blk.0.attn_v.weight": GGMLQuantizationType.Q8_0,
        }.items()
    }
    expected = r"x\.gguf: has tensors of IQ2_KS, IQ4_K, which only ik_llama\.cpp loads"
    with pytest.raises(ArtifactError, match=expected):
        check_header(Path("x.gguf"), GgufHeader(Path("x.gguf"), QWEN35, tensors, 0))
    assert ik_types(header()) == []
