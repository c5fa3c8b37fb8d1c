from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reap2gguf.artifacts.observations import LayerObservation, Observations
from reap2gguf.checkpoint.checkpoint import Checkpoint
from reap2gguf.errors import ArtifactError, UsageError
from reap2gguf.models.description import ModelFacts
from reap2gguf.models.table import describe
from reap2gguf.pruning.methods import FROM_WEIGHTS, MERGING, METHODS, OBSERVED
from reap2gguf.pruning.select import (
    CRITERIA,
    Target,
    choose_target,
    friendly_count,
    fused_counts,
    is_fused,
    keep_best,
    select_experts,
)
from tests.tiny import TinyQwen3Moe


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> ModelFacts:
    folder = TinyQwen3Moe(n_layers=1).write(tmp_path_factory.mktemp("facts"))
    return describe(Checkpoint.open(folder)).facts


def observations(**arrays: list[float]) -> Observations:
    n_experts = len(next(iter(arrays.values())))
    zeros = {name: np.zeros(n_experts) for name in ("reap_sum", "gate_sum", "norm_sum", "norm_max")}
    given = {name: np.array(values, dtype=np.float64) for name, values in arrays.items()}
    count = given.pop("count", np.ones(n_experts)).astype(np.int64)
    layer = LayerObservation(count=count, **(zeros | given))
    return Observations({0: layer}, "fingerprint", "text", "hash", 1, 1, 0)


@pytest.mark.parametrize(
    ("experts", "ratio", "kept"),
    [
        (256, 0.32, 175),
        (256, 0.20, 205),
        (128, 0.5, 64),
        (100, 0.29, 71),
        (16, 0, 16),
        (8, 0.13, 7),
    ],
)
def test_compression_drops_the_floor(
    facts: ModelFacts, experts: int, ratio: float, kept: int
) -> None:
    target = choose_target(replace(facts, n_experts=experts), None, ratio)
    assert target == Target(experts, kept)


@pytest.mark.parametrize(
    ("experts", "ratio", "smallest"),
    [(8, 0.1, "0.125"), (16, 0.01, "0.0625"), (12, 0.08, "0.08334"), (256, 1e-9, "0.003907"),
     (128, 0.0078, "0.007813"), (3, 0.25, "0.3334")],
)  # fmt: skip
def test_a_ratio_that_drops_no_expert_is_refused(
    facts: ModelFacts, experts: int, ratio: float, smallest: str
) -> None:
    facts = replace(facts, n_experts=experts)
    with pytest.raises(UsageError) as caught:
        choose_target(facts, None, ratio)
    assert str(caught.value) == (
        f"--compression {ratio:g} of {experts} experts per layer drops none; --compression "
        f"{smallest} drops 1, and --compression 0 keeps all"
    )
    assert choose_target(facts, None, float(smallest)) == Target(experts, experts - 1)


def test_a_ratio_that_drops_none_where_none_can_be_dropped(facts: ModelFacts) -> None:
    facts = replace(facts, n_experts=2, experts_per_token=2)
    with pytest.raises(UsageError, match="drops none; this model needs 2 of them for each token"):
        choose_target(facts, None, None)
    assert not choose_target(facts, None, 0.0).prunes
    assert not choose_target(facts, 2, None).prunes


def test_a_ratio_that_drops_no_group(facts: ModelFacts) -> None:
    facts = replace(facts, n_experts=64, n_groups=4, groups_per_token=2)
    with pytest.raises(UsageError, match=r"--compression 0\.0625 drops 4"):
        choose_target(facts, None, 0.01)
    assert choose_target(facts, None, 0.0625) == Target(64, 60)


def test_a_quarter_goes_by_default(facts: ModelFacts) -> None:
    assert choose_target(facts, None, None) == Target(8, 6)


@pytest.mark.parametrize(
    ("keep", "ratio", "message"),
    [
        (9, None, "the model has 8 experts"),
        (1, None, "keep at least 2"),
        (None, 0.9, "keep at least 2"),
        (None, 1.0, "less than 1"),
        (None, -0.1, "0 or more"),
        (None, float("nan"), "0 or more"),
        (4, 0.5, "both set the number of experts"),
    ],
)
def test_numbers_the_model_cannot_run_with(
    facts: ModelFacts, keep: int | None, ratio: float | None, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        choose_target(facts, keep, ratio)


# count 4, 2, 0, 1: means are 12/4 = 3, 8/2 = 4, 0 (never routed), 2/1 = 2
SEEN = {
    "count": [4, 2, 0, 1],
    "reap_sum": [12, 8, 0, 2],
    "gate_sum": [1, 0.5, 0, 0.9],
    "norm_sum": [4, 10, 0, 9],
    "gate2_sum": [8, 2, 0, 3],
    "norm2_sum": [16, 6, 0, 5],
    "gate2_norm_sum": [20, 4, 0, 7],
    "gate_norm2_sum": [24, 12, 0, 1],
    "gate2_norm2_sum": [28, 14, 0, 6],
}


@pytest.mark.parametrize(
    ("method", "scores"),
    [
        ("reap", [3, 4, 0, 2]),
        ("frequency", [4, 2, 0, 1]),
        ("ean_sum", [4, 10, 0, 9]),
        ("ean_mean", [1, 5, 0, 9]),
        ("weighted_ean_sum", [12, 8, 0, 2]),
        ("weighted_frequency", [1, 0.5, 0, 0.9]),
        ("mix25", [3 * 4**0.25, 4 * 2**0.25, 0, 2]),
        ("mix50", [6, 4 * 2**0.5, 0, 2]),
        ("mix75", [3 * 4**0.75, 4 * 2**0.75, 0, 2]),
        ("gate_mean", [0.25, 0.25, 0, 0.9]),
        ("gate2_sum", [8, 2, 0, 3]),
        ("gate2_mean", [2, 1, 0, 3]),
        ("norm2_sum", [16, 6, 0, 5]),
        ("msan", [4, 3, 0, 5]),
        ("gate2_norm_sum", [20, 4, 0, 7]),
        ("gate2_norm_mean", [5, 2, 0, 7]),
        ("gate_norm2_sum", [24, 12, 0, 1]),
        ("gate_norm2_mean", [6, 6, 0, 1]),
        ("gate2_norm2_sum", [28, 14, 0, 6]),
        ("gate2_norm2_mean", [7, 7, 0, 6]),
    ],
)
def test_criteria(method: str, scores: list[float]) -> None:
    np.testing.assert_allclose(CRITERIA[method](observations(**SEEN).layers[0]), scores)


def test_every_criterion_can_be_asked_for() -> None:
    assert (*CRITERIA, *FROM_WEIGHTS, *MERGING) == METHODS


NEW = {name for name, one in OBSERVED.items() if one.gate == 2 or one.norm == 2}


@pytest.mark.parametrize("method", OBSERVED)
def test_observations_of_an_earlier_format(method: str, facts: ModelFacts) -> None:
    """What they lack is said; all else is chosen as before."""
    seen = observations(reap_sum=[3, 1, 2, 0, 0, 0, 0, 0], count=[1] * 8)
    if method not in NEW:
        assert len(select_experts(seen, method, Target(8, 4), facts)[0]) == 4
        return
    with pytest.raises(ArtifactError, match=r"an earlier version; run `reap2gguf observe` again"):
        select_experts(seen, method, Target(8, 4), facts)


def test_protected_experts_stay_whatever_they_score(facts: ModelFacts) -> None:
    scores = {0: np.arange(8.0)}
    assert keep_best(scores, Target(8, 3), facts) == {0: (5, 6, 7)}
    assert keep_best(scores, Target(8, 3), facts, {0: {1, 6}}) == {0: (1, 6, 7)}
    assert keep_best(scores, Target(8, 3), facts, {3: {1}}) == {0: (5, 6, 7)}
    grouped = replace(facts, n_groups=2)
    assert keep_best(scores, Target(8, 4), grouped, {0: {0, 1}}) == {0: (0, 1, 6, 7)}
    assert scores[0].tolist() == list(range(8)), "the scores are as they were"


def test_equal_scores_keep_the_lower_id(facts: ModelFacts) -> None:
    seen = observations(reap_sum=[1, 0, 1, 0, 0, 0, 2, 1])
    kept = select_experts(seen, "reap", Target(8, 4), facts)
    assert kept == {0: (0, 2, 6, 7)}
    kept = select_experts(seen, "reap", Target(8, 5), facts)
    assert kept == {0: (0, 1, 2, 6, 7)}


@given(scores=st.lists(st.floats(0, 1e6), min_size=8, max_size=8), n_kept=st.integers(2, 8))
def test_no_dropped_expert_beats_a_kept_one(
    facts: ModelFacts, scores: list[float], n_kept: int
) -> None:
    kept = select_experts(observations(reap_sum=scores), "reap", Target(8, n_kept), facts)[0]
    assert len(set(kept)) == n_kept
    assert list(kept) == sorted(kept)
    dropped = set(range(8)) - set(kept)
    assert all(scores[d] <= scores[k] for d in dropped for k in kept)


def test_observations_of_another_model(facts: ModelFacts) -> None:
    with pytest.raises(ArtifactError, match="layer 0 has 4 experts, expected 8"):
        select_experts(observations(**SEEN), "reap", Target(8, 4), facts)
    with pytest.raises(ArtifactError, match="1 layers, expected the model's 2"):
        select_experts(
            observations(reap_sum=[1.0] * 8),
            "reap",
            Target(8, 4),
            replace(facts, moe_layers=(0, 1)),
        )


@pytest.mark.parametrize(
    ("total", "kept", "friendly"),
    [(256, 205, 208), (256, 175, 176), (256, 192, 192), (60, 60, 60), (16, 12, 16), (16, 4, 8)],
)
def test_friendly_counts(total: int, kept: int, friendly: int) -> None:
    assert friendly_count(Target(total, kept), needed=4) == friendly


@pytest.mark.parametrize(
    ("total", "kept", "needed", "counts"),
    [
        (256, 192, 8, [128]), (128, 96, 8, [64]), (512, 384, 10, [288]), (768, 544, 8, [512, 576]),
        (768, 600, 8, [576]), (60, 45, 4, [32]), (16, 12, 10, []), (256, 20, 8, [16, 32]),
        (384, 288, 8, [256]), (1024, 700, 8, [576]),
    ],
)  # fmt: skip
def test_counts_of_the_fused_top_k(total: int, kept: int, needed: int, counts: list[int]) -> None:
    assert fused_counts(Target(total, kept), needed) == counts
    assert all(is_fused(count) for count in counts)


def test_llama_cpp_fuses_these_counts_alone() -> None:
    """`ggml_cuda_should_use_topk_moe` in ggml/src/ggml-cuda/topk-moe.cu."""
    powers = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]
    assert [n for n in range(1, 1025) if is_fused(n)] == sorted([*powers, 288, 576])


def test_scores_follow_the_example(example: Path) -> None:
    facts = describe(Checkpoint.open(example)).facts
    assert (facts.n_experts, facts.experts_per_token) == (16, 4)


@pytest.fixture
def grouped(facts: ModelFacts) -> ModelFacts:
    """Two groups of four experts; a token takes two experts of one group."""
    return replace(facts, n_groups=2, groups_per_token=1)


def test_every_group_keeps_the_same_number(grouped: ModelFacts) -> None:
    # by score alone, 0 to 3 would remain, all of one group
    seen = observations(reap_sum=[8.0, 7.0, 6.0, 5.0, 1.0, 4.0, 2.0, 3.0])
    target = choose_target(grouped, 4, None)
    assert select_experts(seen, "reap", target, grouped) == {0: (0, 1, 5, 7)}
    everyone = choose_target(grouped, 8, None)
    assert select_experts(seen, "reap", everyone, grouped) == {0: tuple(range(8))}


@pytest.mark.parametrize(
    ("keep", "per_token", "hint"),
    [
        (5, 2, "a multiple of 2 from 4 to 8; pass --keep-experts 4"),
        (7, 2, "pass --keep-experts 8"),
        (2, 2, "pass --keep-experts 4"),  # llama.cpp scores a group by two experts
        (4, 3, "a multiple of 2 from 6 to 8; pass --keep-experts 6"),  # one group gives three
    ],
)
def test_counts_that_groups_cannot_share(
    grouped: ModelFacts, keep: int, per_token: int, hint: str
) -> None:
    facts = replace(grouped, experts_per_token=per_token)
    with pytest.raises(UsageError, match=hint):
        choose_target(facts, keep, None)


def test_chosen_groups_share_the_experts_of_a_token(grouped: ModelFacts) -> None:
    facts = replace(grouped, experts_per_token=4, groups_per_token=2)
    assert choose_target(facts, 4, None) == Target(8, 4)
