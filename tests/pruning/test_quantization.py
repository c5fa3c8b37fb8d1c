"""Lists of modules in `quantization_config` name the experts that remain."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from reap2gguf.checkpoint.checkpoint import Checkpoint
from reap2gguf.errors import UnsupportedModelError
from reap2gguf.models.table import describe
from reap2gguf.pruning.quantization import pruned_quantization
from reap2gguf.pruning.view import PrunedView
from tests.families.deepseek import V3
from tests.models.test_table import changed
from tests.quantized import as_fp8, as_packed
from tests.tiny import TinyQwen3Moe

TINY = TinyQwen3Moe()
KEPT = {0: (1, 3, 4), 1: (0, 6, 7)}
AT = "model.layers.{}.mlp.experts.{}"
GIVEN = [
    "lm_head",
    AT.format(0, 3),
    AT.format(0, 2) + ".up_proj",
    AT.format(1, 7) + ".down_proj",
    AT.format(1, 13) + ".down_proj",
    "model.layers.0.mlp.gate",
    "model.layers.7.mlp.experts.3",  # no such layer
    "re:.*self_attn.*",
    "re:.*mlp.experts.*",
    r"re:.*mlp\.experts\.\d+\.(gate|up)_proj",
    "re:.*mlp.experts.[0-9]+.down_proj",
    r"re:.*mlp\.(gate|up|gate_up|down)_proj.*",
    r"re:.*experts\.(gate|up)_proj",
]
EXPECTED = [
    "lm_head",
    AT.format(0, 1),
    AT.format(1, 2) + ".down_proj",
    "model.layers.0.mlp.gate",
    "model.layers.7.mlp.experts.3",
    "re:.*self_attn.*",
    "re:.*mlp.experts.*",
    r"re:.*mlp\.experts\.\d+\.(gate|up)_proj",
    "re:.*mlp.experts.[0-9]+.down_proj",
    r"re:.*mlp\.(gate|up|gate_up|down)_proj.*",
    r"re:.*experts\.(gate|up)_proj",
]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"modules_to_not_convert": GIVEN}, {"modules_to_not_convert": EXPECTED}),
        (
            {"ignore": GIVEN, "config_groups": {"a": {"targets": GIVEN, "weights": {"b": [1, 2]}}}},
            {
                "ignore": EXPECTED,
                "config_groups": {"a": {"targets": EXPECTED, "weights": {"b": [1, 2]}}},
            },
        ),
        (
            {"weight_block_size": [128, 128], "fmt": "e4m3"},
            {"weight_block_size": [128, 128], "fmt": "e4m3"},
        ),
        ({"modules_to_not_convert": None}, {"modules_to_not_convert": None}),
    ],
)
def test_lists(given: dict[str, Any], expected: dict[str, Any], tmp_path: Path) -> None:
    with Checkpoint.open(TINY.write(tmp_path / "m")) as opened:
        model = describe(opened)
        for key in ("quantization_config", "compression_config"):
            found = pruned_quantization({"n": 3}, {"n": 8, key: given}, model, KEPT)
            assert found == {"n": 3, key: expected}
        nested = {"t": {"n": 8, "quantization_config": given}}
        found = pruned_quantization({"t": {"n": 3}}, nested, model, KEPT)
        assert found == {"t": {"n": 3, "quantization_config": expected}}


@pytest.mark.parametrize(
    "pattern", [r"re:.*experts\.3\..*", "re:.*experts.[0-4].up_proj", r"re:.*\.experts\.(1|2)\."]
)
def test_patterns_with_numbers(pattern: str, tmp_path: Path) -> None:
    folder = as_packed(TINY).write(tmp_path / "m")
    section = as_packed(TINY).section | {"ignore": [pattern]}
    with changed(folder, quantization_config=section) as opened:
        with pytest.raises(UnsupportedModelError, match="--dequantize bf16"):
            PrunedView(opened, describe(opened), KEPT)
        rounded = opened.dequantized()
        assert "quantization_config" not in PrunedView(rounded, describe(rounded), KEPT).config


def test_a_block_of_multi_token_prediction(tmp_path: Path) -> None:
    """It is decoder layer 3 of three, and has its own experts."""
    case = as_fp8(V3, (48, 40), "model.layers.3.mlp.experts.5", "model.layers.3.eh_proj")
    with Checkpoint.open(case.write(tmp_path / "m")) as opened:
        model = describe(opened)
        kept = dict.fromkeys(model.facts.moe_layers, (0, 1, 4, 5, 8, 9, 12, 13))
        view = PrunedView(opened, model, kept)
        assert view.stored.config["quantization_config"]["modules_to_not_convert"] == [
            "model.layers.3.mlp.experts.3", "model.layers.3.eh_proj", "lm_head",
        ]  # fmt: skip
        assert view.tensors["model.layers.3.mlp.experts.3.up_proj.weight"].dtype == "BF16"


def test_a_router_that_is_quantized(tmp_path: Path) -> None:
    case = as_fp8(TINY)
    case = type(case)(
        TINY, case.scheme, case.quantize, case.section, ("embed_tokens", "lm_head", "norm")
    )
    with Checkpoint.open(case.write(tmp_path / "m")) as opened:
        with pytest.raises(
            UnsupportedModelError, match=r"router 'model.layers.0.mlp.gate.weight' is"
        ):
            PrunedView(opened, describe(opened), KEPT)
        rounded = opened.dequantized()
        view = PrunedView(rounded, describe(rounded), KEPT)
        assert view.tensors["model.layers.0.mlp.gate.weight"].shape == (3, 64)
