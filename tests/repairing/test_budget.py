"""Which way of holding the Gram matrix some memory leads to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from reap2gguf.errors import UsageError
from reap2gguf.machine import resident_bytes
from reap2gguf.observing.compute.ranks import Ranks
from reap2gguf.observing.decoder import StreamedDecoder
from reap2gguf.observing.sweep_plan import SweepContext
from reap2gguf.progress import Silent
from reap2gguf.pruning.view import PrunedView
from reap2gguf.repairing import budget
from reap2gguf.repairing.budget import RepairPlan, plan_repair
from reap2gguf.repairing.gram_size import GramSize
from reap2gguf.repairing.sweep import _Repaired
from tests.repairing.repairs import CPU, pruned_view, rows_of
from tests.tiny import TinyQwen3Moe

MIB = 2**20


@pytest.fixture
def view(tmp_path: Path) -> Iterator[PrunedView]:
    with pruned_view(TinyQwen3Moe().write(tmp_path / "model")) as found:
        yield found


def plan(view: PrunedView, memory: int | None, kind: str = "ridge") -> RepairPlan:
    settings = torch.float32, torch.device("cpu")
    with (
        closing(StreamedDecoder(view.source, view.source_model, *settings)) as original,
        closing(StreamedDecoder(view, view.model, *settings)) as decoder,
    ):
        context = SweepContext(decoder, _Repaired(view.model), Ranks(), Silent())
        options = replace(CPU, memory=memory)
        return plan_repair(context, original, rows_of(), options, kind)  # type: ignore[arg-type]


def test_the_gram_matrix_is_formed_where_it_fits_and_not_where_it_does_not(
    view: PrunedView, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"device": 900 * MIB, "host": 0, "never": MIB}
    monkeypatch.setattr(budget, "layer_size", lambda facts, way, on_gpu: GramSize(sizes[way], 0))
    room = resident_bytes() + 600 * MIB
    assert plan(view, room + 900 * MIB).way == "device"
    found = plan(view, room)
    assert found.way == "never"
    assert "never formed" in found.note
    assert found.sweep.budget.depth == 1


def test_too_little_memory_is_refused(view: PrunedView) -> None:
    with pytest.raises(UsageError, match=r"--memory .* is too small"):
        plan(view, MIB)


def test_a_scale_repair_solves_no_normal_equations(view: PrunedView) -> None:
    found = plan(view, None, kind="scale")
    assert (found.way, found.note) == ("", "repair: one number per expert, no Gram matrix")
