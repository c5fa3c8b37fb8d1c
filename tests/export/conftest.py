"""A checkpoint whose rows fill blocks of 256, so that every type can hold it, and an imatrix."""

from __future__ import annotations

from pathlib import Path

import pytest
from exporting import gguf_tensors, random_imatrix
from tiny import TinyQwen3Moe

from reap2gguf.artifacts.imatrix import Imatrix


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shape = TinyQwen3Moe(hidden=256, width=256, n_experts=3, head_dim=64)
    return shape.write(tmp_path_factory.mktemp("wide") / "model")


@pytest.fixture(scope="module")
def imatrix(wide: Path) -> Imatrix:
    return random_imatrix(gguf_tensors(wide))
