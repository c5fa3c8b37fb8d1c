"""Blocks of four bits that a checkpoint and a GGUF file have alike: MXFP4, copied bit for bit.

gpt-oss stores the 32 values of a block as 16 bytes, of which each holds two neighbours, the first
one in its low half, and the exponents in a tensor beside it. A GGUF file has the exponent first,
and then 16 bytes of which byte j holds value j in its low half and value j + 16 in its high half
(ggml's block_mxfp4). The four bits of a value and the exponent mean the same in both.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from reap2gguf.checkpoint.quantized.mxfp4 import BLOCK, BLOCK_BYTES, check_exponents

if TYPE_CHECKING:
    from reap2gguf.checkpoint.weights import Weights
    from reap2gguf.models.description import GgufTensor, Slab

Bytes = npt.NDArray[np.uint8]


def read_blocks(weights: Weights, tensor: GgufTensor, slab: Slab, first: int, last: int) -> Bytes:
    """Rows [first, last) of a matrix as a GGUF file holds them: (last - first, bytes of a row).

    `tensor.block_type` is MXFP4: its rows are the ones that are stored, although the decoded values
    have them as columns. Raises CheckpointError for an exponent that is no number, and as
    `read_bytes` does. Memory: three times what it returns.
    """
    blocks_name, scales_name = weights.parts(slab.stored)
    stored, begin = weights.stored, slab.rows[0] if slab.rows else 0
    where = (begin + first * slab.step, begin + (last - 1) * slab.step + 1, slab.index)
    exponents = _bytes(stored, scales_name, where)[:: slab.step]
    check_exponents(exponents, stored, scales_name)
    found = np.empty((*exponents.shape, 1 + BLOCK_BYTES), np.uint8)
    found[..., 0] = exponents
    found[..., 1:] = _regrouped(_bytes(stored, blocks_name, where)[:: slab.step])
    return found.reshape(last - first, tensor.n_columns // BLOCK * (1 + BLOCK_BYTES))


def _bytes(stored: Weights, name: str, where: tuple[int, int, int | None]) -> Bytes:
    found = stored.read(name, *where)
    assert found.dtype == np.uint8
    return found.view(np.uint8)


def _regrouped(pairs: Bytes) -> Bytes:
    """Bytes (..., 16) of two neighbours each, as bytes of values 16 apart."""
    values = np.stack([pairs & 15, pairs >> 4], axis=-1).reshape(*pairs.shape[:-1], BLOCK)
    half = BLOCK // 2
    found: Bytes = values[..., :half] | (values[..., half:] << 4)
    return found
