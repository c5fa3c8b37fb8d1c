"""The ways of holding a layer's Gram matrix, and the bytes that each takes."""

from __future__ import annotations

from dataclasses import dataclass

WAYS = ("device", "host", "never")
# columns of a tile, about, and rows of Phi that are formed at once
TILE = {"cpu": 512, "cuda": 4096}
PIECE = {"cpu": 1024, "cuda": 8192}


@dataclass(frozen=True)
class GramSize:
    """Bytes that the normal equations of a layer take, where they are computed and on the host."""

    device: int
    host: int


def gram_size(
    way: str, n_experts: int, width: int, hidden: int, itemsize: int, on_gpu: bool
) -> GramSize:
    """What the equations of a layer and their solutions take, for results of `itemsize` bytes."""
    n, kind = n_experts * width, "cuda" if on_gpu else "cpu"
    # five arrays of a solution, those of its refinement in float64, and weights of alphas tried
    vectors = n * hidden * (5 * itemsize + 4 * 8 + 3 * itemsize)
    piece = PIECE[kind] * n * (2 if on_gpu else itemsize) if way != "never" else 0
    tile = max(TILE[kind], width)
    held = (n * n + 2 * n * tile) * itemsize  # the triangle and that of its factor
    blocks = 3 * n * width * itemsize
    if way == "device":
        return GramSize(vectors + piece + held, 0)
    if way == "host":
        return GramSize(vectors + piece + 3 * n * tile * itemsize, held)
    return GramSize(vectors + blocks, 0)
