"""A choice with made-up figures."""

from __future__ import annotations

from reap2gguf.bundle.choice import CandidateRecord, ChoiceRecord, ChoiceText, Figures
from reap2gguf.bundle.estimate import Estimate
from reap2gguf.choosing.rule import best


def figures(divergence: float, behind: float, error: float = 0.01) -> Figures:
    return Figures(
        Estimate(10 + divergence, 0.1), Estimate(divergence, error), Estimate(behind, error)
    )


def candidate(
    name: str, held: float, other: tuple[float, float] | None, same_as: str | None = None
) -> CandidateRecord:
    """`other`: how far it is behind on the other text, and the error of that."""
    of_other = None if other is None else figures(1 + other[0], *other)
    return CandidateRecord(name, figures(held, held), of_other, same_as)


def choice(*candidates: CandidateRecord) -> ChoiceRecord:
    text = ChoiceText("rows of a text", "a" * 64, 2, 128, 64, Estimate(9.5, 0.2))
    other = None if candidates[0].other is None else text
    return ChoiceRecord(best(candidates).name, text, other, candidates)
