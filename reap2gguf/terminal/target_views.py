"""What a plan says of a file whose types are chosen in the build."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from reap2gguf.messages import parameters

if TYPE_CHECKING:
    from reap2gguf.building.needs.estimate import Estimate
    from reap2gguf.building.plan import Plan
    from reap2gguf.building.sized import SizedFile
    from reap2gguf.quantizing.resolve import ResolvedRecipe


def remaining_line(plan: Plan) -> str:
    """What the model is, and how many parameters remain, as far as that is known."""
    facts = plan.model.facts
    most = "up to " if plan.weighs else ""
    return (
        f"{facts.architecture}, {facts.n_layers} layers; {most}{parameters(plan.n_parameters)} of "
        f"{parameters(plan.checkpoint.n_parameters)} parameters remain"
    )


def kept_lines(plan: Plan) -> Iterator[str]:
    """How many experts stay, or what is weighed to find that out."""
    facts, target = plan.model.facts, plan.target
    where = (
        f"in each of {len(facts.moe_layers)} MoE layers, {facts.experts_per_token} active per token"
    )
    if not plan.weighs or plan.sized is None:
        yield f"experts: keeps {target.n_kept} of {target.n_experts} {where}"
        return
    counts = ", ".join(map(str, plan.counts))
    yield (
        f"experts: keeps {counts} of {target.n_experts} {where}: the number that loses least for "
        f"{plan.sized.target.words}. It is known when the experts have been observed; until then, "
        f"figures are for {target.n_kept}"
    )
    if target.n_experts in plan.counts:
        yield "if all of them stay, nothing is pruned and no safetensors are written"


def waiting_lines(needs: Estimate) -> Iterator[str]:
    """Why the files are written after the pass for the importance matrix, and not beside it."""
    names = [one.name for one in needs.plan.recipes if one.asks_importance]
    if needs.export_waits:
        yield (
            f"files are written when the importance matrix is whole: {', '.join(names)} asks how "
            "much it saw"
        )


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
