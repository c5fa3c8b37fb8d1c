"""A GGUF file with other metadata and the same tensors, written by gguf-py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gguf import GGUFReader, GGUFValueType, GGUFWriter

_OWN = ("GGUF.", "general.architecture")


def altered(source: Path, target: Path, **values: Any) -> Path:
    """`source` with these keys set; an integer is written as uint32, and None leaves a key out.

    Dots in the names of keys are written as two underscores; `arch__` is the architecture.
    """
    reader = GGUFReader(source)
    arch = str(reader.fields["general.architecture"].contents())
    writer = GGUFWriter(target, arch)
    given = {
        key.replace("__", ".").replace("arch.", f"{arch}.", 1): value
        for key, value in values.items()
    }
    for name, field in reader.fields.items():
        if name not in given and not name.startswith(_OWN):
            of = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(name, field.contents(), field.types[0], of)
    for name, value in given.items():
        if isinstance(value, list):
            writer.add_array(name, value)
        elif value is not None:
            is_count = type(value) is int
            kind = GGUFValueType.UINT32 if is_count else GGUFValueType.get_type(value)
            writer.add_key_value(name, value, kind)
    for tensor in reader.tensors:
        writer.add_tensor(
            tensor.name, tensor.data, raw_shape=tensor.data.shape, raw_dtype=tensor.tensor_type
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target
