"""`verify --exact --source MODEL` catches 99 % of the damages."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.mutations.runs import Run
from tests.mutations.shares import MODELS, check


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("source")


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_damage_is_caught(model: str, place: Path) -> None:
    check(Run.SOURCE, model, place, 0.99)
