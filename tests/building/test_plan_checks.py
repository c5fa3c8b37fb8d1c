"""What a plan refuses of a model and of given files, before anything is computed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from reap2gguf.building.plan import make_plan
from reap2gguf.errors import CalibrationError, Reap2ggufError
from reap2gguf.gguf_files.imatrix import save_gguf
from reap2gguf.options import CalibrationOptions
from tests.building.builds import options
from tests.exporting.files import gguf_tensors, random_imatrix
from tests.tiny import TinyQwen3Moe


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = TinyQwen3Moe(hidden=256, width=256, head_dim=64)
    return made.write(tmp_path_factory.mktemp("checks") / "tiny")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dequantize": "bf16", "compression": 0}, "no expert is removed, so no safetensors"),
        ({"repair": "ridge", "compression": 0}, "--repair"),
        ({"protect": "*:0-7"}, "are protected and"),
        ({"protect": "0:9"}, "the model has no expert 9"),
        ({"method": "ream", "group_size": 2, "keep_experts": 2}, "groups of that size cannot hold"),
    ],
)
def test_what_this_model_rules_out(
    model: Path, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(Reap2ggufError, match=words):
        make_plan(options(model, tmp_path, **changes))


def test_types_that_a_given_matrix_does_not_allow(model: Path, tmp_path: Path) -> None:
    whole = random_imatrix(gguf_tensors(model))
    entries = {name: one for name, one in whole.entries.items() if "ffn_down" not in name}
    file = tmp_path / "some.gguf"
    save_gguf(replace(whole, entries=entries), file)
    changes = {"compression": 0, "recipes": ("IQ2_XXS",), "imatrix": file}
    with pytest.raises(Reap2ggufError, match="has none for it"):
        make_plan(options(model, tmp_path, **changes))


def test_a_calibration_is_looked_at_where_it_is_read(model: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.jsonl").write_text("{")
    broken = CalibrationOptions(str(tmp_path / "broken.jsonl"), samples=4, max_length=128)
    with pytest.raises(CalibrationError, match=r"broken\.jsonl"):
        make_plan(options(model, tmp_path, calibration=broken))
    file = tmp_path / "all.gguf"
    save_gguf(random_imatrix(gguf_tensors(model)), file)
    plan = make_plan(options(model, tmp_path, calibration=broken, compression=0, imatrix=file))
    assert not plan.reads_calibration
