"""Experts that stay whatever they score, and what is said where that is not possible."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reap2gguf.artifacts.observations import LayerObservation, Observations
from reap2gguf.errors import ArtifactError, UsageError
from reap2gguf.models.description import ModelFacts
from reap2gguf.pruning.protection import (
    ProtectedExperts,
    Protection,
    named_experts,
    protected_experts,
    protection_notes,
    read_pinned,
    super_experts,
)
from reap2gguf.pruning.select import Target
from tests.pruning.test_select import facts

__all__ = ["facts"]  # a fixture


def named(text: str, facts: ModelFacts) -> dict[int, tuple[int, ...]]:
    return named_experts(read_pinned(text), facts.moe_layers, facts.n_experts)


def test_what_a_text_names(facts: ModelFacts) -> None:
    facts = replace(facts, moe_layers=(1, 2, 4), n_experts=8)
    assert named("", facts) == {}
    assert named("1:3", facts) == {1: (3,)}
    assert named("1:3, 1:5,4:0", facts) == {1: (3, 5), 4: (0,)}
    assert named("*:3", facts) == {1: (3,), 2: (3,), 4: (3,)}
    assert named("1-3:5-7", facts) == {1: (5, 6, 7), 2: (5, 6, 7)}
    assert named("2:*", facts) == {2: tuple(range(8))}
    assert named("*:1,2:1-2", facts) == {1: (1,), 2: (1, 2), 4: (1,)}


@pytest.mark.parametrize(
    "text",
    ["3", "3:", ":3", "a:3", "3:x", "3:4:5", "3:4-", "3:-4", "-1:3", "*-2:3", "3:5-4", "4-1:0",
     "1:2,", ",", "1:2;3:4", "1:٣", "1:1e3", "1:9999999"],
)  # fmt: skip
def test_texts_that_name_nothing(text: str) -> None:
    with pytest.raises(UsageError, match="--protect") as caught:
        read_pinned(text)
    assert "\n" not in str(caught.value)


@given(st.text(max_size=30))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        found = read_pinned(text)
    except UsageError:
        return
    assert all(one.experts is None or one.experts[0] <= one.experts[1] for one in found)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("5:0", "the model has no experts in that layer; those with experts are 1-2, 4"),
        ("0:0", "the model has no experts in that layer"),
        ("3:0", "the model has no experts in that layer"),
        ("1-9:0", "the model has no experts in that layer"),
        ("1:8", "the model has no expert 8; each layer has 0 to 7"),
        ("*:6-9", "the model has no expert 9"),
    ],
)
def test_experts_that_do_not_exist(text: str, message: str, facts: ModelFacts) -> None:
    facts = replace(facts, moe_layers=(1, 2, 4), n_experts=8)
    with pytest.raises(UsageError, match=message):
        named(text, facts)


def test_more_protected_experts_than_stay(facts: ModelFacts) -> None:
    wanted = Protection(read_pinned("0:0-3"))
    assert protected_experts(wanted, None, Target(8, 4), facts).all == {0: (0, 1, 2, 3)}
    with pytest.raises(UsageError, match="layer 0: 4 experts are protected and 3 stay"):
        protected_experts(wanted, None, Target(8, 3), facts)
    grouped = replace(facts, n_groups=2)
    with pytest.raises(UsageError, match="layer 0, group 0: 4 experts are protected and 2 stay"):
        protected_experts(wanted, None, Target(8, 4), grouped)
    halves = Protection(read_pinned("0:2-5"))
    assert protected_experts(halves, None, Target(8, 4), grouped).all == {0: (2, 3, 4, 5)}


def observed(peaks: np.ndarray) -> Observations:
    """Observations whose experts have these largest values, (layers, E)."""
    layers = {}
    for layer, values in enumerate(peaks):
        ones = [np.ones(len(values)) for _ in range(9)]
        layers[layer] = LayerObservation(np.ones(len(values), np.int64), *ones, values)
    return Observations(layers, "fingerprint", "text", "hash", 1, 1, 0)


def reference(peaks: np.ndarray) -> dict[int, tuple[int, ...]]:
    """The rule of CerebrasResearch/reap's `get_super_expert_indices`, computed by torch."""
    flat = torch.from_numpy(peaks.astype(np.float32)).flatten()
    limit = max(torch.quantile(flat, 0.995).item(), flat.max().item() / 10)
    first = int(len(peaks) * 0.75)
    pairs = torch.argwhere(torch.from_numpy(peaks.astype(np.float32)) > limit).tolist()
    found: dict[int, tuple[int, ...]] = {}
    for layer, expert in pairs:
        if layer < first:
            found[layer] = (*found.get(layer, ()), expert)
    return found


@pytest.mark.parametrize("seed", range(8))
def test_super_experts_are_those_of_reap(seed: int, facts: ModelFacts) -> None:
    generator = np.random.default_rng(seed)
    peaks = generator.gamma(2.0, 1.0, (12, 64)).astype(np.float32)
    for _ in range(5):  # outliers, some of them in the last quarter of the layers
        peaks[generator.integers(12), generator.integers(64)] *= generator.uniform(5, 400)
    model = replace(facts, n_experts=64, moe_layers=tuple(range(12)), n_layers=12)
    found = super_experts(observed(peaks.astype(np.float64)), model)
    assert found == reference(peaks)
    assert found, "the outliers are found"


def test_the_block_of_multi_token_prediction_is_left_out(facts: ModelFacts) -> None:
    peaks = np.ones((5, 64))
    peaks[0, 3], peaks[4, 5] = 100, 1e6
    model = replace(facts, n_experts=64, n_layers=4, moe_layers=tuple(range(5)), has_mtp=True)
    assert super_experts(observed(peaks), model) == {0: (3,)}


def test_observations_without_largest_values(facts: ModelFacts) -> None:
    ones = [np.ones(8) for _ in range(4)]
    old = {0: LayerObservation(np.ones(8, np.int64), *ones)}
    seen = Observations(old, "fingerprint", "text", "hash", 1, 1, 0)
    with pytest.raises(ArtifactError, match="run `reap2gguf observe` again"):
        super_experts(seen, facts)
    with pytest.raises(UsageError, match="--protect-super-experts finds them by observations"):
        protected_experts(Protection(super_experts=True), None, Target(8, 4), facts)


def test_notes(facts: ModelFacts) -> None:
    assert protection_notes(ProtectedExperts(), Protection()) == []
    found = ProtectedExperts({0: (1, 2)}, {0: (2,), 1: (4, 5, 6)})
    assert found.all == {0: (1, 2), 1: (4, 5, 6)}
    assert protection_notes(found, Protection(read_pinned("0:1-2"), super_experts=True)) == [
        "protected: 2 experts that --protect names",
        "super experts: 4 experts found and protected (layer 0: 2; layer 1: 4-6)",
    ]
    none = protection_notes(ProtectedExperts(), Protection(super_experts=True))
    assert none == ["super experts: 0 experts found and protected"]
