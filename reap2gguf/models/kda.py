"""Kimi Delta Attention (arXiv 2510.26692): a Gated DeltaNet with a decay for every channel.

Queries, keys and values go through a short convolution each, which transformers computes as one.
GGUF's convolutions have four axes, two of size one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gguf import Keys

from reap2gguf.errors import UnsupportedModelError
from reap2gguf.messages import shown
from reap2gguf.models.deltanet import DECAY
from reap2gguf.models.description import MAX_HEADS, MAX_WIDTH, Floats, Transform
from reap2gguf.models.layer_types import FULL, LINEAR
from reap2gguf.models.rules import TensorRule

if TYPE_CHECKING:
    from reap2gguf.checkpoint.config import ConfigReader
    from reap2gguf.models.gguf_keys import GgufKeys

SECTION = "linear_attn_config"
_LISTS = {"full_attn_layers": FULL, "kda_layers": LINEAR}  # numbers of layers, from 1 on
# by the section's key: transformers' name beside it, and its value where both are absent
_SIZES = {
    "num_heads": ("linear_num_heads", 32, MAX_HEADS),
    "head_dim": ("linear_head_dim", 128, MAX_WIDTH),
    "short_conv_kernel_size": ("linear_conv_kernel_dim", 4, MAX_WIDTH),
}
FLAT_KEYS = tuple(flat for flat, _, _ in _SIZES.values())
_QUERIES = "self_attn.q_proj"
_GATE = "self_attn.forget_gate"
# W: all heads together, A: one head, N: their number
KDA = (
    TensorRule(f"{_QUERIES}.weight", "attn_q.weight", "W H"),
    TensorRule("self_attn.k_proj.weight", "attn_k.weight", "W H", input_of=_QUERIES),
    TensorRule("self_attn.v_proj.weight", "attn_v.weight", "W H", input_of=_QUERIES),
    *(
        TensorRule(
            f"self_attn.{one}_conv1d.weight",
            f"ssm_conv1d_{one}.weight",
            "W 1 kernel",
            gguf_shape="1 W 1 kernel",
            parameter="self_attn.conv1d.weight",
            always_f32=True,
        )
        for one in "qkv"
    ),
    TensorRule("self_attn.A_log", "ssm_a", "1 1 N 1", parameter=f"{_GATE}.A_log"),
    TensorRule("self_attn.dt_bias", "ssm_dt.bias", "W", parameter=f"{_GATE}.dt_bias"),
    TensorRule(
        "self_attn.f_a_proj.weight",
        "ssm_f_a.weight",
        "A H",
        parameter=f"{_GATE}.f_a_proj.weight",
        input_of=_QUERIES,
    ),
    TensorRule(
        "self_attn.f_b_proj.weight",
        "ssm_f_b.weight",
        "W A",
        parameter=f"{_GATE}.f_b_proj.weight",
    ),
    TensorRule("self_attn.b_proj.weight", "ssm_beta.weight", "N H", input_of=_QUERIES),
    TensorRule("self_attn.g_a_proj.weight", "ssm_g_a.weight", "A H", input_of=_QUERIES),
    TensorRule("self_attn.g_b_proj.weight", "ssm_g_b.weight", "W A"),
    TensorRule("self_attn.o_norm.weight", "ssm_norm.weight", "A"),
    TensorRule("self_attn.o_proj.weight", "attn_output.weight", "H W"),
)


def _put_back_convolution(values: Floats, stored: Floats) -> None:
    stored[...] = values.reshape(stored.shape)


_CONVOLUTION = Transform(lambda values: values.swapaxes(0, 1)[:, :, None], _put_back_convolution)
# by GGUF's names below `blk.N.`
TRANSFORMS = {"ssm_a": DECAY, **{f"ssm_conv1d_{one}.weight": _CONVOLUTION for one in "qkv"}}


@dataclass(frozen=True)
class KdaHeads:
    """The heads of one model's linear attention."""

    n_heads: int
    head_dim: int
    kernel: int  # how many tokens a convolution reaches over, its own included

    def sizes(self) -> dict[str, int]:
        """The sizes that the rules name."""
        width = self.n_heads * self.head_dim
        return {"N": self.n_heads, "A": self.head_dim, "W": width, "kernel": self.kernel}

    def config_values(self) -> dict[str, Any]:
        """The sizes under transformers' names of them."""
        return dict(zip(FLAT_KEYS, (self.n_heads, self.head_dim, self.kernel), strict=True))


def read_kda_heads(read: ConfigReader) -> KdaHeads:
    """The heads that a config states, in its section, beside it, or in both.

    Raises UnsupportedModelError for numbers out of range, and for two that differ.
    """
    section, found = read.section(SECTION), []
    for key, (flat, default, most) in _SIZES.items():
        name = f"{SECTION}.{key}"
        if key in section and section[key] is None:
            raise UnsupportedModelError(
                f"{read.where}: {name} is null, expected an integer; set it or delete the key"
            )
        both = read.with_values({name: section.get(key), flat: read.values.get(flat)})
        both.refuse_spellings((name, flat))
        found.append(both.integer(name, flat, low=1, high=most, default=default))
    heads = KdaHeads(*found)
    if heads.kernel < 2:
        raise UnsupportedModelError(
            f"{read.where}: the convolutions reach over {heads.kernel} token, expected 2 or more"
        )
    return heads


def read_kda_layers(read: ConfigReader, n_layers: int) -> tuple[str, ...]:
    """The type of every layer: `full_attention` or `linear_attention`.

    transformers reads `layer_types`, and the section's lists without them; llama.cpp's converter
    reads the lists. Raises UnsupportedModelError if they differ, or do not name each layer once.
    """
    section, types = read.section(SECTION), read.values.get("layer_types")
    given = [key for key in _LISTS if key in section]
    if types is None and len(given) < len(_LISTS):
        absent = " and ".join(f"{SECTION}.{key}" for key in _LISTS if key not in section)
        raise UnsupportedModelError(
            f"{read.where}: layer_types is missing, and {absent} too, expected one of these: the "
            "numbers of all layers, from 1 on, or their types"
        )
    if types is not None and not _are_types(types, n_layers):
        raise UnsupportedModelError(
            f"{read.where}: layer_types is {shown(types)}, expected {n_layers} of {FULL} and "
            f"{LINEAR}"
        )
    for key in given:
        name = f"{SECTION}.{key}"
        one = read.with_values({name: section[key]}).integers(name, 1, n_layers)
        others = {FULL, LINEAR} - {_LISTS[key]}
        if types is None:
            (other,) = others
            types = [_LISTS[key] if n in one else other for n in range(1, n_layers + 1)]
        expected = [n for n in range(1, n_layers + 1) if types[n - 1] == _LISTS[key]]
        if sorted(one) != expected:
            raise UnsupportedModelError(
                f"{read.where}: {name} is {shown(list(one))}, expected {shown(expected)}: every "
                "layer is named once, in one of the lists, as in layer_types where it is there"
            )
    assert isinstance(types, list)
    for kind in (FULL, LINEAR):
        if kind not in types:
            raise UnsupportedModelError(
                f"{read.where}: no layer is {kind}, expected layers of both kinds, as llama.cpp has"
            )
    return tuple(types)


def _are_types(types: Any, n_layers: int) -> bool:
    known = (FULL, LINEAR)
    return isinstance(types, list) and len(types) == n_layers and all(one in known for one in types)


def kda_config(keys: GgufKeys, has_attention: tuple[bool, ...]) -> dict[str, Any]:
    """The section of a config, from a header whose layers have full attention or not."""
    lists = {
        key: [n for n, full in enumerate(has_attention, 1) if full is (kind == FULL)]
        for key, kind in _LISTS.items()
    }
    return {
        **lists,
        "num_heads": keys.integer(Keys.Attention.HEAD_COUNT, 1, MAX_HEADS),
        "head_dim": keys.integer(Keys.KDA.HEAD_DIM, 1, MAX_WIDTH),
        "short_conv_kernel_size": keys.integer(Keys.SSM.CONV_KERNEL, 2, MAX_WIDTH),
    }
