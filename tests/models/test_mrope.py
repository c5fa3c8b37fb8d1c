from __future__ import annotations

from typing import Any

import pytest
import torch

from reap2gguf.checkpoint.config import ConfigReader
from reap2gguf.errors import UnsupportedModelError
from reap2gguf.models.mrope import read_sections


def sections(value: Any, width: int, head_dim: int) -> tuple[int, ...]:
    values = {} if value is None else {"mrope_section": value}
    return read_sections(ConfigReader(values, "here"), width, head_dim)


@pytest.mark.parametrize(
    ("value", "width", "head_dim", "expected"),
    [
        ([11, 11, 10], 64, 256, (11, 11, 10, 0)),  # published
        ([11, 11, 10, 0], 64, 256, (11, 11, 10, 0)),
        (None, 64, 256, (11, 11, 10, 0)),
        ([2, 1, 1], 8, 32, (2, 1, 1, 0)),
        ([1, 1, 2], 8, 32, (1, 1, 1, 0)),
        ([4, 2, 2], 16, 64, (3, 2, 2, 0)),  # the last pair is time's, where llama.cpp has none
        (None, 4, 16, (1, 1, 0, 0)),  # llama.cpp ends where sections are wider than a head
    ],
)
def test_sections(value: Any, width: int, head_dim: int, expected: tuple[int, ...]) -> None:
    assert sections(value, width, head_dim) == expected


def rotary_of_transformers(n_pairs: int) -> Any:
    from transformers.models.qwen3_5_moe.configuration_qwen3_5_moe import Qwen3_5MoeTextConfig
    from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import Qwen3_5MoeTextRotaryEmbedding

    rope = {"rope_type": "default", "rope_theta": 10.0, "partial_rotary_factor": 1.0}
    return Qwen3_5MoeTextRotaryEmbedding(
        Qwen3_5MoeTextConfig(head_dim=2 * n_pairs, rope_parameters=rope)
    )


def axes_of_transformers(rotary: Any, value: list[int]) -> list[int]:
    """Which position each pair is rotated by: time's, height's or width's."""
    rotary.mrope_section = value
    positions = torch.tensor([1.0, 2.0, 3.0])
    found, _ = rotary(torch.zeros(1), positions.reshape(3, 1, 1))
    expected = (positions[:, None] * rotary.inv_freq).cos()
    pairs = found[0, 0, : len(rotary.inv_freq)]
    axes: list[int] = (pairs - expected).abs().argmin(0).tolist()
    return axes


def axes_of_llama_cpp(value: tuple[int, ...], n_pairs: int) -> list[int]:
    found = []
    for pair in range(n_pairs):
        place = pair % sum(value)
        found.append(place % 3 if place < 3 * value[place % 3] else 3)
    return found


@pytest.mark.parametrize("n_pairs", [2, 4, 5, 8, 16])
def test_every_pair_has_the_axis_of_transformers(n_pairs: int) -> None:
    refused, rotary = 0, rotary_of_transformers(n_pairs)
    for time in range(n_pairs + 2):
        for height in range(n_pairs // 2 + 2):
            for width in range(n_pairs // 2 + 2):
                value = [time, height, width]
                try:
                    found = sections(value, 2 * n_pairs, 4 * n_pairs)
                except UnsupportedModelError:
                    refused += 1
                    continue
                expected = axes_of_transformers(rotary, value)
                assert axes_of_llama_cpp(found, n_pairs) == expected
                assert 0 < sum(found) <= 4 * n_pairs
    assert refused < (n_pairs + 2) * (n_pairs // 2 + 2) ** 2


@pytest.mark.parametrize("value", [[1, 1], [3], [1, 1, 1, 1, 1], [], [2, 1, 1]])
def test_sections_that_llama_cpp_cannot_express(value: list[int]) -> None:
    with pytest.raises(UnsupportedModelError, match="mrope_section is"):
        sections(value, 16, 64)
