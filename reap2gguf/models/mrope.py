"""How the rotated dimensions of Qwen3.5 are shared out to time, height and width of an image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from reap2gguf.errors import UnsupportedModelError
from reap2gguf.messages import shown
from reap2gguf.models.description import MAX_WIDTH

if TYPE_CHECKING:
    from reap2gguf.checkpoint.config import ConfigReader

_KEY = "mrope_section"
_DEFAULT = (11, 11, 10)  # transformers' default where the config has none


def read_sections(rotary: ConfigReader, width: int, head_dim: int) -> tuple[int, int, int, int]:
    """The four numbers of `rope.dimension_sections`, for heads with `width` rotated dimensions.

    Raises UnsupportedModelError unless transformers and llama.cpp give every dimension the same
    axis. For another one, llama.cpp would take a position that text does not have.
    """
    found = rotary.integers(_KEY, 0, MAX_WIDTH) if rotary.values.get(_KEY) is not None else _DEFAULT
    sections = (*found, 0)[:4]
    pairs = range(width // 2)
    if (
        len(found) not in (3, 4)
        or sum(sections) > head_dim
        or not sum(sections)
        or any(_of_transformers(pair, sections) != _of_llama_cpp(pair, sections) for pair in pairs)
    ):
        raise UnsupportedModelError(
            f"{rotary.where}: {_KEY} is {shown(list(found))}, expected three numbers of which "
            f"each is about a third of {len(pairs)}, the rotated pairs of a head"
        )
    time, height, channels, other = sections
    return time, height, channels, other


def _of_transformers(pair: int, sections: Sequence[int]) -> int:
    """The axis of a pair: 0 time, 1 height, 2 width."""
    axis = pair % 3
    return axis if axis and pair < 3 * sections[axis] else 0


def _of_llama_cpp(pair: int, sections: Sequence[int]) -> int:
    """The same; 3 where no axis is left."""
    place = pair % sum(sections)
    axis = place % 3
    return axis if place < 3 * sections[axis] else 3
