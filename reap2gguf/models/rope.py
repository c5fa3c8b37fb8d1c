"""Rotary embeddings: read from a config as transformers reads them, written as llama.cpp does.

transformers takes `rope_scaling`, or `rope_parameters` where that is absent or empty, and adds
`rope_theta` and `partial_rotary_factor` from beside it (modeling_rope_utils.py). Values that other
readers would take from elsewhere are refused, so that a config has one meaning.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gguf import GGUFValueType, Keys, RopeScalingType

from reap2gguf.errors import UnsupportedModelError
from reap2gguf.messages import shown

if TYPE_CHECKING:
    from reap2gguf.checkpoint.config import ConfigReader

_SCALINGS = {"linear": RopeScalingType.LINEAR, "yarn": RopeScalingType.YARN}
_DEFAULT_THETA = 10_000.0  # transformers', of most configs without one
_ORIGINAL = "original_max_position_embeddings"
DEFAULT_SECTIONS = (11, 11, 10)  # transformers' `mrope_section` where the config has none
NOTHING: Mapping[str, float] = {}
# what llama.cpp computes YaRN with in these architectures, which read no key for it
_FIXED = {
    "extrapolation_factor": (1.0, Keys.Rope.SCALING_YARN_EXT_FACTOR),
    "beta_fast": (32.0, Keys.Rope.SCALING_YARN_BETA_FAST),
    "beta_slow": (1.0, Keys.Rope.SCALING_YARN_BETA_SLOW),
}
# transformers' names (RopeParameters), the older spelling `type`, and Qwen's own; those of another
# type of scaling have no effect anywhere
_KNOWN = frozenset(
    {
        "rope_theta",
        "rope_type",
        "type",
        "partial_rotary_factor",
        "factor",
        _ORIGINAL,
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "short_factor",
        "long_factor",
        "low_freq_factor",
        "high_freq_factor",
        "mscale",
        "mscale_all_dim",
        "truncate",
        "mrope_section",
        "mrope_interleaved",
        "interleaved",
        "extrapolation_factor",
        "finetuned",
    }
)


@dataclass(frozen=True)
class Rope:
    """A rotary embedding."""

    kind: str  # default, linear or yarn; or one that a family reads by itself
    theta: float
    factor: float  # the context is longer than the original one by this
    values: ConfigReader  # all settings, as transformers has them
    original_length: int | None = None  # tokens, of yarn
    attention_factor: float = 1.0  # cosine and sine are multiplied by it, of yarn
    has_fractions: bool = False  # of dimensions, where yarn's range begins and ends

    @property
    def implied_factor(self) -> float:
        """The attention factor that llama.cpp has for yarn if no key says otherwise."""
        return _magnitude(self.factor, 1.0) if self.kind == "yarn" else 1.0

    def config_values(self) -> dict[str, Any]:
        """All settings, as transformers keeps them in `rope_parameters`."""
        found = {**self.values.values, "rope_type": self.kind}
        if self.kind == "yarn":
            found[_ORIGINAL] = self.original_length
        return found

    def metadata(self) -> list[tuple[str, Any, GGUFValueType]]:
        """Keys of a GGUF header, their values and types, in the order of llama.cpp's converter."""
        keys = Keys.Rope
        numbers: list[tuple[str, float]] = [(keys.FREQ_BASE, self.theta)]
        scaling: list[tuple[str, Any, GGUFValueType]] = []
        if self.kind in _SCALINGS:
            name = _SCALINGS[self.kind].value
            scaling.append((keys.SCALING_TYPE, name, GGUFValueType.STRING))
            numbers.append((keys.SCALING_FACTOR, self.factor))
        if self.kind == "yarn":
            scaling.append((keys.SCALING_ORIG_CTX_LEN, self.original_length, GGUFValueType.UINT32))
            numbers += [
                (gguf_key, float(self.values.values[key]))
                for key, (_, gguf_key) in _FIXED.items()
                if self.values.values.get(key)
            ]
            # llama.cpp multiplies its own factor by this key
            ratio = self.attention_factor / self.implied_factor
            if not math.isclose(ratio, 1.0, rel_tol=1e-9):
                numbers.append((keys.SCALING_ATTN_FACTOR, ratio))
        return [(key, value, GGUFValueType.FLOAT32) for key, value in numbers] + scaling


def read_rope(
    read: ConfigReader,
    default_share: float | None = None,
    default_theta: float = _DEFAULT_THETA,
    may_have_fractions: bool = False,
    unread: Mapping[str, float] = NOTHING,
) -> Rope:
    """The rotary embedding of a text model's config.

    `default_share` is the `partial_rotary_factor` of a config without one, `default_theta` its
    `rope_theta`. With `may_have_fractions`, `truncate` may be false, although llama.cpp rounds the
    range of YaRN to whole dimensions. `unread` are settings of YaRN that a family has, though
    llama.cpp reads no key for them. Raises UnsupportedModelError for a scaling that is not none,
    linear or yarn, for a setting that llama.cpp cannot express or that is not known, and for two
    settings that contradict each other.
    """
    values = _settings(read, default_share, default_theta)
    kind = values.values.get("rope_type", values.values.get("type", "default"))
    if kind not in ("default", *_SCALINGS):
        raise UnsupportedModelError(
            f"{read.where}: rope_type {shown(kind)}, expected default, linear or yarn"
        )
    theta = values.number("rope_theta", low=0, high=2**31)
    if not theta > (1 if kind == "yarn" else 0):
        raise UnsupportedModelError(
            f"{read.where}: rope_theta is {shown(theta)}, expected a positive number"
            + (" above 1" if kind == "yarn" else "")
        )
    if kind == "default":
        return Rope(kind, theta, 1.0, values)
    factor = values.number("factor", low=2**-10, high=2**31)
    if kind == "linear":
        return Rope(kind, theta, factor, values)
    length = _original_length(read, values)
    _refuse_inexpressible(values, may_have_fractions, unread)
    attention_factor = _attention_factor(values, factor)
    has_fractions = not values.boolean("truncate", default=True)
    return Rope(kind, theta, factor, values, length, attention_factor, has_fractions)


def check_rotary_width(rope: Rope, width: int, head_dim: int) -> None:
    """Refuse a number of rotated dimensions of a head that cannot be computed.

    Raises UnsupportedModelError if it is odd, or if YaRN's ranges for it are empty, where
    transformers and llama.cpp compute different things.
    """
    where = rope.values.where
    if width < 2 or width % 2 or width > head_dim:
        raise UnsupportedModelError(
            f"{where}: {width} of the {head_dim} dimensions of a head are rotated, expected an "
            "even number of them"
        )
    if rope.kind != "yarn" or rope.original_length is None:
        return
    low, high = (
        width
        * math.log(rope.original_length / (_FIXED[key][0] * 2 * math.pi))
        / math.log(rope.theta)
        for key in ("beta_fast", "beta_slow")
    )
    if max(math.floor(low / 2), 0) > min(math.ceil(high / 2), width - 1):
        raise UnsupportedModelError(
            f"{where}: YaRN with {_ORIGINAL} {rope.original_length} has no dimension between its "
            "betas, where transformers and llama.cpp disagree; expected a longer original context"
        )


def _settings(
    read: ConfigReader, default_share: float | None, default_theta: float
) -> ConfigReader:
    """All settings as transformers sees them; refuses two that disagree."""
    scaling, parameters = (read.section(key) for key in ("rope_scaling", "rope_parameters"))
    name = "rope_scaling" if scaling else "rope_parameters"
    found = dict(scaling or parameters)
    _refuse_unknown(read, name, found)
    read.with_values(found).refuse_spellings(("rope_type", "type"))
    defaults = {"rope_theta": default_theta}
    if default_share is not None:
        defaults["partial_rotary_factor"] = default_share
    # transformers moves the original length for the types that use it
    is_yarn = found.get("rope_type", found.get("type")) == "yarn"
    for key in ("rope_theta", "partial_rotary_factor", *([_ORIGINAL] if is_yarn else [])):
        read.refuse_difference(f"{name}.{key}", found.get(key), key, read.values.get(key))
        if key in found or key in read.values or key in defaults:
            found.setdefault(key, read.values.get(key, defaults.get(key)))
    for key in ("rope_theta", "partial_rotary_factor"):
        if key in found and found[key] is None:
            raise UnsupportedModelError(
                f"{read.where}: {key} is null, expected a number; set it or delete the key"
            )
    if scaling and parameters:
        _refuse_lost(read, found, parameters)
    return read.with_values(found)


def _refuse_unknown(read: ConfigReader, name: str, found: Mapping[str, Any]) -> None:
    for key, value in found.items():
        if isinstance(value, Mapping):
            raise UnsupportedModelError(
                f"{read.where}: {name} has settings of their own for {shown(key)}, expected one "
                "rotary embedding for all layers: llama.cpp has only one in this architecture"
            )
        if key not in _KNOWN and value is not None:
            raise UnsupportedModelError(
                f"{read.where}: {name} has the key {shown(key)} ({shown(value)}), which neither "
                "transformers nor llama.cpp reads; delete it"
            )


def _refuse_lost(
    read: ConfigReader, found: Mapping[str, Any], parameters: Mapping[str, Any]
) -> None:
    """Refuse `rope_parameters` that `rope_scaling` does not only complete."""
    for key, value in parameters.items():
        is_kind = key in ("rope_type", "type")
        # sections are always interleaved, whatever the last of these says
        if value is None or (is_kind and value == "default") or key == "mrope_interleaved":
            continue
        now = found.get("rope_type", found.get("type")) if is_kind else found.get(key)
        if key == "mrope_section" and now is None:
            now = list(DEFAULT_SECTIONS)
        if now != value:
            raise UnsupportedModelError(
                f"{read.where}: rope_parameters.{key} is {shown(value)}, but with rope_scaling "
                f"beside it transformers reads {shown(now)}: it takes rope_scaling alone; move the "
                "keys of rope_scaling into rope_parameters, and delete rope_scaling"
            )


def _original_length(read: ConfigReader, values: ConfigReader) -> int:
    if _ORIGINAL in values.values:
        return values.integer(_ORIGINAL, low=1)
    return read.integer("max_position_embeddings", low=1)  # transformers' default


def _refuse_inexpressible(
    values: ConfigReader, may_have_fractions: bool, unread: Mapping[str, float]
) -> None:
    """Refuse settings of YaRN that llama.cpp has no key for, and that are not the family's."""
    for key, (fixed, _) in _FIXED.items():
        found = values.values.get(key)
        # transformers takes its default for null, and for a beta of 0
        is_default = found is None or (key.startswith("beta") and found in (0, 0.0))
        if not is_default and values.number(key) not in (fixed, unread.get(key)):
            raise UnsupportedModelError(
                f"{values.where}: {key} is {shown(found)}, expected {fixed:g}: "
                "llama.cpp computes YaRN with this in this architecture, and has no key for another"
            )
    known = (True, False) if may_have_fractions else (True,)
    if not any(values.values.get("truncate", True) is one for one in known):
        raise UnsupportedModelError(
            f"{values.where}: truncate is {shown(values.values['truncate'])}, expected "
            f"{' or '.join(str(one).lower() for one in known)}: llama.cpp's YaRN always rounds its "
            "range to whole dimensions"
        )


def _attention_factor(values: ConfigReader, factor: float) -> float:
    """What transformers multiplies cosine and sine by."""
    if values.values.get("attention_factor") is not None:
        found = values.number("attention_factor", low=0, high=2**20)
        if not found:
            raise UnsupportedModelError(
                f"{values.where}: attention_factor is 0, expected a positive number"
            )
        return found
    both = ("mscale", "mscale_all_dim")
    if not all(values.values.get(key) for key in both):
        return _magnitude(factor, 1.0)
    own, all_dims = (_magnitude(factor, values.number(key, low=0, high=2**10)) for key in both)
    return own / all_dims


def _magnitude(factor: float, scale: float) -> float:
    """YaRN's scale of the attention (arXiv 2309.00071)."""
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0
