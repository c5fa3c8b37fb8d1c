"""What the mixer of each of Nemotron-H's blocks is: a letter of a pattern, or a name in a list."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from reap2gguf.errors import UnsupportedModelError
from reap2gguf.messages import shown
from reap2gguf.models.description import MAX_LAYERS
from reap2gguf.models.layer_types import FULL, LINEAR, MOE

if TYPE_CHECKING:
    from reap2gguf.checkpoint.config import ConfigReader

MLP = "mlp"
# newer configs have the first key; transformers prefers it
LAYERS_KEYS = ("layers_block_type", "hybrid_override_pattern")
MTP_KEYS = ("mtp_layers_block_type", "mtp_hybrid_override_pattern")
_LETTERS = {"M": LINEAR, "*": FULL, "E": MOE, "-": MLP}
_NAMES = {
    **{kind: kind for kind in _LETTERS.values()},
    "mamba": LINEAR,  # this and the next in NVIDIA's configs
    "attention": FULL,
}


def kinds_in(value: Any) -> tuple[str, ...] | None:
    """The kinds that a pattern or a list states; None if it is neither."""
    if isinstance(value, str):
        found = [_LETTERS.get(letter) for letter in value[: MAX_LAYERS + 1]]
    elif isinstance(value, list):
        names = value[: MAX_LAYERS + 1]
        found = [_NAMES.get(name) if isinstance(name, str) else None for name in names]
    else:
        return None
    kinds = tuple(kind for kind in found if kind is not None)
    return kinds if 0 < len(kinds) == len(found) <= MAX_LAYERS else None


def read_kinds(read: ConfigReader, gguf_arch: str) -> tuple[str, ...]:
    """The kind of each block of the trunk.

    Raises UnsupportedModelError if the config does not say it, or says it twice and not the same,
    and for a model that llama.cpp does not load: with an MLP, or without one of the other kinds.
    """
    stated = {key: read.values[key] for key in LAYERS_KEYS if read.values.get(key) is not None}
    if not stated:
        raise UnsupportedModelError(f"{read.where}: {' or '.join(LAYERS_KEYS)} is missing")
    found = {key: kinds_in(value) for key, value in stated.items()}
    for key, kinds in found.items():
        if kinds is None:
            raise UnsupportedModelError(
                f"{read.where}: {key} is {shown(stated[key])}, expected up to {MAX_LAYERS:,} of "
                f"{', '.join(_LETTERS)}, or a list of {', '.join(_LETTERS.values())}"
            )
    first, *others = found.values()
    assert first is not None
    if others and others[0] != first:
        raise UnsupportedModelError(
            f"{read.where}: {' and '.join(found)} differ, of which transformers reads the first; "
            "correct or delete one of them"
        )
    counted = read.values.get("num_hidden_layers")
    if counted is not None and counted != len(first):
        raise UnsupportedModelError(
            f"{read.where}: num_hidden_layers is {shown(counted)}, but {next(iter(found))} has "
            f"{len(first)} blocks; both state the same fact, so correct one of them"
        )
    if MLP in first:
        raise UnsupportedModelError(
            f"{read.where}: block {first.index(MLP)} is an MLP, expected no such block: "
            f"llama.cpp's {gguf_arch} takes every feed-forward block for one with experts"
        )
    for kind in (LINEAR, FULL, MOE):
        if kind not in first:
            raise UnsupportedModelError(
                f"{read.where}: no block is {kind}, expected blocks with a recurrence, with "
                "attention and with experts"
            )
    return first
