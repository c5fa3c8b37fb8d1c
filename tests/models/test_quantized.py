from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from reap2gguf.checkpoint.checkpoint import Checkpoint
from reap2gguf.errors import UnsupportedModelError
from reap2gguf.models.quantized import quantization_keys, without_quantization
from reap2gguf.models.table import describe
from reap2gguf.pruning.view import PrunedView
from tests.models.test_table import changed
from tests.tiny import REPOSITORY, TinyQwen3Moe, TinyQwen35Moe, save_sharded

LEFTOVER = {"quant_method": "bitsandbytes", "load_in_4bit": True}
QWEN3 = TinyQwen3Moe(vocab=4096, hidden=32)
NAME = "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
def test_a_leftover_key(key: str, tmp_path: Path) -> None:
    with changed(QWEN3.write(tmp_path / "m"), **{key: LEFTOVER}) as checkpoint:
        model = describe(checkpoint)
        (caveat,) = model.caveats()
        assert f"leftover {key} ('bitsandbytes')" in caveat
        view = PrunedView(checkpoint, model, dict.fromkeys(model.facts.moe_layers, (0, 1, 5)))
        assert key not in view.config
        assert view.model.caveats() == ()


def test_leftovers_in_sections(tmp_path: Path) -> None:
    tiny = TinyQwen35Moe(hidden=32, layers="lf")
    text = tiny.config()["text_config"] | {"quantization_config": LEFTOVER}
    with changed(tiny.write(tmp_path / "m"), text_config=text) as checkpoint:
        model = describe(checkpoint)
        assert any("text_config.quantization_config" in caveat for caveat in model.caveats())
        assert "quantization_config" not in model.pruned_config(3)["text_config"]


def test_null_is_no_leftover(tmp_path: Path) -> None:
    with changed(QWEN3.write(tmp_path / "m"), quantization_config=None) as checkpoint:
        assert describe(checkpoint).caveats() == ()


def quantized(folder: Path, changes: dict[str, Any]) -> Path:
    QWEN3.write(folder)
    save_sharded(QWEN3.tensors() | changes, folder, 1)
    return folder


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({NAME: torch.ones(64, 32, dtype=torch.uint8)}, "is stored as U8"),
        ({NAME: torch.ones(64, 32, dtype=torch.int8)}, "is stored as I8"),
        ({NAME: torch.ones(64, 32).to(torch.float8_e4m3fn)}, "is stored as F8_E4M3"),
        ({NAME: torch.ones(64, 32, dtype=torch.float64)}, "is stored as F64"),
        *[
            ({f"{NAME}{suffix}": torch.ones(2)}, "belongs to a quantized weight")
            for suffix in ("_scale", "_scale_inv", "_packed", ".absmax", ".quant_state.nf4")
        ],
        ({f"{NAME.removesuffix('weight')}qweight": torch.ones(2).int()}, "belongs to a quantized"),
        ({f"{NAME.removesuffix('weight')}scales": torch.ones(2)}, "belongs to a quantized weight"),
    ],
)
@pytest.mark.parametrize("has_key", [True, False])
def test_weights_that_are_quantized(
    has_key: bool, changes: dict[str, torch.Tensor], words: str, tmp_path: Path
) -> None:
    folder = quantized(tmp_path / "m", changes)
    more = {"quantization_config": {"quant_method": "awq"}} if has_key else {}
    with changed(folder, **more) as checkpoint, pytest.raises(UnsupportedModelError) as caught:
        describe(checkpoint)
    assert words in str(caught.value)
    assert next(iter(changes)) in str(caught.value)
    if "F64" not in words:
        assert ("quantization_config: 'awq'" in str(caught.value)) is has_key
        assert "pass the BF16 checkpoint" in str(caught.value)
        (page,) = re.findall(r"docs/\S+\.md", str(caught.value))
        assert (REPOSITORY / page).is_file()
        assert "{" not in str(caught.value)


def test_keys() -> None:
    config = {"quantization_config": "fp8", "a": 1, "text_config": {"compression_config": {}}}
    assert quantization_keys(config) == {
        "quantization_config": "'fp8'", "text_config.compression_config": "None",
    }  # fmt: skip
    assert without_quantization(config) == {"a": 1, "text_config": {}}
    assert list(quantization_keys({"quantization_config": {"quantization_config": 1}})) == [
        "quantization_config"
    ]


def test_a_folder_of_floats_opens(tmp_path: Path) -> None:
    with Checkpoint.open(quantized(tmp_path / "m", {NAME: torch.ones(64, 32).half()})) as opened:
        assert describe(opened)
