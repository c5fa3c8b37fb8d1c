"""Which code computes Gated DeltaNet, the linear attention of Qwen3.5, and what that costs."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

REFERENCE_SPEED = "half"  # bench/RESULTS.md
PACKAGE = "flash-linear-attention"


def installed_version() -> str | None:
    """The version of flash-linear-attention, which transformers uses where it is installed."""
    try:
        return version(PACKAGE)
    except PackageNotFoundError:
        return None


def deltanet_path() -> str:
    """One line for the user of a GPU; bench/RESULTS.md has the figures."""
    found = installed_version()
    if found is not None:
        return f"DeltaNet by {PACKAGE} {found}"
    return (
        f"DeltaNet by transformers' reference code: right, at {REFERENCE_SPEED} the speed of "
        f"{PACKAGE} (pip install 'reap2gguf[gpu]')"
    )
