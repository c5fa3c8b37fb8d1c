"""How the rotated dimensions of a head are shared out to time, height and width of an image."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from reap2gguf.errors import UnsupportedModelError
from reap2gguf.messages import shown
from reap2gguf.models.description import MAX_WIDTH
from reap2gguf.models.rope import DEFAULT_SECTIONS

if TYPE_CHECKING:
    from reap2gguf.checkpoint.config import ConfigReader

_KEY = "mrope_section"
_NONE = 3


def read_sections(
    rotary: ConfigReader, width: int, head_dim: int, still: Collection[int] = ()
) -> tuple[int, int, int, int]:
    """The four numbers of `rope.dimension_sections`, for heads with `width` rotated dimensions.

    They are the config's where llama.cpp gives every pair of dimensions the axis that transformers
    gives it, else others with which it does. Where llama.cpp finds no axis, it takes a position
    that is 0 in text; only pairs of `still` may have that one. Raises UnsupportedModelError if no
    numbers express the config's.
    """
    found: Sequence[int] = DEFAULT_SECTIONS
    if rotary.values.get(_KEY) is not None:
        found = rotary.integers(_KEY, 0, MAX_WIDTH)
    pairs = range(width // 2)
    if len(found) in (3, 4):
        axes = [_of_transformers(pair, found) for pair in pairs]
        height, channels = axes.count(1), axes.count(2)
        others = ((time, height, channels, 0) for time in range(head_dim - height - channels + 1))
        own = (found[0], found[1], found[2], (*found, 0)[3])
        for sections in (own, *others):
            if 0 < sum(sections) <= head_dim and _fits(axes, sections, still):
                return sections
    raise UnsupportedModelError(
        f"{rotary.where}: {_KEY} is {shown(list(found))}, expected three numbers of which each is "
        f"about a third of {len(pairs)}, the rotated pairs of a head: llama.cpp cannot express it"
    )


def unrotated_pairs(width: int, sections: Sequence[int]) -> list[int]:
    """The pairs that llama.cpp does not rotate in text."""
    return [pair for pair in range(width // 2) if _of_llama_cpp(pair, sections) == _NONE]


def _fits(axes: Sequence[int], sections: Sequence[int], still: Collection[int]) -> bool:
    for pair, axis in enumerate(axes):
        found = _of_llama_cpp(pair, sections)
        if found != axis and not (found == _NONE and pair in still):
            return False
    return True


def _of_transformers(pair: int, sections: Sequence[int]) -> int:
    """The axis of a pair: 0 time, 1 height, 2 width."""
    axis = pair % 3
    return axis if axis and pair < 3 * sections[axis] else 0


def _of_llama_cpp(pair: int, sections: Sequence[int]) -> int:
    """The same; `_NONE` where no axis is left."""
    place = pair % sum(sections)
    axis = place % 3
    return axis if place < 3 * sections[axis] else _NONE
