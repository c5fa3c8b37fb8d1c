"""Linear attention and partly rotated heads, read from the header of a GGUF file."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from gguf import Keys

from reap2gguf.errors import UnsupportedModelError
from reap2gguf.models.description import MAX_HEADS, MAX_WIDTH

if TYPE_CHECKING:
    from reap2gguf.models.gguf_keys import GgufKeys

RECURRENT = "{arch}.attention.recurrent_layers"  # newer than gguf-py 0.19's constants
_INTERVAL = 4  # llama.cpp's, of a header without one
_SHARED = "blk.0.ffn_up_shexp.weight"


def linear_attention_config(keys: GgufKeys) -> dict[str, Any]:
    """The heads of the linear attention, and the shared expert's width."""
    ssm = Keys.SSM
    key_dim = keys.integer(ssm.STATE_SIZE, 1, MAX_WIDTH)
    n_values = keys.integer(ssm.TIME_STEP_RANK, 1, MAX_HEADS)
    width = keys.integer(ssm.INNER_SIZE, 1, MAX_WIDTH)
    if width % n_values:
        raise UnsupportedModelError(
            f"{keys.where}: {keys.arch}.ssm.inner_size is {width}, expected a multiple of "
            f"{keys.arch}.ssm.time_step_rank, {n_values}"
        )
    shared_key = Keys.LLM.EXPERT_SHARED_FEED_FORWARD_LENGTH
    shared = keys.rows(_SHARED) if not keys.has(shared_key) else None
    return {
        "linear_conv_kernel_dim": keys.integer(ssm.CONV_KERNEL, 1, MAX_WIDTH),
        "linear_key_head_dim": key_dim,
        "linear_num_key_heads": keys.integer(ssm.GROUP_COUNT, 1, MAX_HEADS),
        "linear_num_value_heads": n_values,
        "linear_value_head_dim": width // n_values,
        "shared_expert_intermediate_size": keys.integer(shared_key, 1, MAX_WIDTH, default=shared),
    }


def recurrent_layers(keys: GgufKeys, n_layers: int) -> Sequence[bool]:
    """Which layers have linear attention."""
    recurrent = keys.flags(RECURRENT, n_layers)
    if recurrent is None:
        step = keys.integer(Keys.LLM.FULL_ATTENTION_INTERVAL, 1, MAX_WIDTH, default=_INTERVAL)
        return [(layer + 1) % step != 0 for layer in range(n_layers)]
    return recurrent


def rotated_share(keys: GgufKeys, head_dim: int) -> float:
    """Which share of a head is rotated."""
    width = keys.integer(Keys.Rope.DIMENSION_COUNT, 1, head_dim, default=head_dim)
    share = width / head_dim
    # transformers cuts the product off
    return share if int(head_dim * share) == width else math.nextafter(share, 1)


def rope_sections(keys: GgufKeys) -> dict[str, Any]:
    """How the rotated pairs of a head are shared out to the axes of images."""
    sections = keys.integers(Keys.Rope.DIMENSION_SECTIONS, 0, MAX_WIDTH, 4)
    found = list(sections if sections[3] else sections[:3])
    return {"mrope_section": found, "mrope_interleaved": True}
