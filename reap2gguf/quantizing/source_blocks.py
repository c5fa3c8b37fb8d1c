"""What is said of tensors that keep the blocks of a GGUF source where a recipe gives their type."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from reap2gguf.checkpoint.weights import Weights
    from reap2gguf.hub.retry import Note
    from reap2gguf.quantizing.resolve import ResolvedRecipe

FULL_TYPES = frozenset(("F32", "F16", "BF16"))  # in which a source has lost little


def blocks_line(recipe: ResolvedRecipe) -> str:
    """How many tensors of a file keep the source's blocks; "" if the source is no GGUF file."""
    sources = [one.tensor.source_type for one in recipe.table if one.tensor.source_type is not None]
    if not sources:
        return ""
    total, others = len(recipe.table), len(recipe.table) - recipe.n_sliced
    kept = f"{recipe.n_sliced} of {total} tensors keep the source's blocks"
    if not others:
        return f"all {total} tensors keep the source's blocks"
    once = FULL_TYPES.issuperset(one.name for one in sources)
    return f"{kept}; the others are quantized" + ("" if once else " a second time, and lose twice")


def note_blocks(weights: Weights, recipes: Iterable[ResolvedRecipe], note: Note) -> None:
    """Note it of each file that a recipe makes, if the weights are those of a GGUF file."""
    for recipe in recipes if weights.gguf is not None else ():
        note(f"{recipe.label}: {blocks_line(recipe)}")
