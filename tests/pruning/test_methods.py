from __future__ import annotations

from reap2gguf.pruning.methods import (
    FROM_WEIGHTS,
    MERGING,
    METHODS,
    OBSERVED,
    is_from_weights,
    merges,
    words_of,
)
from reap2gguf.pruning.select import CRITERIA


def test_every_method_has_a_formula_in_words() -> None:
    ranking = [name for name in METHODS if not merges(name)]
    assert set(ranking) == set(OBSERVED) | set(FROM_WEIGHTS)
    assert len(set(ranking)) == len(ranking) == len({words_of(name) for name in ranking})
    assert all(words_of(name) and not words_of(name).endswith(".") for name in ranking)
    assert [name for name in METHODS if merges(name)] == list(MERGING)
    assert words_of("none") == ""
    assert [name for name in METHODS if is_from_weights(name)] == ["aimer", "weight_norms"]


def test_formulas_differ_and_each_is_a_criterion() -> None:
    assert list(CRITERIA) == list(OBSERVED)
    assert len({(one.gate, one.norm, one.per) for one in OBSERVED.values()}) == len(OBSERVED)
