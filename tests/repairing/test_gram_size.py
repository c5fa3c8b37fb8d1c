"""Bytes of the normal equations of a layer."""

from __future__ import annotations

from reap2gguf.repairing.gram_size import WAYS, gram_size
from tests.repairing.layers import HIDDEN, N_EXPERTS, WIDTH


def test_each_way_holds_less_on_the_device_than_the_one_before() -> None:
    sizes = [gram_size(way, 64, 768, 2048, 4, on_gpu=True) for way in WAYS]
    assert sizes[0].device > sizes[1].device > sizes[2].device
    n = 64 * 768
    assert sizes[0].device > n * n * 4  # the triangle of the matrix and that of its factor
    assert sizes[1].host > n * n * 4
    assert sizes[2].host == 0


def test_sizes_grow_with_the_experts() -> None:
    small, large = (
        gram_size("device", count, WIDTH, HIDDEN, 8, on_gpu=False).device
        for count in (N_EXPERTS, 2 * N_EXPERTS)
    )
    assert large > small
