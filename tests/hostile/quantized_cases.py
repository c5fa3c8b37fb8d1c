"""Quantized checkpoints whose configs and headers say what cannot be."""

from __future__ import annotations

import json
import struct
from typing import Any

from tests.hostile.room import PLAN, Build, Case, Room, change_json
from tests.hostile.shard_cases import read

Q = "model.layers.0.self_attn.q_proj.weight"


def quantized(method: Any, stored: dict[str, Any], **section: Any) -> Build:
    """`plan` of a model that calls itself quantized, with a weight stored in other parts.

    `stored` are the parts by what their names add to the weight's: type and shape.
    """

    def build(room: Room) -> list[Any]:
        model = room.copy("qwen3")
        header, data = read(model / "model.safetensors")
        del header[Q]
        end, raw = 0, b""
        for name, entry in list(header.items()):
            if name[:2] == "__":
                continue
            first, last = entry["data_offsets"]
            raw += data[first:last]
            header[name] = entry | {"data_offsets": [end, end + last - first]}
            end += last - first
        for suffix, (dtype, shape, n_bytes) in stored.items():
            header[Q + suffix] = {
                "dtype": dtype,
                "shape": shape,
                "data_offsets": [end, end + n_bytes],
            }
            raw, end = raw + bytes(n_bytes), end + n_bytes
        text = json.dumps(header).encode()
        (model / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + raw)
        said = {"quant_method": method, **section}
        change_json(model / "config.json", lambda values: values.update(quantization_config=said))
        return ["plan", model, *PLAN]

    return build


def packed(**weights: Any) -> Build:
    """Packed whole numbers, of which the config says this."""
    given = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32} | weights
    stored = {
        "_packed": ("I32", [64, 8], 2048),
        "_scale": ("BF16", [64, 2], 256),
        "_shape": ("I64", [2], 16),
    }
    groups = {"g": {"weights": given}}
    return quantized("compressed-tensors", stored, format="pack-quantized", config_groups=groups)


FP8 = {"": ("F8_E4M3", [64, 64], 4096), "_scale_inv": ("F32", [1, 1], 4)}
QUANTIZED = [
    Case("block of 10^30 rows", quantized("fp8", FP8, weight_block_size=[10**30, 1]), "10000"),
    Case("block of NaN", quantized("fp8", FP8, weight_block_size=["NaN", 1]), "weight_block_size"),
    Case("a million blocks", quantized("fp8", FP8, weight_block_size=[1] * 10**6), "[rows"),
    Case("block of no columns", quantized("fp8", FP8, weight_block_size=[1, 0]), "[1, 0]"),
    Case("blocks of one value", quantized("fp8", FP8, weight_block_size=[1, 1]), "[64, 64]"),
    Case("an empty scale", quantized(
        "fp8", FP8 | {"_scale_inv": ("F32", [0, 1], 0)}, weight_block_size=[64, 64]), "[0, 1]"),
    Case("an empty FP8 weight", quantized("fp8", FP8 | {"": ("F8_E4M3", [0, 64], 0)}), "[0, 64]"),
    Case("a method of a megabyte", quantized("f" * 10**6, FP8), "in a way that is not decoded"),
    Case("a method that is an object", quantized({"fp8": 1}, FP8), "in a way that is not decoded"),
    Case("group of 2^70 columns", packed(group_size=2**70), "group_size is"),
    Case("group of 2^20 columns", packed(group_size=2**20), "expected 262144 words per row"),
    Case("bits as text", packed(num_bits="4"), "which is not decoded"),
    Case("10^9 bits", packed(num_bits=10**9), "which is not decoded"),
    Case("blocks of nothing", quantized(
        "mxfp4", {"_blocks": ("U8", [8, 0, 2, 16], 0), "_scales": ("U8", [8, 0, 2], 0)}), "[8, 0"),
]  # fmt: skip
