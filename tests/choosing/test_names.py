"""Candidates as they are named."""

from __future__ import annotations

import pytest

from reap2gguf.choosing.names import AUTO, BUILD_METHODS, CANDIDATES, check_candidates
from reap2gguf.errors import UsageError
from reap2gguf.options import BuildOptions
from reap2gguf.pruning.methods import METHODS, OBSERVED


def test_names_may_be_a_text_or_a_list() -> None:
    assert check_candidates("reap, frequency,reap") == ("reap", "frequency")
    assert check_candidates(["frequency"]) == ("frequency",)
    assert check_candidates(None) == CANDIDATES
    assert check_candidates("all") == tuple(OBSERVED)
    assert set(CANDIDATES) <= set(OBSERVED) <= set(METHODS)
    assert (*METHODS, AUTO) == BUILD_METHODS


@pytest.mark.parametrize("wrong", ["", "best", "auto", "reap,all", [], 3, [3], b"reap"])
def test_other_names_are_refused(wrong: object) -> None:
    with pytest.raises(UsageError, match="candidates"):
        check_candidates(wrong)


def test_options_without_auto_are_refused() -> None:
    for changes in ({"candidates": ("reap",)}, {"choose_text": "text.txt"}):
        with pytest.raises(UsageError, match="is for --method auto"):
            BuildOptions(**changes)  # type: ignore[arg-type]
    options = BuildOptions(method=AUTO, candidates="reap,frequency")  # type: ignore[arg-type]
    assert options.candidates == ("reap", "frequency")
