"""Nemotron-3's config, read from the header of a GGUF file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gguf import Keys

from reap2gguf.errors import UnsupportedModelError
from reap2gguf.messages import shown
from reap2gguf.models.description import MAX_HEADS, MAX_LAYERS, MAX_WIDTH
from reap2gguf.models.from_gguf import common_config, trunk_layers
from reap2gguf.models.layer_types import FULL, LINEAR, MOE
from reap2gguf.models.scored_router import Scores

if TYPE_CHECKING:
    from reap2gguf.models.gguf_keys import GgufKeys

# what `common_config` names as other families do, or what this one does not have
_OTHERS = ("hidden_act", "rms_norm_eps", "rope_parameters", "num_experts", "num_hidden_layers")


def kinds_from_gguf(keys: GgufKeys) -> tuple[list[str], int]:
    """The kind of each block of the trunk, and the number of heads of keys and values.

    As llama.cpp does: a block with a feed-forward width has experts, one with heads of keys and
    values has attention, and any other has a recurrence.
    """
    n_layers, n_mtp = trunk_layers(keys)
    key, n_blocks = Keys.Attention.HEAD_COUNT_KV, n_layers + n_mtp
    heads = keys.integers(key, 0, max(MAX_HEADS, MAX_LAYERS), n_blocks)
    widths = keys.integers(Keys.LLM.FEED_FORWARD_LENGTH, 0, MAX_WIDTH, n_blocks)
    counts = set(heads) - {0}
    both = any(width and count for width, count in zip(widths[:n_layers], heads, strict=False))
    if len(counts) != 1 or both:
        raise UnsupportedModelError(
            f"{keys.where}: {key.format(arch=keys.arch)} is {shown(list(heads))}, expected 0 or "
            "one number of heads, and 0 where feed_forward_length is not"
        )
    kinds = [
        MOE if width else FULL if count else LINEAR
        for width, count in zip(widths[:n_layers], heads[:n_layers], strict=True)
    ]
    return kinds, counts.pop()


def common_values(keys: GgufKeys, n_kv_heads: int) -> dict[str, Any]:
    """The values that most decoders have, under this family's names."""
    attention = Keys.Attention
    centred = keys.number(attention.LAYERNORM_EPS, 0, 1)
    epsilon = keys.number(attention.LAYERNORM_RMS_EPS, 0, 1, default=centred)
    if epsilon != centred:
        raise UnsupportedModelError(
            f"{keys.where}: {keys.arch}.attention.layer_norm_rms_epsilon is {epsilon:g}, expected "
            f"{centred:g}, as layer_norm_epsilon is: transformers has one for all norms"
        )
    found = common_config(keys, Scores.SIGMOID, n_kv_heads, attention.LAYERNORM_EPS)
    return {
        **{key: value for key, value in found.items() if key not in _OTHERS},
        "layer_norm_epsilon": centred,
        "n_routed_experts": found["num_experts"],
    }
