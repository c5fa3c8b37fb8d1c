"""MXFP4 decodes to what transformers decodes it to, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from reap2gguf.checkpoint.checkpoint import Checkpoint
from reap2gguf.errors import CheckpointError
from tests.checkpoint.quantized.test_float8 import bits
from tests.tiny import save_sharded

NAME = "model.layers.0.mlp.experts.gate_up_proj"
SECTION = {"quantization_config": {"quant_method": "mxfp4"}}


def write(folder: Path, blocks: torch.Tensor, scales: torch.Tensor) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(SECTION))
    save_sharded({f"{NAME}_blocks": blocks, f"{NAME}_scales": scales}, folder, 1)
    return folder


def test_transformers(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (3, 10, 5, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(60, 200, (3, 10, 5), generator=generator, dtype=torch.uint8)
    theirs = convert_moe_packed_tensors(blocks, scales)
    assert theirs.shape == (3, 160, 10)
    with Checkpoint.open(write(tmp_path / "m", blocks, scales)) as opened:
        assert (opened.tensors[NAME].dtype, opened.kind(NAME)) == ("BF16", "MXFP4")
        assert torch.equal(bits(opened, NAME), theirs)
        assert torch.equal(bits(opened.dequantized(), NAME), theirs)
        for expert, first, last in ((0, 0, 160), (1, 3, 4), (2, 31, 97), (2, 159, 160)):
            rows = opened.read_float32(NAME, first, last, expert)
            np.testing.assert_array_equal(rows, theirs[expert, first:last].float().numpy())


@pytest.mark.parametrize(("scale", "words"), [(255, "which is NaN"), (254, "beyond a bfloat16")])
def test_exponents_without_a_value(scale: int, words: str, tmp_path: Path) -> None:
    blocks = torch.full((1, 2, 1, 16), 0x77, dtype=torch.uint8)
    scales = torch.full((1, 2, 1), 252, dtype=torch.uint8)
    with Checkpoint.open(write(tmp_path / "large", blocks, scales)) as opened:
        assert opened.read_float32(NAME).max() == 6 * 2.0**125
    scales[0, 1] = scale
    with (
        Checkpoint.open(write(tmp_path / "m", blocks, scales)) as opened,
        pytest.raises(CheckpointError, match=words),
    ):
        opened.read_float32(NAME)
