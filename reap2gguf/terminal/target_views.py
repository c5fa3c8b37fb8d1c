"""What a plan says of a file whose types are chosen in the build."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from reap2gguf.building.plan import Plan
    from reap2gguf.building.sized import SizedFile
    from reap2gguf.quantizing.resolve import ResolvedRecipe


def sized_lines(sized: SizedFile, recipe: ResolvedRecipe) -> Iterator[str]:
    """What is known of the file; `recipe` is a guess."""
    yield (
        f"types are chosen when the importance matrix is known, for {sized.target.words}: about "
        f"{recipe.bits_per_weight:.2f} bits per weight"
    )
    if sized.card is not None:
        yield f"counted {sized.card.words}"


def target_as_json(plan: Plan) -> dict[str, Any] | None:
    """The same for programs; its types in `files` are a guess. None without a target."""
    if (sized := plan.sized) is None:
        return None
    return {
        "file": plan.gguf_name(plan.recipes[-1]),
        "size": sized.target.size,
        "bpw": sized.target.bpw,
        "memory": sized.target.card,
        "counted": None if sized.card is None else asdict(sized.card),
    }
