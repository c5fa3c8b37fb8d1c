"""Candidates by name, and which of them are one."""

from __future__ import annotations

import numpy as np
import pytest

from reap2gguf.artifacts.observations import Observations
from reap2gguf.artifacts.texts import ObservationRows
from reap2gguf.checkpoint.checkpoint import Checkpoint
from reap2gguf.choosing.candidates import first_with_same, kept_by
from reap2gguf.choosing.checks import check_unseen
from reap2gguf.errors import ArtifactError
from reap2gguf.models.table import describe
from reap2gguf.pruning.select import Target, select_experts
from tests.pruning.test_select import observations
from tests.tiny import TinyQwen3Moe

NAMES = ("reap", "frequency", "weighted_ean_sum")


def test_each_candidate_keeps_what_its_criterion_selects(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = TinyQwen3Moe(n_layers=1).write(tmp_path_factory.mktemp("candidates"))
    with Checkpoint.open(folder) as checkpoint:
        facts = describe(checkpoint).facts
    draw = np.random.default_rng(0)
    arrays = {name: draw.random(8).tolist() for name in ("reap_sum", "gate_sum", "norm_sum")}
    seen = observations(**arrays, count=draw.integers(1, 99, 8).tolist())
    kept = kept_by(NAMES, seen, Target(8, 4), facts)
    assert list(kept) == list(NAMES)
    for name in NAMES:
        assert kept[name] == select_experts(seen, name, Target(8, 4), facts)


def test_candidates_with_the_same_experts_are_measured_once() -> None:
    kept = {"a": {0: (0, 1)}, "b": {0: (0, 2)}, "c": {0: (0, 1)}, "d": {0: (0, 1)}}
    assert first_with_same(kept) == {"a": "a", "b": "b", "c": "a", "d": "a"}


def test_observations_that_may_have_read_held_out_rows_are_refused() -> None:
    rows = ObservationRows("mine.txt", "c" * 64, [np.arange(3)])
    seen = Observations({}, "model", "mine.txt", "c" * 64, 1, 3, 0)
    check_unseen(seen, rows, "o.safetensors")
    other = Observations({}, "model", "mine.txt", "d" * 64, 9, 30, 0)
    with pytest.raises(ArtifactError, match=r"o.safetensors: was observed on 9 rows .* the 1 rows"):
        check_unseen(other, rows, "o.safetensors")
