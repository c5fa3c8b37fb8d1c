from __future__ import annotations

from typing import Any

import pytest

from reap2gguf.checkpoint.quantized.settings import Blocks, Settings, read_settings
from tests.quantized import compressed_section, fp8_section

_FLOATS = {"num_bits": 8, "type": "float"}


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        (fp8_section((128, 128)), Settings("fp8", float8=Blocks(128, 128))),
        (fp8_section(None), Settings("fp8", float8=Blocks(None, None))),
        (
            fp8_section((128, 128)) | {"fmt": "float8_e4m3fn"},
            Settings("fp8", float8=Blocks(128, 128)),
        ),
        ({"quant_method": "mxfp4"}, Settings("mxfp4")),
        (
            compressed_section("float-quantized", strategy="channel", **_FLOATS),
            Settings("compressed-tensors", float8=Blocks(1, None)),
        ),
        (
            compressed_section("naive-quantized", strategy="tensor", **_FLOATS)
            | {"sparsity_config": {"format": "dense"}},
            Settings("compressed-tensors", float8=Blocks(None, None)),
        ),
        (
            compressed_section("pack-quantized", num_bits=4, strategy="group", group_size=128),
            Settings("compressed-tensors", packed=Blocks(1, 128), bits=4),
        ),
        (
            compressed_section("pack-quantized", num_bits=8, type="int", strategy="channel"),
            Settings("compressed-tensors", packed=Blocks(1, None), bits=8),
        ),
        ({"quant_method": "gptq", "bits": 4}, None),
        ({"quant_method": 8}, None),
        ("fp8", None),
    ],
)
def test_what_is_said(section: Any, expected: Settings | None) -> None:
    for config in (
        {"quantization_config": section},
        {"compression_config": section},
        {"text_config": {"quantization_config": section}},
    ):
        assert read_settings(config, "config.json") == expected


def test_two_sections_say_nothing() -> None:
    config = {"quantization_config": fp8_section(None), "compression_config": fp8_section(None)}
    assert read_settings(config, "config.json") is None
    assert read_settings({}, "config.json") is None
