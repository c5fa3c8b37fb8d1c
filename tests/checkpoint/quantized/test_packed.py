"""Packed whole numbers decode to what compressed-tensors decodes them to, bit for bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

from reap2gguf.checkpoint.checkpoint import Checkpoint
from reap2gguf.errors import CheckpointError
from tests.checkpoint.quantized.test_float8 import bits
from tests.quantized import as_packed
from tests.tiny import TinyQwen3Moe, save_sharded


@pytest.mark.parametrize(("group", "n_bits"), [(32, 4), (16, 4), (0, 4), (32, 8)])
def test_compressed_tensors(group: int, n_bits: int, tmp_path: Path) -> None:
    case = as_packed(TinyQwen3Moe(), group, n_bits)
    how = {"strategy": "group", "group_size": group} if group else {"strategy": "channel"}
    args = QuantizationArgs(num_bits=n_bits, type="int", symmetric=True, **how)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    stored = case.tensors()
    with Checkpoint.open(case.write(tmp_path / "m")) as opened:
        rounded = opened.dequantized()
        names = [n.removesuffix("_packed") for n in stored if n.endswith("_packed")]
        assert len(names) > 10
        for name in names:
            parts = ("packed", "scale", "shape")
            state = {f"weight_{part}": stored[f"{name}_{part}"] for part in parts}
            theirs = PackedQuantizationCompressor.decompress(state, scheme)["weight"]
            assert theirs.dtype == torch.bfloat16
            assert torch.equal(bits(rounded, name), theirs)
            # of float32 scales, it makes what this program reads before any rounding
            state["weight_scale"] = state["weight_scale"].float()
            exact = PackedQuantizationCompressor.decompress(state, scheme)["weight"]
            np.testing.assert_array_equal(opened.read_float32(name), exact.numpy())


def test_their_packing_is_read(tmp_path: Path) -> None:
    """What compressed-tensors itself packs, of a width that leaves half a word empty."""
    case = as_packed(TinyQwen3Moe(hidden=60, width=36, head_dim=15), 12)
    folder, stored = case.write(tmp_path / "m"), case.tensors()
    args = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=12)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    name = "model.layers.0.mlp.experts.3.down_proj.weight"
    weight, scale = case.plain.tensors()[name], stored[f"{name}_scale"]
    made = PackedQuantizationCompressor.compress({"weight": weight, "weight_scale": scale}, scheme)
    save_sharded(stored | {f"{name}_packed": made["weight_packed"]}, folder, 1)
    with Checkpoint.open(folder) as opened:
        assert opened.tensors[name].shape == (60, 36)
        theirs = PackedQuantizationCompressor.decompress(made, scheme)["weight"]
        assert torch.equal(bits(opened.dequantized(), name), theirs)


def test_a_shape_that_is_another(tmp_path: Path) -> None:
    case = as_packed(TinyQwen3Moe())
    folder, tensors = case.write(tmp_path / "m"), case.tensors()
    name = "model.layers.0.mlp.experts.3.down_proj.weight"
    tensors[f"{name}_shape"] = torch.tensor([32, 64])
    save_sharded(tensors, folder, 1)
    with (
        Checkpoint.open(folder) as opened,
        pytest.raises(CheckpointError, match=r"weight_shape' is \[32, 64\], expected \[64, 32\]"),
    ):
        opened.read_float32(name)
