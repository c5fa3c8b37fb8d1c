"""What config.json says of how weights are quantized, read and checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from reap2gguf.checkpoint.config import ConfigReader
from reap2gguf.checkpoint.quantized.keys import ADVICE, sections_of
from reap2gguf.errors import UnsupportedModelError
from reap2gguf.messages import shown

_MOST = 2**20  # columns or rows of a block
_FLOAT_FORMATS = ("float-quantized", "naive-quantized")
_E4M3 = ("e4m3", "float8_e4m3fn")  # DeepSeek-V3's name of the type, and MiniMax-M2's
_PACKED_FORMAT = "pack-quantized"


@dataclass(frozen=True)
class Blocks:
    """The rows and columns that one scale is of; None: as many as there are."""

    rows: int | None
    columns: int | None


@dataclass(frozen=True)
class Settings:
    """How the weights are stored that are quantized; None for what the config does not name."""

    method: str
    float8: Blocks | None = None
    packed: Blocks | None = None
    bits: int = 4  # of `packed`


def read_settings(config: Mapping[str, Any], where: str) -> Settings | None:
    """How a config says that its weights are quantized; None if that is no way of this program.

    Raises UnsupportedModelError, in one line, for a variant that is not decoded.
    """
    found = sections_of(config)
    if len(found) != 1:
        return None
    ((key, section),) = found.items()
    if not isinstance(section, Mapping):
        return None
    method, read = section.get("quant_method"), ConfigReader(section, f"{where}: {key}")
    if method == "fp8":
        read.expect("fmt", *_E4M3, why=f"other bytes mean other numbers; {ADVICE}")
        return Settings(method, float8=_blocks(read, "weight_block_size"))
    if method == "mxfp4":
        return Settings(method)
    if method == "compressed-tensors":
        return _compressed(read)
    return None


def _blocks(read: ConfigReader, key: str) -> Blocks:
    """Rows and columns of a block, or no blocks where the key is absent."""
    value = read.values.get(key)
    if value is None:
        return Blocks(None, None)
    good = isinstance(value, list) and len(value) == 2
    if not good or not all(type(one) is int and 0 < one <= _MOST for one in value):
        raise UnsupportedModelError(
            f"{read.where}: {key} is {shown(value)}, expected [rows, columns] of a block, each at "
            f"least 1; correct it, as the checkpoint was published with [128, 128] in most cases"
        )
    return Blocks(*value)


def _compressed(read: ConfigReader) -> Settings:
    """The settings of compressed-tensors, whose groups of modules may differ."""
    for key in ("kv_cache_scheme", "transform_config", "sparsity_config"):
        value = read.values.get(key)
        if value and not (isinstance(value, Mapping) and value.get("format") == "dense"):
            raise UnsupportedModelError(
                f"{read.where}: {key} is set, which is not decoded; {ADVICE}"
            )
    groups = read.section("config_groups")
    if not groups:
        raise UnsupportedModelError(
            f"{read.where}: config_groups is empty, expected how weights are quantized; {ADVICE}"
        )
    found: list[Settings] = []
    for name in groups:
        group = read.with_values(groups).section(name)
        weights = read.with_values(group).section("weights")
        if not weights:
            continue  # its modules are stored as they are
        kind = group.get("format") or read.values.get("format")
        inside = ConfigReader(weights, f"{read.where}: config_groups.{name}.weights")
        one = _of_group(inside, kind)
        if one not in found:
            found.append(one)
    floats = [one.float8 for one in found if one.float8 is not None]
    packed = [(one.packed, one.bits) for one in found if one.packed is not None]
    if len(floats) > 1 or len(packed) > 1:
        raise UnsupportedModelError(
            f"{read.where}: config_groups quantize weights in {len(found)} ways, expected at most "
            f"one of FP8 and one of whole numbers; {ADVICE}"
        )
    blocks, bits = packed[0] if packed else (None, 4)
    return Settings("compressed-tensors", floats[0] if floats else None, blocks, bits)


def _of_group(read: ConfigReader, kind: Any) -> Settings:
    """How the weights of one group of modules are stored; `kind` is its format."""
    number, bits = read.values.get("type", "int"), read.values.get("num_bits")
    is_float = kind in _FLOAT_FORMATS and (number, bits) == ("float", 8)
    is_packed = kind == _PACKED_FORMAT and number == "int" and bits in (4, 8)
    if not is_float and not is_packed:
        raise UnsupportedModelError(
            f"{read.where}: {shown(bits)} bits of {shown(number)} in the format {shown(kind)}, "
            "which is not decoded, expected FP8 (float-quantized) or whole numbers of 4 or 8 bits "
            f"(pack-quantized); {ADVICE}"
        )
    read.expect("symmetric", True, why=f"zero points are not decoded; {ADVICE}")
    read.expect("actorder", "weight", "static", False, why=f"order is not decoded; {ADVICE}")
    blocks = _of_strategy(read)
    if is_float:
        return Settings("", float8=blocks)
    if blocks.rows != 1:
        raise UnsupportedModelError(
            f"{read.where}: strategy is {shown(read.values.get('strategy'))}, expected 'group' or "
            f"'channel' for whole numbers; {ADVICE}"
        )
    return Settings("", packed=blocks, bits=8 if bits == 8 else 4)


def _of_strategy(read: ConfigReader) -> Blocks:
    strategy = read.values.get("strategy")
    if strategy == "tensor":
        return Blocks(None, None)
    if strategy == "channel":
        return Blocks(1, None)
    if strategy == "group":
        return Blocks(1, read.integer("group_size", low=1, high=_MOST))
    if strategy == "block" and read.values.get("block_structure") is not None:
        return _blocks(read, "block_structure")
    raise UnsupportedModelError(
        f"{read.where}: strategy is {shown(strategy)}, expected 'tensor', 'channel', 'group' or "
        f"'block' with its block_structure; {ADVICE}"
    )
