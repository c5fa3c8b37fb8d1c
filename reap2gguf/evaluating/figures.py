"""Figures from what was found at every scored token: perplexity, divergence, standard errors.

Tokens count as independent of one another, as in llama-perplexity, whose formulas of perplexity,
its error, and the error of a ratio of two perplexities these are
(https://github.com/ggml-org/llama.cpp/tree/master/tools/perplexity).

Letters: S scored tokens, at least 2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from reap2gguf.bundle.bounds import LARGEST_PERPLEXITY
from reap2gguf.bundle.evaluation import Divergence, Estimate

Doubles = npt.NDArray[np.float64]


@dataclass(frozen=True)
class TokenPair:
    """What two variants, a reference and another, predicted at each scored token: arrays (S,)."""

    divergence: Doubles  # KL divergence of the other from the reference, in nats
    same_top: npt.NDArray[np.bool_]  # whether both have the same likeliest token
    reference_nll: Doubles  # negative log-likelihood of the right token, in nats
    other_nll: Doubles


def perplexity(nll: Doubles) -> Estimate:
    """exp(mean) of the negative log-likelihoods (S,) of the right tokens.

    Raises OverflowError where it, or its error, is larger than a record may say.
    """
    value = math.exp(nll.mean())
    found = Estimate(value, value * _error_of_mean(nll))
    if max(found.value, found.error) > LARGEST_PERPLEXITY:
        raise OverflowError
    return found


def divergence(pair: TokenPair) -> Divergence:
    """All figures of a comparison."""
    ordered = np.sort(pair.divergence)
    change = np.exp(-pair.other_nll) - np.exp(-pair.reference_nll)
    return Divergence(
        mean=mean_of(pair.divergence),
        median=_quantile(ordered, 0.5),
        p90=_quantile(ordered, 0.9),
        p99=_quantile(ordered, 0.99),
        p999=_quantile(ordered, 0.999),
        maximum=float(ordered[-1]),
        same_top=mean_of(pair.same_top.astype(np.float64)),
        rms_probability=_root_mean_square(change),
        perplexity_ratio=_perplexity_ratio(pair),
    )


def mean_of(values: Doubles) -> Estimate:
    """The mean of at least two values, and its standard error."""
    return Estimate(float(values.mean()), _error_of_mean(values))


def _error_of_mean(values: Doubles) -> float:
    """The standard error of a mean of at least two values."""
    return float(values.std(ddof=1) / math.sqrt(len(values)))


def _root_mean_square(values: Doubles) -> Estimate:
    squares = values**2
    root = math.sqrt(float(squares.mean()))
    # d sqrt(m) = dm / (2 sqrt(m))
    return Estimate(root, _error_of_mean(squares) / (2 * root) if root else 0.0)


def _perplexity_ratio(pair: TokenPair) -> Estimate:
    """The error is small where both are wrong at the same tokens: that is in the difference."""
    change = pair.other_nll - pair.reference_nll
    ratio = math.exp(change.mean())
    return Estimate(ratio, ratio * _error_of_mean(change))


def _quantile(ordered: Doubles, share: float) -> Estimate:
    """A quantile of sorted values, between two of them where it falls there, and its error.

    How many of n values are below the quantile is binomial. The error is half the distance between
    the values one standard deviation of that count below and above.
    """
    last = len(ordered) - 1
    place = share * last
    spread = math.sqrt(len(ordered) * share * (1 - share))
    places = np.clip([place - spread, place, place + spread], 0, last)
    low, value, high = np.interp(places, np.arange(len(ordered)), ordered)
    return Estimate(float(value), float(high - low) / 2)
