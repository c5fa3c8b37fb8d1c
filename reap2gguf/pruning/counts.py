"""How many experts stay, or become one, as it is asked for."""

from __future__ import annotations

from reap2gguf.errors import ParameterError, UsageError
from reap2gguf.pruning.methods import is_from_weights, merges

WEIGHED = "auto"  # a compression: the number of experts is weighed against bits, in a build


def check_counts(keep_experts: object, compression: object) -> None:
    """Raise UsageError for values that fit no model; `choose_target` knows each model's bounds."""
    if keep_experts is not None and type(keep_experts) is not int:
        raise ParameterError(
            f"keep_experts is {keep_experts!r}, expected a whole number", "keep_experts"
        )
    is_number = isinstance(compression, int | float) and not isinstance(compression, bool)
    if compression is not None and not is_number:
        raise ParameterError(
            f"compression is {compression!r}, expected a number, such as 0.25", "compression"
        )
    if keep_experts is not None and compression is not None:
        raise UsageError(
            "--keep-experts and --compression both set the number of experts; pass one of them"
        )
    if keep_experts is not None and keep_experts < 1:
        raise UsageError(f"--keep-experts {keep_experts}: expected 1 or more")
    if isinstance(compression, int | float) and not 0 <= compression < 1:
        hint = (
            f"; for {compression:g} % pass {compression / 100:g}" if 2 <= compression < 100 else ""
        )
        raise UsageError(f"--compression {compression:g}: expected 0 or more and less than 1{hint}")


def check_weighed(method: str, keep_experts: object, has_target: bool, kept: object | None) -> None:
    """Raise UsageError for options that leave nothing to weigh, or nothing to weigh it by."""
    auto = f"--compression {WEIGHED}"
    if keep_experts is not None:
        raise UsageError(
            f"--keep-experts and {auto} both set the number of experts; pass one of them"
        )
    if not has_target:
        raise UsageError(
            f"{auto} divides a size between experts and bits, and no size is given; pass "
            "--target-size, such as 12GiB, --target-bpw or --fit, or a number as --compression"
        )
    if kept is not None:
        raise UsageError(f"{auto} finds how many experts stay, and --kept names them; pass one")
    if merges(method):
        raise UsageError(
            f"{auto} measures what it costs to remove experts, and --method {method} merges them; "
            "pass another --method, such as reap, or a number as --compression"
        )
    if is_from_weights(method):
        raise UsageError(
            f"{auto} predicts what quantizing costs by sums of the pass that observes the experts, "
            f"and --method {method} makes none; pass another --method, such as reap"
        )


def check_asked(method: str, repair: str, group_size: object) -> None:
    """Refuse options that have no effect with a method, or none together. Raises UsageError."""
    if group_size is not None and (type(group_size) is not int or group_size < 2):
        raise ParameterError(
            f"group_size is {group_size!r}, expected a whole number from 2", "group_size"
        )
    if group_size is not None and method != "ream":
        raise ParameterError(
            "group_size is for the method ream; pass it, or leave this out", "group_size"
        )
    if merges(method) and repair != "none":
        raise UsageError(
            f"--repair: --method {method} gives experts new weights itself; leave one of them out"
        )
