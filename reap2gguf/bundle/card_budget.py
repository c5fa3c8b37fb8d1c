"""The table of a card that shows what each number of experts would have cost for the same size."""

from __future__ import annotations

from typing import TYPE_CHECKING

from reap2gguf.bundle.markdown import code, inline, table
from reap2gguf.fitting.target import MEASURED, TABLE
from reap2gguf.messages import size

if TYPE_CHECKING:
    from reap2gguf.bundle.budget import CountRecord
    from reap2gguf.bundle.manifest import Manifest

_HEADER = ("experts", "bits per weight", "size", "KL of pruning", "KL of quantizing", "together")
_COUNTED = {
    TABLE: "by how much errors of its kind count in a small model",
    MEASURED: "by how much errors of its kind were measured to count in the source",
}
_FITS_NOT = "does not fit"


def budget_section(manifest: Manifest) -> str:
    """The numbers of experts that were weighed; "" if the number was named."""
    budget = manifest.budget
    if budget is None:
        return ""
    best = budget.best
    n_all = manifest.pruning.n_experts
    intro = (
        f"The size was divided between experts and bits, for {inline(budget.target)}: "
        f"{best.n_experts} of {n_all} experts stay in each layer, at {best.bits_per_weight:.2f} "
        "bits per weight. KL divergences are from the source, in nats per token. That of pruning "
        f"was measured on {budget.n_scored:,} tokens of {inline(budget.text)}, with experts ranked "
        f"by {code(budget.method)}; that of quantizing is predicted from the error of each tensor, "
        f"{_COUNTED[budget.sensitivity]}. "
        "The number with the least sum was taken."
    )
    rows = [_row(one, one is best) for one in budget.counts]
    return "\n\n".join(("## Experts or bits", intro, table(_HEADER, rows)))


def _row(one: CountRecord, is_best: bool) -> list[str]:
    number = f"**{one.n_experts}**" if is_best else str(one.n_experts)
    pruning = f"{one.pruning:.4f} ± {one.pruning_error:.4f}"
    if one.bits_per_weight is None or one.n_bytes is None or one.quantizing is None:
        return [number, _FITS_NOT, "", pruning, "", ""]
    bits, n_bytes = f"{one.bits_per_weight:.2f}", size(one.n_bytes)
    return [number, bits, n_bytes, pruning, f"{one.quantizing:.4f}", f"{one.damage:.4f}"]
