"""MXFP4 of a checkpoint is MXFP4 of a GGUF file, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from safetensors.torch import save_file

from reap2gguf.checkpoint.checkpoint import Checkpoint
from reap2gguf.errors import CheckpointError
from reap2gguf.ggml import load_ggml
from reap2gguf.gguf_files.rows import read_rows
from reap2gguf.gguf_files.stored_blocks import read_blocks
from reap2gguf.models.description import GgufTensor, Slab

E, ROWS, BLOCKS = 2, 6, 3  # experts, rows of gate and up in turn, blocks of a row
SLABS = {
    "all rows": Slab("x.w", 1, transposed=True),
    "gates": Slab("x.w", 1, (0, ROWS), 2, transposed=True),
    "ups": Slab("x.w", 0, (1, ROWS), 2, transposed=True),
}


@pytest.fixture
def stored() -> dict[str, torch.Tensor]:
    """Every byte of codes, and exponents from the least to the largest."""
    random = np.random.default_rng(0)
    codes = random.integers(0, 256, (E, ROWS, BLOCKS, 16), np.uint8)
    exponents = random.integers(0, 253, (E, ROWS, BLOCKS), np.uint8)
    exponents.reshape(-1)[:2] = 0, 252
    return {"x.w_blocks": torch.from_numpy(codes), "x.w_scales": torch.from_numpy(exponents)}


def opened(folder: Path, stored: dict[str, torch.Tensor]) -> Checkpoint:
    section = {"quantization_config": {"quant_method": "mxfp4"}}
    (folder / "config.json").write_text(json.dumps(section))
    save_file(stored, folder / "model.safetensors")
    return Checkpoint.open(folder)


def tensor_of(slab: Slab) -> GgufTensor:
    n_rows = ROWS // slab.step
    return GgufTensor("t", (E, n_rows, BLOCKS * 32), (slab,) * E, block_type=Type.MXFP4)


@pytest.mark.parametrize("name", SLABS)
@pytest.mark.parametrize("part", [(0, 3), (1, 2), (2, 3)])
def test_values_are_those_that_are_decoded(
    name: str, part: tuple[int, int], tmp_path: Path, stored: dict[str, torch.Tensor]
) -> None:
    """By libggml, which is another program than the one that decodes the checkpoint."""
    slab = SLABS[name]
    tensor = tensor_of(slab)
    with opened(tmp_path, stored) as checkpoint:
        raw = read_blocks(checkpoint, tensor, slab, *part)
        expected = read_rows(checkpoint, tensor, slab, *part)
    found = load_ggml().dequantize(raw, Type.MXFP4)
    np.testing.assert_array_equal(found, expected)


def test_nibbles_and_exponents_are_the_stored_ones(
    tmp_path: Path, stored: dict[str, torch.Tensor]
) -> None:
    slab = SLABS["gates"]
    with opened(tmp_path, stored) as checkpoint:
        raw = read_blocks(checkpoint, tensor_of(slab), slab, 0, 3).reshape(3, BLOCKS, 17)
    for row in range(3):
        for block in range(BLOCKS):
            codes = stored["x.w_blocks"][1, 2 * row, block].tolist()
            values = [half for byte in codes for half in (byte & 15, byte >> 4)]
            mine = raw[row, block].tolist()
            assert mine[0] == stored["x.w_scales"][1, 2 * row, block]
            assert [byte & 15 for byte in mine[1:]] == values[:16]
            assert [byte >> 4 for byte in mine[1:]] == values[16:]


def test_an_exponent_that_is_no_number(tmp_path: Path, stored: dict[str, torch.Tensor]) -> None:
    stored["x.w_scales"][1, 2, 0] = 255
    slab = SLABS["gates"]
    with opened(tmp_path, stored) as checkpoint:
        read_blocks(checkpoint, tensor_of(slab), slab, 0, 1)
        with pytest.raises(CheckpointError, match=r"'x\.w_scales' holds 255, which is NaN"):
            read_blocks(checkpoint, tensor_of(slab), slab, 1, 2)
