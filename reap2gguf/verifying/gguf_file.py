"""Checks a GGUF file: layout, keys and types against plan and config, values against weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gguf import GGMLQuantizationType

from reap2gguf.errors import ArtifactError
from reap2gguf.files import is_plain
from reap2gguf.gguf_files.split import read_whole_header
from reap2gguf.messages import shown
from reap2gguf.models.description import GgufTensor, SideFile, experts_of, is_of_experts
from reap2gguf.verifying.exactness import WITHIN_BOUNDS, Exactness
from reap2gguf.verifying.gguf_header import (
    ExpectedGguf,
    check_known_keys,
    check_model_keys,
    check_side_keys,
    expected_gguf,
    expected_side,
    types_by_tensor,
)
from reap2gguf.verifying.gguf_layout import check_layout
from reap2gguf.verifying.gguf_values import check_values, compare_values

if TYPE_CHECKING:
    from reap2gguf.bundle.manifest import GgufRecord
    from reap2gguf.checkpoint.weights import Weights
    from reap2gguf.gguf_files.reader import GgufHeader
    from reap2gguf.models.contract import MoeModel
    from reap2gguf.progress import Progress

__all__ = [
    "ExpectedGguf",
    "check_experts",
    "check_gguf",
    "check_gguf_header",
    "check_side_file",
    "expected_gguf",
    "expected_side",
]


def open_gguf(path: Path) -> tuple[GgufHeader | None, list[str]]:
    """The header of a file, of all parts if it is the first of several; or the violation."""
    try:
        return read_whole_header(path), []
    except ArtifactError as error:
        return None, [str(error)]


def check_gguf(
    path: Path,
    expected: ExpectedGguf,
    opened: tuple[Weights, MoeModel] | None,
    n_threads: int,
    progress: Progress,
    exactness: Exactness = WITHIN_BOUNDS,
) -> Iterator[str]:
    """Violations of a model's GGUF file: its header against `expected`, then every value.

    `opened` is the model that the file was made from. If it is None, values are only checked for
    NaN and infinity.
    """
    header, problems = open_gguf(path)
    yield from problems
    if header is None:
        return
    found = list(check_header(header, expected))
    if opened is None:
        yield from found
        yield from check_values(header, n_threads, progress)
        return
    weights, model = opened
    found += check_model_keys(header, expected, weights, model, exactness.imatrix)
    yield from dict.fromkeys(found)
    tensors = model.gguf_tensors(weights.tensors)
    yield from compare_tensors(header, weights, tensors, exactness, n_threads, progress)


def check_side_file(
    path: Path,
    expected: ExpectedGguf,
    source: tuple[Weights, MoeModel, Sequence[SideFile]] | None,
    n_threads: int,
    progress: Progress,
    exactness: Exactness = WITHIN_BOUNDS,
) -> Iterator[str]:
    """Violations of a GGUF file beside the models, such as a vision projector.

    `source` is the weights, the model and its side files, of which `path` must be one; None as in
    `check_gguf`.
    """
    header, problems = open_gguf(path)
    yield from problems
    if header is None:
        return
    yield from check_layout(header)
    if expected.tensor_types is not None:
        yield from check_tensor_types(header, expected.tensor_types)
    if source is None:
        yield from check_values(header, n_threads, progress)
        return
    weights, model, sides = source
    general_type = header.metadata.get("general.type")
    side = next((side for side in sides if side.general_type == general_type), None)
    if side is None:
        types = " or ".join(side.general_type for side in sides)
        yield f"{path.name}: general.type is {shown(general_type)}, expected {types}"
        return
    yield from check_side_keys(header, expected, weights, model, side)
    yield from compare_tensors(header, weights, side.tensors, exactness, n_threads, progress)


def check_gguf_header(path: Path, expected: ExpectedGguf) -> list[str]:
    """Violations in the header of a GGUF file, or in those of all its parts together."""
    header, problems = open_gguf(path)
    return problems if header is None else list(check_header(header, expected))


def check_experts(folder: Path, record: GgufRecord, n_kept: int) -> list[str]:
    """Violations in the header of a GGUF file, or in those of its parts together.

    Each tensor of the record must be there once with its type, and each layer must have `n_kept`
    experts and router rows.
    """
    absent = [name for name in record.files if not is_plain(folder / name)]
    if absent:
        return [f"{folder.name}: {name} is missing" for name in absent]
    expected = ExpectedGguf(types_by_tensor(record.tensors), n_kept)
    return check_gguf_header(folder / record.first, expected)


def check_header(header: GgufHeader, expected: ExpectedGguf) -> Iterator[str]:
    """What a header says must agree with itself and with the plan, layer by layer."""
    where = header.path.name
    yield from check_layout(header)
    arch = header.metadata.get("general.architecture")
    if not isinstance(arch, str):
        yield f"{where}: general.architecture is {shown(arch)}, expected a name"
        return
    count = header.metadata.get(f"{arch}.expert_count")
    used = header.metadata.get(f"{arch}.expert_used_count")
    if expected.n_experts is not None and count != expected.n_experts:
        yield f"{where}: {arch}.expert_count is {shown(count)}, expected {expected.n_experts}"
    if not isinstance(used, int) or not isinstance(count, int) or not 1 <= used <= count:
        yield f"{where}: {arch}.expert_used_count is {shown(used)}, expected 1 to {shown(count)}"
    yield from check_known_keys(header, expected, arch)
    for name, info in header.tensors.items():
        n_entries = experts_of(name, info.shape)
        if n_entries is not None and n_entries != count:
            rows = "experts" if is_of_experts(name) else "router rows"
            yield f"{where}: {name} has {n_entries} {rows}, {arch}.expert_count is {shown(count)}"
    if expected.tensor_types is not None:
        yield from check_tensor_types(header, expected.tensor_types)


def check_tensor_types(
    header: GgufHeader, tensor_types: Mapping[str, GGMLQuantizationType]
) -> Iterator[str]:
    """A file's tensors must be those of the plan, each of its type."""
    where = header.path.name
    for name, tensor_type in tensor_types.items():
        if name not in header.tensors:
            yield f"{where}: tensor {name} is missing"
        elif header.tensors[name].tensor_type is not tensor_type:
            found = header.tensors[name].tensor_type.name
            yield f"{where}: {name} is {found}, expected {tensor_type.name}"
    for name in sorted(header.tensors.keys() - tensor_types.keys()):
        yield f"{where}: tensor {name} is not in the plan"


def compare_tensors(
    header: GgufHeader,
    weights: Weights,
    described: Sequence[GgufTensor],
    exactness: Exactness,
    n_threads: int,
    progress: Progress,
) -> Iterator[str]:
    """Names and shapes of a file's tensors, then every row by value."""
    where = header.path.name
    tensors = {tensor.name: tensor for tensor in described}
    for name in sorted(tensors.keys() ^ header.tensors.keys()):
        problem = "is missing" if name in tensors else "is not one of the model's"
        yield f"{where}: tensor {name} {problem}"
    fitting = []
    for tensor in described:
        info = header.tensors.get(tensor.name)
        if info is None:
            continue
        if info.shape != tensor.shape:
            yield (
                f"{where}: {tensor.name} has shape {list(info.shape)}, expected "
                f"{list(tensor.shape)}"
            )
            continue
        if tensor.always_f32 and info.tensor_type is not GGMLQuantizationType.F32:
            found = info.tensor_type.name
            yield f"{where}: {tensor.name} is {found}, expected F32, which llama.cpp keeps it in"
        fitting.append(tensor)
    yield from compare_values(header, weights, fitting, exactness, n_threads, progress)
