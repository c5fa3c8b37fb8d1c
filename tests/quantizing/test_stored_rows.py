"""A part of stored rows is the float32 of that part."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from reap2gguf.quantizing.stored_rows import StoredRows

KINDS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@pytest.mark.parametrize("dtype", KINDS)
def test_a_part_is_that_of_all_values(dtype: str) -> None:
    values = torch.randn(6, 32, generator=torch.manual_seed(1)).to(KINDS[dtype])
    rows = StoredRows.of(values.view(torch.uint8).numpy().reshape(-1), dtype, 32)
    wanted = values.float().numpy()
    assert rows.shape == (6, 32)
    assert np.array_equal(rows.values, wanted)
    assert np.array_equal(rows[1:3, 8:16], wanted[1:3, 8:16])
    some = np.array([True, False, False, True, False, True])
    assert np.array_equal(rows[some], wanted[some])
    assert rows[0:1].dtype == np.float32


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize(
    ("values", "largest"),
    [
        ([0.5, -3.0, 2.0], 3.0),
        ([-0.5, 4.0, -2.0], 4.0),
        ([-0.5, -4.0, -2.0], 4.0),
        ([0.0, -0.0, 0.0], 0.0),
        ([1.0, float("inf"), 0.0], float("inf")),
        ([1.0, -float("inf"), 0.0], float("inf")),
        ([1.0, float("nan"), 0.0], float("inf")),
        ([1.0, -float("nan"), 0.0], float("inf")),
        ([], 0.0),
    ],
)
def test_the_largest_is_found_in_the_bits(dtype: str, values: list[float], largest: float) -> None:
    stored = torch.tensor(values).to(KINDS[dtype])
    rows = StoredRows.of(stored.view(torch.uint8).numpy(), dtype, max(1, len(values)))
    assert rows.largest == largest
