"""Rotary embedding keys, which most architectures spell alike."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gguf import GGUFValueType, Keys, RopeScalingType

from reap2gguf.errors import UnsupportedModelError
from reap2gguf.messages import shown
from reap2gguf.models.description import HeaderValue

_UINT32, _FLOAT32 = GGUFValueType.UINT32, GGUFValueType.FLOAT32
_SCALINGS = {"linear": RopeScalingType.LINEAR, "yarn": RopeScalingType.YARN}
# optional numbers of yarn: config key -> GGUF key
_YARN = {
    "extrapolation_factor": Keys.Rope.SCALING_YARN_EXT_FACTOR,
    "attention_factor": Keys.Rope.SCALING_YARN_ATTN_FACTOR,
    "beta_fast": Keys.Rope.SCALING_YARN_BETA_FAST,
    "beta_slow": Keys.Rope.SCALING_YARN_BETA_SLOW,
}


def rope_parameters(config: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """The rotary settings in either spelling: `rope_parameters`, or `rope_scaling` beside them."""
    for key in ("rope_parameters", "rope_scaling"):
        if config.get(key) is not None and not isinstance(config[key], Mapping):
            raise UnsupportedModelError(
                f"{where}: {key} is {shown(config[key])}, expected an object"
            )
    found: Mapping[str, Any] = config.get("rope_parameters") or config.get("rope_scaling") or {}
    return {"rope_theta": config.get("rope_theta")} | dict(found)


def rope_metadata(config: Mapping[str, Any], arch: str, where: str) -> tuple[HeaderValue, ...]:
    """The GGUF keys of a rotary embedding.

    Raises UnsupportedModelError for a scaling type that is not none, linear or yarn.
    """
    rope = rope_parameters(config, where)
    entries = [(Keys.Rope.FREQ_BASE, _positive(rope.get("rope_theta"), "rope_theta", where))]
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", *_SCALINGS):
        raise UnsupportedModelError(
            f"{where}: rope_type {shown(kind)}, expected default, linear or yarn"
        )
    scaling: tuple[HeaderValue, ...] = ()
    if kind != "default":
        name = Keys.Rope.SCALING_TYPE.format(arch=arch)
        scaling = (HeaderValue(name, _SCALINGS[kind].value, GGUFValueType.STRING),)
        entries.append((Keys.Rope.SCALING_FACTOR, _positive(rope.get("factor"), "factor", where)))
    if kind == "yarn":
        key = "original_max_position_embeddings"  # transformers' default is the whole context
        length = _positive(rope.get(key) or config.get("max_position_embeddings"), key, where)
        name = Keys.Rope.SCALING_ORIG_CTX_LEN.format(arch=arch)
        scaling += (HeaderValue(name, int(length), _UINT32),)
        entries += [
            (gguf_key, _positive(rope[key], key, where))
            for key, gguf_key in _YARN.items()
            if rope.get(key) is not None
        ]
    numbers = (HeaderValue(key.format(arch=arch), value, _FLOAT32) for key, value in entries)
    return (*numbers, *scaling)


def _positive(value: Any, key: str, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 2**31:
        raise UnsupportedModelError(f"{where}: {key} is {shown(value)}, expected a positive number")
    return float(value)
