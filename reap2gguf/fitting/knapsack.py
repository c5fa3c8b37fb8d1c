"""Choosing one of several forms for each item, within a budget of bytes: a knapsack.

First the relaxed problem, in which an item may be cut between two forms: its forms that lie on the
lower convex hull of damage over bytes are taken in the order of what a byte saves. Its damage is a
lower bound for every choice. A second beginning is the best choice with bytes counted in coarse
units (dynamic programming): of few items, a cut one may be most of the damage. Then what is left of
the budget is filled: as long as one item in more bytes, or one in fewer and another in more, lowers
the damage, the best such change is made. The result is the better of both, and says the bound.

Everything is decided by numbers alone, and ties by position: equal input gives equal output.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from reap2gguf.errors import UsageError

if TYPE_CHECKING:
    import numpy.typing as npt

    Doubles = npt.NDArray[np.float64]
    Integers = npt.NDArray[np.int64]

_MAX_CHANGES = 2000  # while filling; each one lowers the damage, most problems need below 100
_UNITS = 20_000  # that a budget is counted in
_LEAST = 1e-12  # relative gain of a change: below it, sums of floats differ


@dataclass(frozen=True)
class Choice:
    """What was chosen, and how good it is at least."""

    chosen: Integers  # (N,) a form for each item
    n_bytes: int
    damage: float
    bound: float  # no choice within the budget has less damage

    @property
    def gap(self) -> float:
        """By which share the damage is above the bound, at most."""
        if self.damage <= self.bound:
            return 0.0
        return self.damage / self.bound - 1 if self.bound > 0 else float("inf")


def choose(sizes: Integers, damages: Doubles, budget: int) -> Choice:
    """The forms of N items with the least damage in all, in at most `budget` bytes.

    `sizes` and `damages` are (N, T); a form that an item cannot have has infinite damage. Raises
    UsageError if the smallest forms are larger than the budget.
    """
    items = np.arange(len(sizes))
    allowed = np.isfinite(damages)
    smallest = np.where(allowed, sizes, np.iinfo(np.int64).max)
    # of the smallest forms, the one with the least damage
    tied = smallest == smallest.min(axis=1, keepdims=True)
    chosen = np.where(tied, damages, np.inf).argmin(axis=1)
    least = int(sizes[items, chosen].sum())
    if least > budget:
        raise UsageError(
            f"the target leaves {budget:,} bytes for the tensors that are quantized, and in their "
            f"smallest types they have {least:,}; pass a larger target, or prune more"
        )
    bound = _relax(sizes, damages, budget, chosen)
    rounded = _rounded(sizes, damages, budget)
    for one in (chosen, rounded):
        _fill(sizes, damages, budget, one)
    if damages[items, rounded].sum() < damages[items, chosen].sum():
        chosen = rounded
    damage = float(damages[items, chosen].sum())
    return Choice(chosen, int(sizes[items, chosen].sum()), damage, min(max(bound, 0.0), damage))


def _hull(sizes: Integers, damages: Doubles, start: int) -> list[int]:
    """The forms of one item on its lower convex hull, from the smallest on."""
    order = np.lexsort((damages, sizes))
    hull = [start]
    for form in order:
        if not damages[form] < damages[hull[-1]]:
            continue
        while len(hull) > 1 and _rate(sizes, damages, hull[-2], hull[-1]) <= _rate(
            sizes, damages, hull[-1], form
        ):
            hull.pop()
        hull.append(int(form))
    return hull


def _rate(sizes: Integers, damages: Doubles, small: int, large: int) -> float:
    """What a byte saves between two forms."""
    return float((damages[small] - damages[large]) / (sizes[large] - sizes[small]))


def _relax(sizes: Integers, damages: Doubles, budget: int, chosen: Integers) -> float:
    """Take steps along the hulls while they fit, best first; the damage of the relaxed problem."""
    steps = []
    for item, start in enumerate(chosen):
        hull = _hull(sizes[item], damages[item], int(start))
        for small, large in pairwise(hull):
            rate = _rate(sizes[item], damages[item], small, large)
            steps.append((-rate, item, int(sizes[item, large] - sizes[item, small]), large))
    # steps of one item have falling rates, so that they come in their order
    steps.sort()
    items = np.arange(len(sizes))
    room = budget - int(sizes[items, chosen].sum())
    bound = float(damages[items, chosen].sum())
    stopped: set[int] = set()
    is_whole = True
    for slope, item, cost, large in steps:
        if is_whole:
            bound += slope * min(cost, room)
        is_whole = is_whole and cost <= room
        if cost > room:
            stopped.add(item)
        elif item not in stopped:
            chosen[item] = large
            room -= cost
    return bound


def _rounded(sizes: Integers, damages: Doubles, budget: int) -> Integers:
    """The best choice if bytes were counted in units, each form's rounded up: it fits as well.

    Its table has a byte for each item and unit.
    """
    allowed = np.isfinite(damages)
    least = np.where(allowed, sizes, np.iinfo(np.int64).max).min(axis=1)
    room = budget - int(least.sum())
    unit = max(1, -(-room // _UNITS))
    n_units = room // unit
    costs = -(-(sizes - least[:, None]) // unit)
    best = np.zeros(n_units + 1)
    taken = np.zeros((len(sizes), n_units + 1), np.uint8)
    for item in range(len(sizes)):
        found = np.full(n_units + 1, np.inf)
        for form in np.flatnonzero(allowed[item] & (costs[item] <= n_units)):
            cost = int(costs[item, form])
            with_it = best[: n_units + 1 - cost] + damages[item, form]
            is_better = with_it < found[cost:]
            found[cost:][is_better] = with_it[is_better]
            taken[item, cost:][is_better] = form
        best = found
    chosen, left = np.zeros(len(sizes), np.int64), n_units
    for item in reversed(range(len(sizes))):
        chosen[item] = taken[item, left]
        left -= int(costs[item, chosen[item]])
    return chosen


def _fill(sizes: Integers, damages: Doubles, budget: int, chosen: Integers) -> None:
    """Change one or two items at a time, the best change first, while the damage gets less."""
    items = np.arange(len(sizes))
    for _ in range(_MAX_CHANGES):
        now = sizes[items, chosen], damages[items, chosen]
        costs = sizes - now[0][:, None]
        with np.errstate(invalid="ignore"):
            gains = now[1][:, None] - damages  # -inf for what is not allowed
        room = budget - int(now[0].sum())
        changes = _best_change(costs, gains, room)
        if changes is None or changes[0] <= _LEAST * abs(float(now[1].sum())):
            return
        for item, form in changes[1]:
            chosen[item] = form


def _best_change(
    costs: Integers, gains: Doubles, room: int
) -> tuple[float, list[tuple[int, int]]] | None:
    """The gain of the best change that fits into `room`, and the forms that it gives to items."""
    forms = costs.shape[1]
    keep = np.flatnonzero(np.isfinite(gains).ravel() & (costs.ravel() != 0))
    if not keep.size:
        return None
    cost, gain, item = costs.ravel()[keep], gains.ravel()[keep], keep // forms
    order = np.argsort(cost, kind="stable")
    keep, cost, gain, item = keep[order], cost[order], gain[order], item[order]
    first, second = _best_so_far(gain, item)
    # for each change, the best other one of another item that then still fits; -1 is none
    place = np.searchsorted(cost, room - cost, side="right") - 1
    partner = np.where(place >= 0, first[place], -1)
    same = (partner >= 0) & (item[partner] == item)
    partner = np.where(same, second[place], partner)
    pairs = gain + np.where(partner >= 0, gain[partner], -np.inf)
    alone = np.where(cost <= room, gain, -np.inf)
    one, two = int(alone.argmax()), int(pairs.argmax())
    if pairs[two] > alone[one]:
        found = [two, int(partner[two])]
        return float(pairs[two]), [divmod(int(keep[k]), forms) for k in found]
    return float(alone[one]), [divmod(int(keep[one]), forms)]


def _best_so_far(gain: Doubles, item: Integers) -> tuple[Integers, Integers]:
    """Up to each position, the best one, and the best one of any other item; -1 if there is none.

    A position counts as soon as it is reached, so both are (M,).
    """
    first, second = np.full(len(gain), -1), np.full(len(gain), -1)
    best = other = -1
    for k in range(len(gain)):
        if best < 0 or gain[k] > gain[best]:
            if best >= 0 and item[best] != item[k]:
                other = best
            best = k
        elif item[k] != item[best] and (other < 0 or gain[k] > gain[other]):
            other = k
        first[k], second[k] = best, other
    return first, second
