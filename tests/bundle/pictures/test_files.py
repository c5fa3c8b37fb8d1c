from __future__ import annotations

import math

import pytest

from reap2gguf.bundle.evaluation import Estimate
from reap2gguf.bundle.pictures import files
from reap2gguf.bundle.pictures.canvas import own_settings, plain, steps
from reap2gguf.bundle.pictures.files import (
    MOST_FILES,
    FilePoint,
    FileTypes,
    bits_picture,
    quality_picture,
)
from tests.bundle.pictures.test_experts import opened
from tests.models.layouts import FIRST, Case

SHAPES = {
    "token_embd.weight": (1000, 64),
    "output_norm.weight": (64,),
    "blk.0.attn_q.weight": (64, 64),
    "blk.0.attn_norm.weight": (64,),
    "blk.0.ffn_down_exps.weight": (8, 64, 32),
    "blk.1.attn_q.weight": (64, 64),
    "blk.1.attn_v.weight": (32, 64),
    "blk.1.ffn_down_exps.weight": (8, 64, 32),
}
TYPES = {
    "token_embd.weight": "Q8_0",
    "blk.0.attn_q.weight": "Q4_K",
    "blk.0.attn_norm.weight": "F32",
    "blk.0.ffn_down_exps.weight": "Q6_K",
    "blk.1.attn_q.weight": "Q4_K",
    "blk.1.attn_v.weight": "Q6_K",
    "blk.1.ffn_down_exps.weight": "Q4_K",
}


def point(label: str, gib: float, total: float, error: float = 0.001) -> FilePoint:
    return FilePoint(label, int(gib * 2**30), Estimate(total / 2, error), Estimate(total, error))


@pytest.mark.parametrize(
    "points",
    [
        [point("Q8_0", 10, 0.1)],
        [point("Q8_0", 10, 0.1), point("Q4_K_M", 10, 0.1), point("Q4_K_S", 10.01, 0.1)],
        [point("Q8_0", 10, 0.0, 0.0), point("Q4_K_M", 5, -1e-9)],
        [point("Q8_0", 10, 0.1, 5.0), point("\u4e2d" * 90, 0.001, 1e9)],
        [point(f"$x_{n}$", 10 + n / 10, 0.1) for n in range(40)],
    ],
)
def test_any_figures_are_drawn(points: list[FilePoint]) -> None:
    with own_settings():
        for pruning in (None, Estimate(0.09, 0.001), Estimate(0.0, 0.0)):
            opened(quality_picture(points, pruning))


def test_bits_are_means_over_the_weights() -> None:
    table = files._table(FileTypes("x", 5.0, TYPES), SHAPES)
    assert list(table) == ["embeddings", "experts: down", "attention"]
    attention = table["attention"]
    assert attention[0].bits / attention[0].weights == 4.5
    q, v = 64 * 64, 32 * 64
    assert attention[1].bits / attention[1].weights == (q * 4.5 + v * 6.5625) / (q + v)
    assert table["embeddings"][-1].weights == math.prod(SHAPES["token_embd.weight"])
    assert table["experts: down"][0].bits / table["experts: down"][0].weights == 6.5625


@pytest.mark.parametrize("case", FIRST, ids=str)
def test_every_matrix_of_a_known_family_is_in_the_picture(case: Case) -> None:
    """Vectors and single convolution kernels are too small to be seen."""
    shapes = {one.name: one.shape for one in case.model.gguf_tensors(case.stored)}
    matrices = {
        name
        for name, shape in shapes.items()
        if math.prod(shape) > max(shape) and name.endswith("weight")
    }
    assert dict(files._placed(shapes)).keys() == matrices


def test_files_are_drawn_under_one_another() -> None:
    with own_settings():
        heights = [
            opened(bits_picture([FileTypes("Q4_K_M", 5.0, TYPES)] * count, SHAPES)).shape[0]
            for count in (1, 2, MOST_FILES, MOST_FILES + 1)
        ]
    assert heights[0] < heights[1] < heights[2]
    assert 0 < heights[3] - heights[2] < 60  # only a line that says it


def test_a_model_without_such_tensors() -> None:
    with own_settings():
        opened(bits_picture([FileTypes("x", 5.0, {})], {"output_norm.weight": (64,)}))


def test_labels_are_short_and_plain() -> None:
    assert plain("Q4_K_M") == "Q4_K_M"
    assert plain("\u4e2d") == "?"
    assert len(plain("x" * 1000)) == 24


@pytest.mark.parametrize("count", [1, 2, 9, 10, 48, 94, 128, 512, 100_000])
def test_steps_are_round_and_few(count: int) -> None:
    found = steps(count, 10)
    assert 1 <= len(found) <= 10
    assert found[0] == 0
    assert found[-1] < count
