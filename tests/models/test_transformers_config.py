from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import reap2gguf
from reap2gguf.building.plan import make_plan
from reap2gguf.errors import UnsupportedModelError
from reap2gguf.models.qwen3_moe import Qwen3Moe
from reap2gguf.models.transformers_config import check_with_transformers, transformers_config
from tests.building.builds import options
from tests.tiny import TinyQwen3Moe

CONFIG = TinyQwen3Moe().config()


def checked(**changes: Any) -> Qwen3Moe:
    model = Qwen3Moe(CONFIG | changes, "here/config.json")
    check_with_transformers(model)
    return model


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"use_cache": None}, "use_cache"),
        ({"use_cache": "yes"}, "use_cache"),
        ({"id2label": []}, "items"),
        ({"rms_norm_eps": 1}, "rms_norm_eps"),
        ({"router_aux_loss_coef": None}, "router_aux_loss_coef"),
        ({"num_labels": {}}, "num_labels|dict"),
        ({"problem_type": "single_label_classification", "num_labels": 1}, "problem_type"),
    ],
)
def test_a_config_that_transformers_refuses(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UnsupportedModelError, match=words) as caught:
        checked(**changes)
    assert str(caught.value).startswith("here/config.json: transformers cannot read the config (")
    assert "\n" not in str(caught.value)


def test_a_config_that_is_read_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    model = checked()
    values = model.config_values() | {"num_experts_per_tok": 3}
    monkeypatch.setattr(Qwen3Moe, "config_values", lambda self: values)
    with pytest.raises(UnsupportedModelError, match="num_experts_per_tok is read as 3 here and as"):
        check_with_transformers(model)


def test_a_leftover_of_quantization_is_not_passed_on() -> None:
    found = transformers_config(CONFIG | {"quantization_config": {"quant_method": "fp8"}})
    assert not hasattr(found, "quantization_config")


def test_nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    yarn = {"rope_type": "yarn", "factor": 3.0, "original_max_position_embeddings": 64}
    checked(rope_parameters=yarn, rope_theta=10000.0)
    assert capfd.readouterr() == ("", "")


def test_the_plan_asks_transformers(tmp_path: Path) -> None:
    folder = TinyQwen3Moe().write(tmp_path / "model")
    (folder / "config.json").write_text(json.dumps(CONFIG | {"use_cache": None}))
    with pytest.raises(UnsupportedModelError, match="use_cache"):
        make_plan(options(folder, tmp_path / "out"))
    with pytest.raises(UnsupportedModelError, match="use_cache"):
        reap2gguf.prune(folder, "none", tmp_path / "pruned", keep_experts=4)
