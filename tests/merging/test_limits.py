"""What a merge refuses before anything is computed."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from reap2gguf.checkpoint.checkpoint import Checkpoint
from reap2gguf.errors import UnsupportedModelError, UsageError
from reap2gguf.machine import Processes
from reap2gguf.merging import limits
from reap2gguf.merging.limits import check_merge, check_mergeable, merged_layers
from reap2gguf.models.table import describe
from reap2gguf.pruning.protection import Protection, read_pinned
from reap2gguf.pruning.select import choose_target
from tests.families import nemotron
from tests.tiny import TinyQwen3Moe, TinyQwen35Moe


def a_model(
    layers: tuple[int, ...], mtp_layer: int | None, is_as_stored: bool = False, scales: bool = False
) -> Any:
    facts = SimpleNamespace(moe_layers=layers, mtp_layer=mtp_layer, architecture="SomeMoe")
    return cast(
        Any,
        SimpleNamespace(facts=facts, module_is_as_stored=is_as_stored, scales_experts=scales),
    )


@pytest.mark.parametrize(
    ("model", "problem"),
    [
        (a_model((1, 2), None, is_as_stored=True), "SomeMoe: --method ream is not defined"),
        (a_model((1, 2), None, scales=True), "experts that the router gives a factor each"),
        (a_model((2,), 2), "SomeMoe: only the multi-token-prediction block has experts"),
    ],
)
def test_a_family_that_it_is_not_defined_for_is_refused_by_name(model: Any, problem: str) -> None:
    with pytest.raises(UnsupportedModelError, match=problem):
        check_mergeable(model, "ream")


def test_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "processes", lambda: Processes(0, 2, 2))
    with pytest.raises(UsageError, match="without torchrun"):
        check_mergeable(a_model((0,), None), "ream")


def test_an_mtp_block_is_left_out(tmp_path: Path) -> None:
    with Checkpoint.open(TinyQwen35Moe(layers="lf").write(tmp_path / "model")) as checkpoint:
        model = describe(checkpoint)
        assert model.facts.mtp_layer == 2
        assert merged_layers(model) == [0, 1]


@pytest.mark.parametrize(
    ("keep", "method", "protect", "size", "problem"),
    [
        (8, "ream", "", 16, "all experts are kept, so there is nothing to merge"),
        (2, "ream", "", 3, "2 groups of that size cannot hold the 6 .* pass at least 4"),
        (4, "ream", "1:0-1", 2, "2 groups of that size cannot hold the 4 .* pass at least 3"),
        (2, "ream", "1:0-1", 16, "all 2 experts that stay are protected"),
        (4, "hc_smoe", "1:9", 16, "the model has no expert 9"),
    ],
)
def test_what_cannot_be_merged_is_refused(
    keep: int, method: str, protect: str, size: int, problem: str, tmp_path: Path
) -> None:
    with Checkpoint.open(TinyQwen3Moe().write(tmp_path / "model")) as checkpoint:
        model = describe(checkpoint)
        target = choose_target(model.facts, keep, None)
        protection = Protection(read_pinned(protect))
        with pytest.raises(UsageError, match=problem):
            check_merge(checkpoint, model, method, target, protection, size)


def test_the_experts_that_are_protected(tmp_path: Path) -> None:
    with Checkpoint.open(TinyQwen3Moe().write(tmp_path / "model")) as checkpoint:
        model = describe(checkpoint)
        target = choose_target(model.facts, 4, None)
        found = check_merge(checkpoint, model, "ream", target, Protection(read_pinned("1:5")), 16)
        assert found.all == {1: (5,)}
        with pytest.raises(UsageError, match="reads none"):
            check_merge(checkpoint, model, "ream", target, Protection((), True), 16)


def test_experts_without_a_gate_are_refused(tmp_path: Path) -> None:
    folder = nemotron.NANO.write(tmp_path / "model")
    with Checkpoint.open(folder) as checkpoint:
        model = describe(checkpoint)
        target = choose_target(model.facts, model.facts.n_experts // 2, None)
        with pytest.raises(UnsupportedModelError, match="experts without a gate"):
            check_merge(checkpoint, model, "ream", target, Protection(), 16)
