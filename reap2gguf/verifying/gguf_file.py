"""Checks a GGUF file: header against plan and config, every value against the weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from gguf import GGMLQuantizationType

from reap2gguf.errors import ArtifactError, Reap2ggufError
from reap2gguf.files import is_plain
from reap2gguf.ggml import STORABLE, Ggml, load_ggml
from reap2gguf.gguf_files.rows import MAX_VALUES, read_rows, rows_per_matrix
from reap2gguf.gguf_files.split import read_whole_header
from reap2gguf.messages import shown
from reap2gguf.models.description import GgufTensor, SideFile, experts_of, is_of_experts
from reap2gguf.tokenizer.gguf_keys import tokenizer_keys
from reap2gguf.verifying.exactness import WITHIN_BOUNDS, Exactness
from reap2gguf.verifying.matrices import (
    ERROR_BOUNDS,
    errs_as_its_type,
    likely_slab,
    matrix_error,
)

if TYPE_CHECKING:
    from reap2gguf.bundle.manifest import GgufRecord, Manifest, SideRecord
    from reap2gguf.checkpoint.weights import Weights
    from reap2gguf.gguf_files.reader import GgufHeader, GgufTensorInfo
    from reap2gguf.models.contract import MoeModel
    from reap2gguf.progress import Progress

_MAX_ROW = 2**22  # values; a row is read at once


@dataclass(frozen=True)
class ExpectedGguf:
    """What a GGUF file must hold besides the weights; None: not checked."""

    tensor_types: Mapping[str, GGMLQuantizationType] | None = None
    n_experts: int | None = None
    file_type: int | None = None  # general.file_type


def expected_gguf(manifest: Manifest, record: GgufRecord) -> ExpectedGguf:
    """What a GGUF file must hold by the manifest of its bundle."""
    return ExpectedGguf(types_by_tensor(record.tensors), manifest.pruning.n_kept)


def expected_side(manifest: Manifest, record: SideRecord) -> ExpectedGguf:
    """What a side file must hold by the manifest of its bundle."""
    return ExpectedGguf(types_by_tensor(record.tensors))


def types_by_tensor(names: Mapping[str, str]) -> dict[str, GGMLQuantizationType]:
    """The types of tensors, which a manifest records by name."""
    return {tensor: GGMLQuantizationType[name] for tensor, name in names.items()}


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
    NaN, infinity and matrices of zeros.
    """
    header, problems = open_gguf(path)
    yield from problems
    if header is None:
        return
    yield from check_header(header, expected)
    if opened is None:
        yield from check_values(header, n_threads, progress)
    else:
        yield from compare_model(header, *opened, n_threads, progress)


def check_side_file(
    path: Path,
    expected: ExpectedGguf,
    source: tuple[Weights, Sequence[SideFile]] | None,
    n_threads: int,
    progress: Progress,
    exactness: Exactness = WITHIN_BOUNDS,
) -> Iterator[str]:
    """Violations of a GGUF file beside the models, such as a vision projector.

    `source` is the weights of the model and its side files, of which `path` must be one; None as in
    `check_gguf`.
    """
    header, problems = open_gguf(path)
    yield from problems
    if header is None:
        return
    if expected.tensor_types is not None:
        yield from check_tensor_types(header, expected.tensor_types)
    if source is None:
        yield from check_values(header, n_threads, progress)
        return
    weights, sides = source
    general_type = header.metadata.get("general.type")
    side = next((side for side in sides if side.general_type == general_type), None)
    if side is None:
        types = " or ".join(side.general_type for side in sides)
        yield f"{path.name}: general.type is {shown(general_type)}, expected {types}"
    else:
        yield from compare_tensors(header, weights, side.tensors, n_threads, progress)


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
    arch = header.metadata.get("general.architecture")
    if not isinstance(arch, str):
        yield f"{where}: general.architecture is {shown(arch)}, expected a name"
        return
    count = header.metadata.get(f"{arch}.expert_count")
    used = header.metadata.get(f"{arch}.expert_used_count")
    if expected.n_experts is not None and count != expected.n_experts:
        yield f"{where}: {arch}.expert_count is {shown(count)}, expected {expected.n_experts}"
    file_type = header.metadata.get("general.file_type")
    if expected.file_type is not None and file_type != expected.file_type:
        yield f"{where}: general.file_type is {shown(file_type)}, expected {expected.file_type}"
    if not isinstance(used, int) or not isinstance(count, int) or not 1 <= used <= count:
        yield f"{where}: {arch}.expert_used_count is {shown(used)}, expected 1 to {shown(count)}"
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


def compare_model(
    header: GgufHeader,
    weights: Weights,
    model: MoeModel,
    n_threads: int,
    progress: Progress,
) -> Iterator[str]:
    """Keys and tokenizer against config and tokenizer files, then every tensor by value."""
    where = header.path.name
    try:
        tokenizer = tokenizer_keys(weights.folder, model.facts.vocab_size, model.pre_tokenizers)
    except Reap2ggufError as error:
        tokenizer = {}
        yield f"{weights.folder.name}: {error}"
    for key, expected in tokenizer.items():
        if header.metadata.get(key) != expected:
            yield f"{where}: {key} differs from the tokenizer files"
    for value in model.gguf_metadata():
        found = header.metadata.get(value.key)
        same = found == value.value or (
            isinstance(value.value, float)
            and isinstance(found, float)
            and np.float32(found) == np.float32(value.value)
        )
        if not same:
            yield f"{where}: {value.key} is {shown(found)}, expected {shown(value.value)}"
    tensors = model.gguf_tensors(weights.tensors)
    yield from compare_tensors(header, weights, tensors, n_threads, progress)


def compare_tensors(
    header: GgufHeader,
    weights: Weights,
    described: Sequence[GgufTensor],
    n_threads: int,
    progress: Progress,
) -> Iterator[str]:
    """Names and shapes of a file's tensors, then every matrix by value."""
    where = header.path.name
    tensors = {tensor.name: tensor for tensor in described}
    for name in sorted(tensors.keys() ^ header.tensors.keys()):
        problem = "is missing" if name in tensors else "is not one of the model's"
        yield f"{where}: tensor {name} {problem}"
    fitting = []
    for name in tensors.keys() & header.tensors.keys():
        if header.tensors[name].shape == tensors[name].shape:
            fitting.append(tensors[name])
        else:
            yield (
                f"{where}: {name} has shape {list(header.tensors[name].shape)}, expected "
                f"{list(tensors[name].shape)}"
            )
    yield from _compare_all(header, weights, fitting, n_threads, progress)


def check_values(header: GgufHeader, n_threads: int, progress: Progress) -> Iterator[str]:
    """Violations without weights to compare with: NaN, infinity, and matrices of zeros alone."""
    ggml = load_ggml()

    def check(info: GgufTensorInfo) -> str | None:
        if info.tensor_type not in STORABLE:
            found = info.tensor_type.name
            return f"{header.path.name}: {info.name} is {found}, which is not a type for weights"
        if info.shape[-1] > _MAX_ROW:
            return f"{header.path.name}: {info.name} has rows of {info.shape[-1]:,} values"
        n_rows = prod(info.shape[:-1])
        per_matrix = n_rows // info.shape[0] if len(info.shape) == 3 else n_rows
        step = max(1, MAX_VALUES // info.shape[-1])
        for matrix in range(n_rows // per_matrix):
            where = f"{header.path.name}: {info.name}{_expert(info, matrix)}"
            empty = True
            for first in range(matrix * per_matrix, (matrix + 1) * per_matrix, step):
                last = min(first + step, (matrix + 1) * per_matrix)
                values = ggml.dequantize(header.read(info.name, first, last), info.tensor_type)
                if not np.isfinite(values).all():
                    return f"{where} holds NaN or infinite values"
                empty = empty and not values.any()
            is_vector = len(info.shape) == 1 or info.name.endswith(".bias")
            if empty and not is_vector:  # a vector may be zero, as biases often are
                return f"{where} holds only zeros"
        return None

    yield from _each(list(header.tensors.values()), check, header, n_threads, progress)


def _compare_all(
    header: GgufHeader,
    weights: Weights,
    tensors: Sequence[GgufTensor],
    n_threads: int,
    progress: Progress,
) -> Iterator[str]:
    ggml = load_ggml()
    by_name = {tensor.name: tensor for tensor in tensors}

    def check(info: GgufTensorInfo) -> str | None:
        try:
            return _compare(header, ggml, weights, by_name[info.name], info)
        except Reap2ggufError as error:
            return f"{header.path.name}: {info.name}: {error}"

    infos = [header.tensors[tensor.name] for tensor in tensors]
    yield from _each(infos, check, header, n_threads, progress)


def _compare(
    header: GgufHeader, ggml: Ggml, weights: Weights, tensor: GgufTensor, info: GgufTensorInfo
) -> str | None:
    """The first violation in a tensor: each matrix must be its slab, within the type's error."""
    where = f"{header.path.name}: {info.name}"
    bound = ERROR_BOUNDS.get(info.tensor_type.name)
    if bound is None:
        return f"{where} is {info.tensor_type.name}, which is not a type for weights"
    for index, slab in enumerate(tensor.slabs):
        which = _expert(info, index)
        error = matrix_error(header, ggml, weights, tensor, index, slab)
        if not np.isfinite(error.distance):
            return f"{where}{which} holds NaN or infinite values"
        if error.zeros_only and error.scale and len(info.shape) > 1:
            return f"{where}{which} holds only zeros"
        # written so that a NaN is a violation
        if error.relative <= bound:
            continue
        stored = read_rows(weights, tensor, slab, 0, rows_per_matrix(tensor))
        if not errs_as_its_type(ggml, stored, info.tensor_type, error.relative):
            likely = likely_slab(header, ggml, weights, tensor, index, bound)
            hint = "" if likely is None else f"; it holds the weights of expert {likely}"
            return (
                f"{where}{which} differs from {slab.stored} by {error.relative:.1%}, expected at "
                f"most {bound:.1%} for {info.tensor_type.name}{hint}"
            )
    return None


def _expert(info: GgufTensorInfo, index: int) -> str:
    return f" expert {index}" if len(info.shape) == 3 else ""


def _each(
    infos: Sequence[GgufTensorInfo],
    check: Callable[[GgufTensorInfo], str | None],
    header: GgufHeader,
    n_threads: int,
    progress: Progress,
) -> Iterator[str]:
    """Run `check` over all tensors in threads; violations in the file's order."""
    total = sum(info.n_bytes for info in infos)
    with (
        progress.task(f"Verifying {header.path.name}", total, "bytes") as task,
        ThreadPoolExecutor(n_threads) as pool,
    ):
        for info, violation in zip(infos, pool.map(check, infos), strict=True):
            task.advance(info.n_bytes)
            if violation:
                yield violation
