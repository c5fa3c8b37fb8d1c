"""What a repair refuses before anything is computed."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from reap2gguf.errors import UnsupportedModelError, UsageError
from reap2gguf.machine import Processes
from reap2gguf.repairing import limits
from reap2gguf.repairing.limits import LEAST_ROWS, check_repairable, check_rows, repaired_layers
from tests.repairing.repairs import pruned_view
from tests.tiny import TinyQwen35Moe


def a_model(layers: tuple[int, ...], mtp_layer: int | None, is_as_stored: bool = False) -> Any:
    facts = SimpleNamespace(moe_layers=layers, mtp_layer=mtp_layer, architecture="SomeMoe")
    return cast(Any, SimpleNamespace(facts=facts, module_is_as_stored=is_as_stored))


def test_an_mtp_block_is_left_out(tmp_path: Path) -> None:
    with pruned_view(TinyQwen35Moe(layers="lf").write(tmp_path / "model")) as view:
        assert sorted(view.kept) == [0, 1, 2]
        assert repaired_layers(view.model) == [0, 1]
        check_repairable(view.model)


@pytest.mark.parametrize(
    ("model", "problem"),
    [
        (a_model((1, 2), None, is_as_stored=True), "SomeMoe: --repair is not defined"),
        (a_model((2,), 2), "SomeMoe: only the multi-token-prediction block has experts"),
    ],
)
def test_a_family_that_it_is_not_defined_for_is_refused_by_name(model: Any, problem: str) -> None:
    with pytest.raises(UnsupportedModelError, match=problem):
        check_repairable(model)


def test_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "processes", lambda: Processes(0, 2, 2))
    with pytest.raises(UsageError, match="without torchrun"):
        check_repairable(a_model((0,), None))


def test_rows_are_counted() -> None:
    check_rows(LEAST_ROWS)
    with pytest.raises(UsageError, match=f"has 15 rows, expected at least {LEAST_ROWS}"):
        check_rows(LEAST_ROWS - 1)
