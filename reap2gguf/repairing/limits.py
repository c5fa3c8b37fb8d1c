"""What a repair can be asked for; nothing here loads torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from reap2gguf.errors import UnsupportedModelError, UsageError
from reap2gguf.machine import processes

if TYPE_CHECKING:
    from reap2gguf.checkpoint.weights import Weights
    from reap2gguf.models.contract import MoeModel

LEAST_ROWS = 16  # an eighth of them is held out


def repaired_layers(model: MoeModel) -> list[int]:
    """The layers that a repair changes: those with experts, but for a multi-token-prediction block.

    The rows end before that block, which needs the next token as well.
    """
    return [layer for layer in model.facts.moe_layers if layer != model.facts.mtp_layer]


def check_repairable(model: MoeModel) -> None:
    """Refuse a model whose experts a repair is not defined for, and several processes.

    Raises UnsupportedModelError or UsageError.
    """
    name = model.facts.architecture
    if model.module_is_as_stored:
        raise UnsupportedModelError(
            f"{name}: --repair is not defined for experts that transformers keeps in the layout "
            "they are stored in; leave it out"
        )
    if not repaired_layers(model):
        raise UnsupportedModelError(
            f"{name}: only the multi-token-prediction block has experts, and --repair does not "
            "change that; leave it out"
        )
    if processes().size > 1:
        raise UsageError(
            "--repair computes in one process; run the command without torchrun, or leave it out"
        )


def check_repair(weights: Weights, model: MoeModel, prunes: bool) -> None:
    """Refuse what `check_repairable` does, all experts, and quantized weights.

    New weights cannot be stored among quantized ones. Raises UsageError or UnsupportedModelError.
    """
    if not prunes:
        raise UsageError(
            "--repair: all experts are kept, so there is nothing to repair; leave it out, or "
            "remove some with --compression"
        )
    check_repairable(model)
    if weights.gguf is not None:
        raise UsageError(
            "--repair: MODEL is a GGUF file, and new weights are stored as safetensors; leave it "
            "out, or pass the safetensors checkpoint"
        )
    if weights.stored is not weights:
        raise UsageError(
            "--repair: the weights are quantized, and new ones cannot be stored among them; pass "
            "--dequantize bf16 as well"
        )


def check_rows(count: int) -> None:
    """Refuse too few rows of calibration text. Raises UsageError."""
    if count < LEAST_ROWS:
        raise UsageError(
            f"--repair: the calibration has {count} rows, expected at least {LEAST_ROWS}, of "
            "which every eighth is held out; pass more --samples or a longer text"
        )
