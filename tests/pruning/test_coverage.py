"""How many tokens reached each expert, and what is said where they are few."""

from __future__ import annotations

import numpy as np

from reap2gguf.artifacts.observations import LayerObservation, Observations
from reap2gguf.bundle.manifest import CoverageRecord
from reap2gguf.pruning.coverage import (
    THIN,
    Coverage,
    coverage,
    coverage_record,
    observed_notes,
    selection_notes,
)


def seen(*counts: list[int]) -> Observations:
    """Layers whose experts were reached by these numbers of tokens."""
    layers = {}
    for number, of_layer in enumerate(counts):
        values = np.array(of_layer, dtype=np.float64)
        layers[number] = LayerObservation(values.astype(np.int64), values, values, values, values)
    return Observations(layers, "fingerprint", "text", "hash", 1, 1, 0)


def test_the_numbers_of_several_layers() -> None:
    observations = seen([0, 99, 100, 500], [700, 800, 0, 900])
    assert coverage(observations) == Coverage(8, 0, 300, 2, 3, 900)
    assert coverage(observations, [1]) == Coverage(4, 0, 750, 1, 1, 900)
    assert coverage(observations, []) == Coverage(0, 0, 0, 0, 0)
    record = coverage_record(observations, {0: (1, 2, 3), 1: (2, 3)})
    assert record == CoverageRecord(
        fewest=0, median=300, n_unseen=2, n_unseen_kept=1, n_thin=3, n_thin_kept=2, thin_below=THIN
    )


def test_enough_tokens_are_one_line() -> None:
    observations = seen([100, 640, 700])
    line = "experts: fewest tokens 100, median 640 tokens per expert"
    assert observed_notes(observations) == [line]
    assert selection_notes(observations, {0: (1, 2)}) == [line]


def test_few_tokens_are_a_warning() -> None:
    line, warning = observed_notes(seen([0, 99, 100, 5000], [0, 0, 640, 640]))
    assert line == (
        "experts: fewest tokens 0 (3 of 8 experts were never seen), median 99 tokens per expert"
    )
    assert warning == (
        "warning: 4 of 8 experts have fewer than 100 tokens, so their scores are noisy; use more "
        "--samples"
    )
    assert observed_notes(seen([99, 100]))[1].startswith("warning: 1 of 2 experts has fewer")


def test_few_tokens_among_kept_and_removed() -> None:
    _, thin, unseen = selection_notes(seen([0, 99, 100, 5000, 60]), {0: (1, 2, 3)})
    assert thin == (
        "warning: 1 of 3 kept and 2 of 2 removed experts have fewer than 100 tokens, so their "
        "scores are noisy; use more --samples"
    )
    assert unseen == "warning: 1 expert that was never seen is removed; a score without tokens is 0"


def test_experts_that_were_never_seen_and_stay() -> None:
    lines = selection_notes(seen([0, 0, 0, 5000]), {0: (0, 1, 3)})
    assert lines[2] == (
        "warning: of 3 experts that were never seen, 2 stay and 1 go. Their scores are equal (0), "
        "so their numbers decided: the lower ones stay"
    )


def test_no_warning_where_nothing_is_removed() -> None:
    assert len(selection_notes(seen([0, 5]), {0: (0, 1)})) == 1
