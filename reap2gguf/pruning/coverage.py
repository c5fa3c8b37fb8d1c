"""How many calibration tokens reached each expert, and whether that is enough to rank it.

REAP's score is a mean over the tokens that the router sent to an expert. The error of a mean of n
values that differ by as much as their mean is about 1 / sqrt(n) of it: 10 % at 100 tokens, which is
more than the scores of experts near the cut differ. Tokens of one row resemble each other, so the
real error is larger. Memory: one number per expert.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from reap2gguf.bundle.manifest import CoverageRecord, ImportanceRecord

if TYPE_CHECKING:
    from reap2gguf.artifacts.observations import Observations
    from reap2gguf.pruning.select import Kept

THIN = 100  # tokens; the score of an expert with fewer is noisy
Counts = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Coverage:
    """The tokens of some experts, of one layer or of several together."""

    n_experts: int
    fewest: int  # tokens of the expert with the fewest
    median: int  # rounded down
    n_unseen: int  # experts that no token reached
    n_thin: int  # experts with fewer than THIN tokens, those without any included
    most: int = 0  # tokens of the expert with the most

    @classmethod
    def of(cls, counts: Counts) -> Coverage:
        """The coverage of experts with these numbers of tokens."""
        if not len(counts):
            return cls(0, 0, 0, 0, 0)
        unseen, thin = int((counts == 0).sum()), int((counts < THIN).sum())
        few, many = int(counts.min()), int(counts.max())
        return cls(len(counts), few, int(np.median(counts)), unseen, thin, many)


def coverage(observations: Observations, layers: Iterable[int] | None = None) -> Coverage:
    """The coverage of all experts of some layers, or of every layer."""
    return Coverage.of(_counts(observations, layers))


def _counts(observations: Observations, layers: Iterable[int] | None = None) -> Counts:
    chosen = observations.layers if layers is None else layers
    found = [observations.layers[layer].count for layer in chosen]
    return np.concatenate(found) if found else np.zeros(0, np.int64)


def coverage_of_kept(observations: Observations, kept: Kept) -> Coverage:
    """The coverage of the experts that stay."""
    found = [observations.layers[layer].count[list(ids)] for layer, ids in kept.items()]
    return Coverage.of(np.concatenate(found) if found else np.zeros(0, np.int64))


def coverage_record(observations: Observations, kept: Kept) -> CoverageRecord:
    """The coverage of a pruning, for its manifest."""
    every, stay = coverage(observations, kept), coverage_of_kept(observations, kept)
    return CoverageRecord(
        fewest=every.fewest,
        median=every.median,
        n_unseen=every.n_unseen,
        n_unseen_kept=stay.n_unseen,
        n_thin=every.n_thin,
        n_thin_kept=stay.n_thin,
        thin_below=THIN,
    )


def importance_record(tokens: Mapping[int, Sequence[int]]) -> ImportanceRecord | None:
    """The tokens of an importance matrix by layer and expert, for a manifest; None without any."""
    if not tokens:
        return None
    every = Coverage.of(np.concatenate([np.asarray(one, np.int64) for one in tokens.values()]))
    return ImportanceRecord(
        fewest=every.fewest,
        median=every.median,
        n_unseen=every.n_unseen,
        n_few=every.n_thin,
        few_below=THIN,
        tokens={layer: tuple(one) for layer, one in tokens.items()},
    )


def coverage_line(found: Coverage) -> str:
    """The coverage in one line."""
    unseen = ""
    if found.n_unseen:
        unseen = (
            f" ({found.n_unseen:,} of {found.n_experts:,} experts {_were(found.n_unseen)} never "
            "seen)"
        )
    return (
        f"experts: fewest tokens {found.fewest:,}{unseen}, median {found.median:,} tokens per "
        "expert"
    )


def recorded_line(found: CoverageRecord) -> str:
    """The coverage that a manifest records, in one line."""
    return (
        f"experts: fewest tokens {found.fewest:,}, median {found.median:,} tokens per expert; of "
        f"those that stay, {found.n_thin_kept:,} saw fewer than {found.thin_below:,}"
    )


def observed_notes(observations: Observations) -> list[str]:
    """What to tell of observations before experts are chosen: coverage, and a warning if thin."""
    found = coverage(observations)
    lines = [coverage_line(found)]
    if found.n_thin:
        lines.append(
            f"warning: {_experts(found.n_thin, found.n_experts)} fewer than {THIN} tokens, so "
            "their scores are noisy; use more --samples"
        )
    return lines


def selection_notes(observations: Observations, kept: Kept) -> list[str]:
    """What to tell of a choice of experts: coverage, and which thin experts stay or go."""
    every, stay = coverage(observations, kept), coverage_of_kept(observations, kept)
    lines = [coverage_line(every)]
    n_removed = every.n_experts - stay.n_experts
    if every.n_thin and n_removed:
        lines.append(
            f"warning: {stay.n_thin:,} of {stay.n_experts:,} kept and "
            f"{every.n_thin - stay.n_thin:,} of {n_removed:,} removed experts have fewer than "
            f"{THIN} tokens, so their scores are noisy; use more --samples"
        )
    if every.n_unseen and n_removed:
        lines.append(_of_unseen(stay.n_unseen, every.n_unseen - stay.n_unseen))
    return lines


def _of_unseen(n_kept: int, n_removed: int) -> str:
    """What became of experts that all have the lowest score, 0."""
    total = n_kept + n_removed
    if not n_kept:
        which = f"{_of(total)} that {_were(total)} never seen {'is' if total == 1 else 'are'}"
        return f"warning: {which} removed; a score without tokens is 0"
    return (
        f"warning: of {_of(total)} that {_were(total)} never seen, {n_kept:,} stay and "
        f"{n_removed:,} go. Their scores are equal (0), so their numbers decided: the lower ones "
        "stay"
    )


def _of(count: int) -> str:
    return f"{count:,} {'expert' if count == 1 else 'experts'}"


def _were(count: int) -> str:
    return "was" if count == 1 else "were"


def _experts(count: int, total: int) -> str:
    return f"{count:,} of {total:,} experts {'has' if count == 1 else 'have'}"
