"""How much text a build scores to measure quality.

That depends on counts alone, and not on the machine: the same inputs make the same bundle.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from reap2gguf.choosing import amounts

if TYPE_CHECKING:
    from reap2gguf.artifacts.texts import Texts
    from reap2gguf.building.needs.amount import Amount
    from reap2gguf.building.plan import Plan

CHUNK = 512  # tokens
MOST_CHUNKS = 64
_FEWEST_CHUNKS = 8  # fewer say little: their perplexity is uncertain by more than 5 %
_SHARE = 0.2  # of the tokens that the other passes read


def chunks_to_score(choice: str, n_tokens: int, n_variants: int) -> int:
    """How many chunks are scored; 0 if nothing is measured.

    choice: auto, always or never    n_tokens: what the other passes of the build read
    """
    if choice == "never":
        return 0
    if choice == "always":
        return MOST_CHUNKS
    affordable = int(_SHARE * n_tokens / n_variants) // CHUNK
    return min(affordable, MOST_CHUNKS) if affordable >= _FEWEST_CHUNKS else 0


def planned_chunks(plan: Plan, amount: Amount) -> int:
    """The same of a plan, by what is known of its texts."""
    n_tokens = amount.n_tokens * plan.observes + amount.n_chunk_tokens * plan.computes_imatrix
    return chunks_to_score(plan.options.evaluate, n_tokens, plan.n_variants)


def chunks_of(plan: Plan, texts: Texts | None) -> int:
    """The same of a plan whose texts were read."""
    rows = texts.rows if texts is not None and plan.observes else None
    chunks = texts.chunks if texts is not None and plan.computes_imatrix else None
    read = [*(rows.rows if rows else ()), *(chunks.chunks if chunks else ())]
    n_tokens = sum(len(row) for row in read)
    return chunks_to_score(plan.options.evaluate, n_tokens, plan.n_variants)


WEIGHED_TOKENS = 16 * CHUNK  # on which numbers of experts are weighed


def weighed_variants(plan: Plan) -> list[int]:
    """The numbers of experts that go through the layers to be weighed: the source's, and fewer."""
    n_all = plan.model.facts.n_experts
    return [n_all, *(count for count in plan.counts if count < n_all)]


def chosen_tokens(amount: Amount) -> int:
    """Tokens that a method is chosen on, about: rows that are held out, and the other text."""
    held = min(amount.n_tokens // (amounts.ONE_IN - 1), amounts.MOST_HELD_TOKENS)
    return held + amounts.MOST_CHUNKS * amounts.CHUNK
