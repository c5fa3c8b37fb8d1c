"""`verify` with the safetensors beside the GGUF files catches 95 % of the damages.

What agrees on both sides is not counted: only the source shows it.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.mutations.runs import Run
from tests.mutations.shares import MODELS, check


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("beside")


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_damage_is_caught(model: str, place: Path) -> None:
    check(Run.BESIDE, model, place, 0.95)
