"""What a merge can be asked for; nothing here loads torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from reap2gguf.errors import UnsupportedModelError, UsageError
from reap2gguf.machine import processes

if TYPE_CHECKING:
    from reap2gguf.checkpoint.checkpoint import Checkpoint
    from reap2gguf.models.contract import MoeModel
    from reap2gguf.pruning.protection import ProtectedExperts, Protection
    from reap2gguf.pruning.select import Target


def merged_layers(model: MoeModel) -> list[int]:
    """The layers whose experts are merged: those with experts, but for an MTP block.

    The rows end before that block, which needs the next token as well: it is pruned by REAP.
    """
    return [layer for layer in model.facts.moe_layers if layer != model.facts.mtp_layer]


def check_mergeable(model: MoeModel, method: str) -> None:
    """Refuse a model whose experts a merge is not defined for, and several processes.

    Raises UnsupportedModelError or UsageError.
    """
    name = model.facts.architecture
    if model.module_is_as_stored:
        raise UnsupportedModelError(
            f"{name}: --method {method} is not defined for experts that transformers keeps in the "
            "layout they are stored in; choose a --method that removes experts"
        )
    if model.scales_experts:
        raise UnsupportedModelError(
            f"{name}: --method {method} is not defined for experts that the router gives a factor "
            "each, and that see other inputs than it; choose a --method that removes experts"
        )
    if not merged_layers(model):
        raise UnsupportedModelError(
            f"{name}: only the multi-token-prediction block has experts, and --method {method} "
            "merges none there; choose a --method that removes experts"
        )
    if processes().size > 1:
        raise UsageError(
            f"--method {method} computes in one process; run the command without torchrun"
        )


def check_merge(
    weights: Checkpoint,
    model: MoeModel,
    method: str,
    target: Target,
    protection: Protection,
    group_size: int,
) -> ProtectedExperts:
    """Refuse what `check_mergeable` does, quantized weights, and groups that are too small.

    Returns the experts that `protection` names: nothing is merged into them. Raises UsageError or
    UnsupportedModelError.
    """
    from reap2gguf.pruning.protection import protected_experts

    if not target.prunes:
        raise UsageError(
            f"--method {method}: all experts are kept, so there is nothing to merge; leave it out, "
            "or keep fewer with --keep-experts or --compression"
        )
    check_mergeable(model, method)
    if weights.gguf is not None:
        raise UsageError(
            f"--method {method}: the model is a GGUF file, and merged experts cannot be stored "
            "among its blocks; pass the safetensors that it was made from"
        )
    projections = model.expert_tensors(merged_layers(model)[0], weights.tensors)
    if model.facts.latent_width or set(projections) != {"gate", "up", "down"}:
        raise UnsupportedModelError(
            f"{model.facts.architecture}: --method {method} is not defined for experts without a "
            "gate, or that work on a narrower latent; choose a --method that removes experts"
        )
    if weights.stored is not weights:
        raise UsageError(
            f"--method {method}: the weights are quantized, and merged ones cannot be stored among "
            "them; pass --dequantize bf16 as well"
        )
    protected = protected_experts(protection, None, target, model.facts)
    if method == "ream":
        most = max(map(len, protected.all.values()), default=0)
        _check_groups(target, target.n_kept - most, group_size)
    return protected


def _check_groups(target: Target, n_open: int, group_size: int) -> None:
    """REAM's groups must hold all experts; those of protected experts hold no other."""
    if n_open * (group_size - 1) >= target.n_dropped:
        return
    if n_open == 0:
        raise UsageError(
            f"--protect: all {target.n_kept} experts that stay are protected, so there is none to "
            "merge the others into; protect fewer, or keep more"
        )
    least = 1 + -(-target.n_dropped // n_open)
    raise UsageError(
        f"--group-size {group_size}: {n_open} groups of that size cannot hold the "
        f"{target.n_dropped} experts that are merged into others; pass at least {least}"
    )
