"""transformers' model of a pruned view is that of the folder which pruning writes."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from reap2gguf.checkpoint.checkpoint import Checkpoint
from reap2gguf.errors import UnsupportedModelError
from reap2gguf.models.table import describe
from reap2gguf.models.transformers_config import transformers_config
from reap2gguf.observing.decoder import StreamedDecoder
from reap2gguf.progress import Silent
from reap2gguf.pruning.view import PrunedView
from reap2gguf.pruning.write import write_pruned
from tests.tiny import TinyQwen3Moe, TinyQwen35Moe

SPECS = {
    "qwen3": (TinyQwen3Moe(), True),
    "qwen3-local-experts": (TinyQwen3Moe(count_key="num_local_experts", tied=True), True),
    "qwen3.5-nested": (TinyQwen35Moe(), True),
    "qwen3.5-mtp-dropped": (TinyQwen35Moe(vision=False), False),
    "qwen3.5-flat": (TinyQwen35Moe(nested=False), True),
}


def facts_of(config: Any) -> dict[str, Any]:
    """Everything a config object says, but for the folder that it was read from."""
    return {key: value for key, value in vars(config).items() if key != "_name_or_path"}


def plain(value: Any) -> Any:
    """Nested config objects as their classes and values."""
    if hasattr(value, "to_dict"):
        return type(value), {key: plain(inner) for key, inner in facts_of(value).items()}
    return value


@pytest.mark.parametrize("which", SPECS)
def test_the_config_is_that_of_the_written_folder(which: str, tmp_path: Path) -> None:
    spec, keep_mtp = SPECS[which]
    with Checkpoint.open(spec.write(tmp_path / "source")) as source:
        model = describe(source, keep_mtp=keep_mtp)
        view = PrunedView(source, model, dict.fromkeys(model.facts.moe_layers, (0, 2, 3, 5, 6)))
        (tmp_path / "pruned").mkdir()
        write_pruned(view, tmp_path / "pruned", Silent())
    before = copy.deepcopy(view.config)
    found = transformers_config(view.config)
    wanted = AutoConfig.from_pretrained(tmp_path / "pruned", local_files_only=True)
    assert plain(found) == plain(wanted)
    assert plain(found.get_text_config()) == plain(wanted.get_text_config())
    assert found.get_text_config().num_experts == 5
    assert view.config == before


def build(folder: Path, changes: dict[str, Any]) -> StreamedDecoder:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with Checkpoint.open(folder) as checkpoint:
        model = describe(checkpoint)
        return StreamedDecoder(checkpoint, model, torch.float32, torch.device("cpu"))


@pytest.mark.parametrize("model_type", ["qwen3_5_moe_unheard_of", ["qwen3_5_moe"], None])
def test_a_model_type_that_transformers_does_not_know(model_type: Any, tmp_path: Path) -> None:
    folder = TinyQwen35Moe().write(tmp_path / "odd")
    with pytest.raises(UnsupportedModelError, match="model_type is"):
        build(folder, {"model_type": model_type})


def test_code_that_comes_with_a_model_is_not_run(tiny: Path) -> None:
    (tiny / "evil.py").write_text("raise SystemExit('run')")
    build(tiny, {"auto_map": {"AutoConfig": "evil.Config"}}).close()
