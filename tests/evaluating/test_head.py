"""Which hidden states of a spool the head is given, and how few are loaded at a time."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st

from reap2gguf.evaluating.head import ScoredBatch, parts_of
from reap2gguf.evaluating.head_cut import SPAN, Cut, HeadShape
from reap2gguf.observing.spool import DeviceSpool, Span

CPU = torch.device("cpu")


class CountingSpool(DeviceSpool):
    """Each state is the number of its position; what is announced must be what is loaded next."""

    def __init__(self, n_positions: int) -> None:
        super().__init__(n_positions, 2, torch.float32, CPU)
        self._held[:] = torch.arange(n_positions)[:, None]
        self.longest = 0
        self.announced: Span | None = None

    def load(self, span: Span, following: Span | None = None) -> torch.Tensor:
        assert self.announced in (None, span)
        self.announced = following
        self.longest = max(self.longest, span[1] - span[0])
        return super().load(span)


@given(
    batches=st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=40), min_size=1, max_size=3),
    most=st.integers(1, 50),
)
def test_all_scored_states_come_in_their_order(batches: list[list[int]], most: int) -> None:
    spool = CountingSpool(100 * len(batches))
    scored: list[ScoredBatch] = []
    first = 0
    for number, places in enumerate(batches):
        positions = torch.tensor(sorted(places))  # some are predicted at one position
        span = 100 * number, 100 * number + 100
        scored.append(ScoredBatch(span, positions, positions + span[0], first, True))
        first += len(places)
    run: Any = SimpleNamespace(decoder=SimpleNamespace(device=CPU), spool=spool)
    seen = 0
    for part in parts_of(scored, {"one": run}, most):
        assert part.place == slice(seen, seen + len(part.right))
        assert 1 <= len(part.right) <= most
        assert torch.equal(part.hidden["one"][:, 0].long(), part.right)
        seen = part.place.stop
    assert seen == first
    assert spool.longest <= SPAN * most
    assert spool.announced is None


def test_a_cut_fits_and_leaves_room_for_hidden_states() -> None:
    for usable in (2**24, 2**26, 2**28, 2**30, 2**33):
        shape = HeadShape(248_320, 8192, n_heads=5, n_variants=5, n_threads=2)
        cut = Cut.into(usable, shape, "cpu")
        weights = 2 * 5 * cut.block * 8192
        taken = weights + cut.tokens * (4 * 14 * cut.block + 44 * 8192)
        assert cut.n_bytes(shape) == taken
        assert taken <= usable or cut == Cut(256, 16)
    assert cut == Cut(8192, 256)
