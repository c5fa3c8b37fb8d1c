"""The header of a pruned GGUF file: the source's keys, of which few change.

Counts of experts and blocks, and whatever else the architecture derives from them, are those of
the pruned model. The name, the computed size, and keys of our own say what was done. All other keys
keep their place, their type and their value.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from gguf import GGUFValueType, Keys, size_label

from reap2gguf.errors import UnsupportedModelError
from reap2gguf.gguf_files.reader import SCALAR_LAYOUTS
from reap2gguf.gguf_files.split import TENSORS_KEY
from reap2gguf.gguf_files.writer import (
    HeaderWriter,
    encode_start,
    encode_string,
    encode_tensor_info,
    padded,
)
from reap2gguf.messages import shown

if TYPE_CHECKING:
    from reap2gguf.gguf_files.reader import GgufHeader, Kind
    from reap2gguf.gguf_source.slices import Slice
    from reap2gguf.models.contract import MoeModel
    from reap2gguf.models.description import HeaderValue

_OWN = "reap2gguf."
RECIPE_KEY = "reap2gguf.recipe"  # of the file that this program quantized: its tensors are the same
_Typed = tuple[Any, "Kind"]


@dataclass(frozen=True)
class Changes:
    """Keys that differ from the source's: new values with their types; None for a key that goes."""

    values: Mapping[str, _Typed | None]

    def of(self, header: GgufHeader) -> dict[str, _Typed]:
        """All keys of a file with the changes, in the file's order; new ones come last."""
        found = {key: (value, header.kinds[key]) for key, value in header.metadata.items()}
        for key, changed in self.values.items():
            if changed is None:
                found.pop(key, None)
            else:
                found[key] = changed
        return found


def changes_of(
    header: GgufHeader,
    before: MoeModel,
    after: MoeModel,
    slices: Mapping[str, Slice],
    name: str,
    own: Sequence[HeaderValue],
) -> Changes:
    """What changes in a header: `name` is general.name, `own` are the keys of this program.

    Raises UnsupportedModelError for a key of another type than its value can have.
    """
    changed: dict[str, _Typed | None] = {Keys.General.NAME: (name, (GGUFValueType.STRING,))}
    if Keys.General.SIZE_LABEL in header.metadata:
        label = _size_label(before.facts.gguf_arch, slices)
        changed[Keys.General.SIZE_LABEL] = (label, (GGUFValueType.STRING,))
    old = {one.key: one.value for one in before.gguf_metadata()}
    new = {one.key: one for one in after.gguf_metadata()}
    for key, one in new.items():
        if key not in old or old[key] != one.value:
            changed[key] = _as_stored(header, one)
    changed |= {key: None for key in old.keys() - new.keys()}
    earlier = [key for key in header.metadata if key.startswith(_OWN) and key != RECIPE_KEY]
    changed |= dict.fromkeys(earlier)
    return Changes(changed | {one.key: (one.value, _kind(one)) for one in own})


def _as_stored(header: GgufHeader, one: HeaderValue) -> _Typed:
    """A changed value in the type that the file has it in: some have a number per layer."""
    kind = header.kinds.get(one.key, _kind(one))
    value = one.value
    if kind[0] is GGUFValueType.ARRAY and not isinstance(value, list | tuple):
        value = [value] * len(header.metadata[one.key])
    is_number = isinstance(value, int) and kind[0] in SCALAR_LAYOUTS
    if is_number != isinstance(value, int) or (kind[0] in SCALAR_LAYOUTS and not is_number):
        raise UnsupportedModelError(
            f"{header.path}: {one.key} is {shown(header.metadata.get(one.key))}, expected a number"
        )
    return value, kind


def _kind(one: HeaderValue) -> Kind:
    """The type of a value as gguf-py writes it."""
    if one.value_type is not GGUFValueType.ARRAY:
        return (one.value_type,)
    return (one.value_type, GGUFValueType.get_type(one.value[0]))


def _size_label(arch: str, slices: Mapping[str, Slice]) -> str:
    """The size that gguf-py computes from the tensors, such as 128x2.4M."""
    writer = HeaderWriter(arch)
    for name, one in slices.items():
        writer.add_tensor_info(
            name, one.shape, np.dtype(np.float32), one.n_bytes, one.info.tensor_type
        )
    label: str = size_label(*writer.get_total_parameter_count())
    return label


@dataclass(frozen=True)
class PartHead:
    """Everything before the tensors of one file, and where each of these begins."""

    head: bytes
    offsets: Mapping[str, int]  # from the start of the file
    n_bytes: int


def part_head(
    part: GgufHeader, changes: Changes, slices: Mapping[str, Slice], is_first: bool
) -> PartHead:
    """The beginning of a file, whole or a part, with those of its tensors that stay.

    `slices` are of all parts. Keys of the model are in the first part alone.
    """
    keys = (changes if is_first else Changes({})).of(part)
    if TENSORS_KEY in keys:
        keys[TENSORS_KEY] = (len(slices), keys[TENSORS_KEY][1])
    own = [slices[name] for name in part.tensors if name in slices]
    encoded = [encode_start(len(own), len(keys))]
    encoded += [_encode(key, *typed) for key, typed in keys.items()]
    begins, position = [], 0
    for one in own:
        begins.append(position)
        encoded.append(encode_tensor_info(replace(one.info, shape=one.shape), position))
        position += padded(one.n_bytes, part.alignment)
    head = b"".join(encoded)
    head = head.ljust(padded(len(head), part.alignment), b"\0")
    offsets = {one.info.name: len(head) + at for one, at in zip(own, begins, strict=True)}
    return PartHead(head, offsets, len(head) + position)


def _encode(key: str, value: Any, kind: Kind) -> bytes:
    """A key with its value, as a GGUF file has it."""
    start = encode_string(key) + struct.pack("<I", kind[0])
    if kind[0] is not GGUFValueType.ARRAY:
        return start + _scalar(value, kind[0])
    start += struct.pack("<IQ", kind[1], len(value))
    if kind[1] is GGUFValueType.STRING:
        return start + b"".join(map(encode_string, value))
    return start + np.array(value, np.dtype(SCALAR_LAYOUTS[kind[1]])).tobytes()


def _scalar(value: Any, value_type: GGUFValueType) -> bytes:
    if value_type is GGUFValueType.STRING:
        return encode_string(value)
    return struct.pack(SCALAR_LAYOUTS[value_type], value)
