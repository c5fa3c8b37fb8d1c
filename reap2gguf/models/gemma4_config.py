"""What configs of Gemma-4 say of each type of layers: heads and rotary embeddings.

transformers saves what differs among layers as `per_layer_config`; published configs have
`global_head_dim` and `num_global_key_value_heads` in its place. Both are read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gguf import Keys

from reap2gguf.errors import UnsupportedModelError
from reap2gguf.messages import shown
from reap2gguf.models.description import MAX_HEADS, MAX_WIDTH
from reap2gguf.models.from_gguf import headless_config, trunk_layers
from reap2gguf.models.layer_types import FULL
from reap2gguf.models.rope import Rope

if TYPE_CHECKING:
    from reap2gguf.checkpoint.config import ConfigReader
    from reap2gguf.models.gguf_keys import GgufKeys

SLIDING = "sliding_attention"
BY_LAYER = "per_layer_config"
HEAD_DIM, KV_HEADS = "global_head_dim", "num_global_key_value_heads"
ROPES = "rope_parameters"
_STEP = 6  # of transformers: without layer_types, every sixth layer has full attention
_OVERRIDES = {"head_dim": HEAD_DIM, "num_key_value_heads": KV_HEADS}
# transformers' rotary embeddings of a config without `rope_parameters`
_SHARE = 0.25
_THETAS = {FULL: 1_000_000.0, SLIDING: 10_000.0}
_FREQUENCIES = "rope_freqs.weight"


@dataclass(frozen=True)
class FullHeads:
    """The heads of layers with full attention."""

    head_dim: int
    n_kv_heads: int


def read_types(read: ConfigReader, n_layers: int) -> tuple[str, ...]:
    """The type of every layer; UnsupportedModelError if they are not of both types."""
    types = read.values.get("layer_types")
    if types is None:
        types = [FULL if (layer + 1) % _STEP == 0 else SLIDING for layer in range(n_layers)]
        types[-1] = FULL
    known = (SLIDING, FULL)
    if (
        not isinstance(types, list)
        or len(types) != n_layers
        or any(one not in known for one in types)
    ):
        raise UnsupportedModelError(
            f"{read.where}: layer_types is {shown(types)}, expected {n_layers} of {SLIDING} and "
            f"{FULL}"
        )
    if types[-1] != FULL or SLIDING not in types:
        raise UnsupportedModelError(
            f"{read.where}: layer_types is {shown(types)}, expected layers of both kinds, the last "
            f"of them {FULL}: transformers changes the last one to it"
        )
    return tuple(types)


def read_full_heads(read: ConfigReader, types: tuple[str, ...], is_shared_value: bool) -> FullHeads:
    """The heads of layers with full attention.

    `is_shared_value`: they take their keys as values; without, transformers has as many key-value
    heads in all layers. Raises UnsupportedModelError for sizes that differ in other ways.
    """
    usual = {
        "head_dim": read.integer("head_dim", low=1, high=MAX_WIDTH, default=256),
        "num_key_value_heads": read.integer(
            "num_key_value_heads", low=1, high=MAX_HEADS, default=4
        ),
    }
    if BY_LAYER in read.values:
        found = {**usual, **_override(read, types)}
        for key, other in _OVERRIDES.items():
            if is_shared_value or key == "head_dim":
                name = f"{BY_LAYER}.{key}"
                read.refuse_difference(name, found[key], other, read.values.get(other))
        values, names = read.with_values(found), tuple(_OVERRIDES)
    else:
        # transformers' value of an absent key
        given = {HEAD_DIM: read.values.get(HEAD_DIM, 512), KV_HEADS: usual["num_key_value_heads"]}
        if is_shared_value and read.values.get(KV_HEADS) is not None:
            given[KV_HEADS] = read.values[KV_HEADS]
        values, names = read.with_values(given), (HEAD_DIM, KV_HEADS)
    head_dim = values.integer(names[0], low=2, high=MAX_WIDTH)
    if head_dim % 2 or usual["head_dim"] % 2:
        raise UnsupportedModelError(
            f"{read.where}: heads of {usual['head_dim']} and {head_dim}, expected even numbers: "
            "their dimensions are rotated in pairs"
        )
    return FullHeads(head_dim, values.integer(names[1], low=1, high=MAX_HEADS))


def _override(read: ConfigReader, types: tuple[str, ...]) -> Mapping[str, Any]:
    """What `per_layer_config` says of every layer with full attention, and of no other."""
    found = read.section(BY_LAYER)
    full = [str(layer) for layer, one in enumerate(types) if one == FULL]
    values = [found.get(layer) for layer in full]
    first = values[0]
    if (
        set(found) != set(full)
        or not isinstance(first, Mapping)
        or not set(first) <= set(_OVERRIDES)
        or any(one != first for one in values)
    ):
        raise UnsupportedModelError(
            f"{read.where}: {BY_LAYER} is {shown(dict(found))}, expected the same head_dim and "
            f"num_key_value_heads for each of the layers {', '.join(full)}, which have full "
            "attention, and nothing else"
        )
    return first


def read_ropes(read: ConfigReader) -> dict[str, Rope]:
    """The rotary embedding of each type of layers.

    Raises UnsupportedModelError for any but a plain one of sliding windows, and one of full
    attention that rotates a part of each head and leaves the rest where it is.
    """
    for key in ("rope_theta", "rope_scaling", "partial_rotary_factor", "rope_local_base_freq"):
        read.expect(key, why=f"each type of layers has its own in {ROPES}")
    read.refuse_nulls((ROPES,) if ROPES in read.values and not read.section(ROPES) else ())
    kinds = read.section(ROPES) if ROPES in read.values else _default_ropes()
    if set(kinds) != {FULL, SLIDING} or not all(isinstance(one, Mapping) for one in kinds.values()):
        raise UnsupportedModelError(
            f"{read.where}: {ROPES} is {shown(dict(kinds))}, expected settings for {FULL} and "
            f"{SLIDING}"
        )
    return {kind: _read_rope(read, kind, kinds[kind]) for kind in (SLIDING, FULL)}


def _default_ropes() -> dict[str, dict[str, Any]]:
    return {
        SLIDING: {"rope_type": "default", "rope_theta": _THETAS[SLIDING]},
        FULL: {
            "rope_type": "proportional",
            "partial_rotary_factor": _SHARE,
            "rope_theta": _THETAS[FULL],
        },
    }


def _read_rope(read: ConfigReader, kind: str, settings: Mapping[str, Any]) -> Rope:
    values = read.with_values(settings)
    expected = "proportional" if kind == FULL else "default"
    known = {"rope_type", "rope_theta", *(["partial_rotary_factor"] if kind == FULL else [])}
    if settings.get("rope_type") != expected or not set(settings) <= known:
        raise UnsupportedModelError(
            f"{read.where}: {ROPES}.{kind} is {shown(dict(settings))}, expected the rope_type "
            f"{expected} with {' and '.join(sorted(known - {'rope_type'}))} alone: llama.cpp's "
            "gemma4 has no other"
        )
    theta = values.number("rope_theta", low=0, high=2**31)
    if theta <= 0:
        raise UnsupportedModelError(
            f"{read.where}: {ROPES}.{kind}.rope_theta is {shown(theta)}, expected a positive number"
        )
    if kind == FULL:
        values.number("partial_rotary_factor", low=0, high=1)
    # what llama.cpp is told of it is its base; the part that is rotated is a tensor
    return Rope(expected, theta, 1.0, values)


def config_of_header(keys: GgufKeys) -> dict[str, Any]:
    """The text model's config of a GGUF header."""
    llm, attention, rope = Keys.LLM, Keys.Attention, Keys.Rope
    n_layers = trunk_layers(keys)[0]
    config = headless_config(keys)
    for key in ("hidden_act", "num_experts_per_tok", ROPES):
        del config[key]
    pattern = keys.flags(attention.SLIDING_WINDOW_PATTERN, n_layers)
    if pattern is None:
        raise UnsupportedModelError(
            f"{keys.where}: {attention.SLIDING_WINDOW_PATTERN.format(arch=keys.arch)} is missing, "
            "expected which layers have a sliding window"
        )
    full, sliding = _heads_of_header(keys, pattern)
    why = "pairs of whole heads have places"
    keys.expect(rope.DIMENSION_COUNT, full["head_dim"], why=why)
    keys.expect(rope.DIMENSION_COUNT_SWA, sliding["head_dim"], why=why)
    for key in (attention.SHARED_KV_LAYERS, llm.EMBD_LENGTH_PER_LAYER_INP):
        keys.expect(key, 0, why="the models with experts have none")
    thetas = {
        FULL: keys.number(rope.FREQ_BASE, 0, 2**31, default=_THETAS[SLIDING]),
        SLIDING: keys.number(rope.FREQ_BASE_SWA, 0, 2**31, default=_THETAS[SLIDING]),
    }
    # llama.cpp's value of an absent key
    cap = keys.number(llm.FINAL_LOGIT_SOFTCAPPING, 0, 1e6, default=30.0)
    found = {
        **config,
        **sliding,
        "attention_k_eq_v": len(keys.blocks_with("attn_v.weight")) < n_layers,
        "enable_moe_block": True,
        "final_logit_softcapping": cap or None,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size_per_layer_input": 0,
        "intermediate_size": keys.integer(llm.FEED_FORWARD_LENGTH, 1, MAX_WIDTH),
        "layer_types": [SLIDING if one else FULL for one in pattern],
        "num_kv_shared_layers": 0,
        BY_LAYER: {str(layer): full for layer, one in enumerate(pattern) if not one},
        ROPES: _default_ropes(),
        "sliding_window": keys.integer(attention.SLIDING_WINDOW, 1, 2**31 - 1),
        "top_k_experts": keys.integer(llm.EXPERT_USED_COUNT, 1, config["num_experts"]),
    }
    for kind, theta in thetas.items():
        found[ROPES][kind]["rope_theta"] = theta
    return found


def _heads_of_header(keys: GgufKeys, pattern: Any) -> tuple[dict[str, int], dict[str, int]]:
    """The sizes of heads, and the numbers of those of keys, in full layers and in others."""
    attention = Keys.Attention
    counts = keys.integers(attention.HEAD_COUNT_KV, 1, MAX_HEADS, len(pattern))
    found = []
    for is_sliding, name in ((False, attention.KEY_LENGTH), (True, attention.KEY_LENGTH_SWA)):
        own = {count for count, one in zip(counts, pattern, strict=True) if one is is_sliding}
        if len(own) != 1:
            raise UnsupportedModelError(
                f"{keys.where}: {attention.HEAD_COUNT_KV.format(arch=keys.arch)} is "
                f"{shown(list(counts))}, expected one number for the layers with a sliding window, "
                "and one for the others"
            )
        head_dim = keys.integer(name, 1, MAX_WIDTH)
        found.append({"head_dim": head_dim, "num_key_value_heads": own.pop()})
    value_keys = (attention.VALUE_LENGTH, attention.VALUE_LENGTH_SWA)
    for heads, key in zip(found, value_keys, strict=True):
        keys.expect(key, heads["head_dim"], why="keys and values have one size")
    return found[0], found[1]
