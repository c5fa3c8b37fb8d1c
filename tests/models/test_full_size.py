"""Published models at full size, from headers whose weights are holes in sparse files."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from reap2gguf.checkpoint.checkpoint import Checkpoint
from reap2gguf.models.table import describe
from reap2gguf.models.transformers_config import check_with_transformers
from tests.models.drawn import text_of
from tests.tiny import REPOSITORY

sys.path.append(str(REPOSITORY / "bench"))
BENCH = import_module("sparse_checkpoint")


@pytest.mark.parametrize("name", BENCH.SHAPES)
def test_a_published_model_is_described(name: str, tmp_path: Path) -> None:
    config, shapes = BENCH.SHAPES[name]
    BENCH.write(config, shapes(config), tmp_path / "model")
    with Checkpoint.open(tmp_path / "model") as checkpoint:
        model = describe(checkpoint)
        check_with_transformers(model)
        text: dict[str, Any] = text_of(config)
        assert model.facts.n_layers == text["num_hidden_layers"]
        assert model.facts.has_mtp == any("eh_proj" in n or "mtp." in n for n in model.names)
