"""Which code computes linear attention, and its cost.

That is Gated DeltaNet in Qwen3-Next and Qwen3.5, and Kimi Delta Attention in Kimi-Linear.
transformers uses the package flash-linear-attention on a GPU if it is installed, else its own
reference code. Nothing here loads torch: `doctor` and `plan` use it. Figures: bench/RESULTS.md.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version

from reap2gguf.resources import install_command

_PARTS = (".linear_attn.", ".self_attn.A_log")  # of stored names
PACKAGE = "flash-linear-attention"
REFERENCE_SPEED = "half"  # of the reference code, compared with the package
# Memory of a position while a layer's attention runs, in multiples of the hidden size.
ATTENTION_WIDTHS = 32
REFERENCE_WIDTHS = 64  # of the reference code, which computes in float32


def installed_version() -> str | None:
    """The version of flash-linear-attention; None if it is not installed."""
    try:
        return version(PACKAGE)
    except PackageNotFoundError:
        return None


def has_linear_attention(names: Iterable[str]) -> bool:
    """Whether stored tensors of these names are of a model with linear attention."""
    return any(part in name for name in names for part in _PARTS)


def attention_widths(has_linear_attention: bool, on_gpu: bool) -> int:
    """Memory of a position while a layer's attention runs, in multiples of the hidden size."""
    by_package = on_gpu and installed_version() is not None
    return REFERENCE_WIDTHS if has_linear_attention and not by_package else ATTENTION_WIDTHS


def linear_attention_note() -> str:
    """One line for the user of a GPU: which code runs."""
    found = installed_version()
    if found is not None:
        return f"linear attention: {PACKAGE} {found}"
    return (
        "linear attention: reference code of transformers, same results at "
        f"{REFERENCE_SPEED} the speed of {PACKAGE}, which `{install_command('gpu')}` installs"
    )
