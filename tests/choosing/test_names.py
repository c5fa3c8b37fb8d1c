"""Candidates as they are named."""

from __future__ import annotations

import pytest

from reap2gguf.choosing.names import (
    AUTO,
    BEST_REPAIRED,
    BUILD_METHODS,
    CANDIDATES,
    check_candidates,
    criteria_of,
    split_name,
)
from reap2gguf.errors import UsageError
from reap2gguf.options import BuildOptions
from reap2gguf.pruning.methods import METHODS, OBSERVED


def test_names_may_be_a_text_or_a_list() -> None:
    assert check_candidates("reap, frequency,reap") == ("reap", "frequency")
    assert check_candidates(["frequency"]) == ("frequency",)
    assert check_candidates(None) == CANDIDATES
    assert check_candidates("all") == (*OBSERVED, BEST_REPAIRED)
    assert check_candidates("best+repair,reap") == ("reap", BEST_REPAIRED)
    assert set(criteria_of(CANDIDATES)) <= set(OBSERVED) <= set(METHODS)
    assert BEST_REPAIRED in CANDIDATES
    assert (*METHODS, AUTO) == BUILD_METHODS


@pytest.mark.parametrize(
    "wrong", ["", "best", "auto", "reap,all", [], 3, [3], b"reap", "best+repair"]
)
def test_other_names_are_refused(wrong: object) -> None:
    with pytest.raises(UsageError, match="candidates"):
        check_candidates(wrong)


def test_a_repaired_candidate_is_named_after_its_criterion() -> None:
    assert split_name("weighted_ean_sum+repair") == ("weighted_ean_sum", True)
    assert split_name("reap") == ("reap", False)


def test_options_without_auto_are_refused() -> None:
    for changes in ({"candidates": ("reap",)}, {"choose_text": "text.txt"}):
        with pytest.raises(UsageError, match="is for the method auto"):
            BuildOptions(**changes)  # type: ignore[arg-type]
    options = BuildOptions(method=AUTO, candidates="reap,frequency")  # type: ignore[arg-type]
    assert options.candidates == ("reap", "frequency")
