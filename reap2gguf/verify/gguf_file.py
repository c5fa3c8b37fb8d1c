"""Checks a GGUF file: header against plan and config, every value against the safetensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType

from reap2gguf.artifacts.gguf_header import GgufHeader, GgufTensorInfo, read_gguf_header
from reap2gguf.checkpoint.checkpoint import Checkpoint
from reap2gguf.errors import ArtifactError, Reap2ggufError
from reap2gguf.ggml import Ggml, load_ggml
from reap2gguf.models.contract import MoeModel
from reap2gguf.models.description import GgufTensor, Slab
from reap2gguf.progress import Progress

Floats = npt.NDArray[np.float32]

# Largest relative error |read - stored| / |stored| of a matrix, by type: about two and a half
# times what trained weights show. Another expert's weights stand at about 1.4.
ERROR_BOUNDS = {
    "F32": 0.0, "F16": 0.001, "BF16": 0.004, "Q8_0": 0.02, "Q6_K": 0.05, "Q5_K": 0.1, "Q5_0": 0.12,
    "Q5_1": 0.12, "Q4_K": 0.2, "Q4_0": 0.22, "Q4_1": 0.22, "IQ4_XS": 0.2, "IQ4_NL": 0.2,
    "Q3_K": 0.4, "IQ3_S": 0.4, "IQ3_XXS": 0.5, "Q2_K": 0.7, "IQ2_S": 0.7, "IQ2_XS": 0.75,
    "IQ2_XXS": 0.8, "MXFP4": 0.3, "IQ1_M": 0.9, "IQ1_S": 0.9,
}  # fmt: skip

# Blocks of few bits hold no zeros: a sparse matrix beyond its type's bound is still sound if
# quantizing it anew errs nearly as much.
_SLACK = 1.2
_SPARSE = 0.5  # share of zeros


@dataclass(frozen=True)
class ExpectedGguf:
    """What a GGUF file must hold besides what the safetensors say."""

    kinds: Mapping[str, GGMLQuantizationType] | None = None  # None: any type within its bound
    n_experts: int | None = None


def open_gguf(path: Path) -> tuple[GgufHeader | None, list[str]]:
    """A readable header, or the violation."""
    try:
        return read_gguf_header(path), []
    except ArtifactError as error:
        return None, [str(error)]


def check_header(header: GgufHeader, expected: ExpectedGguf) -> Iterator[str]:
    """What a header says must agree with itself and with the plan, layer by layer."""
    where = header.path.name
    arch = header.metadata.get("general.architecture")
    count = header.metadata.get(f"{arch}.expert_count")
    used = header.metadata.get(f"{arch}.expert_used_count")
    if expected.n_experts is not None and count != expected.n_experts:
        yield f"{where}: {arch}.expert_count is {count}, expected {expected.n_experts}"
    if not isinstance(used, int) or not isinstance(count, int) or not 1 <= used <= count:
        yield f"{where}: {arch}.expert_used_count is {used}, expected 1 to {count}"
    for name, info in header.tensors.items():
        per_expert = "_exps." in name or name.endswith("ffn_gate_inp.weight")
        if per_expert and info.shape[0] != count:
            rows = "experts" if "_exps." in name else "router rows"
            yield f"{where}: {name} has {info.shape[0]} {rows}, {arch}.expert_count is {count}"
    if expected.kinds is not None:
        yield from check_kinds(header, expected.kinds)


def check_kinds(header: GgufHeader, kinds: Mapping[str, GGMLQuantizationType]) -> Iterator[str]:
    """A file's tensors must be those of the plan, each of its type."""
    where = header.path.name
    for name, kind in kinds.items():
        if name not in header.tensors:
            yield f"{where}: tensor {name} is missing"
        elif header.tensors[name].kind is not kind:
            yield f"{where}: {name} is {header.tensors[name].kind.name}, expected {kind.name}"
    for name in sorted(header.tensors.keys() - kinds.keys()):
        yield f"{where}: tensor {name} is not in the plan"


def check_against_folder(
    header: GgufHeader,
    checkpoint: Checkpoint,
    model: MoeModel,
    n_threads: int,
    progress: Progress,
) -> Iterator[str]:
    """Keys and tokenizer against the config, then every tensor against the safetensors."""
    where = header.path.name
    n_tokens = len(header.metadata.get("tokenizer.ggml.tokens") or [])
    if n_tokens != model.facts.vocab_size:
        yield f"{where}: {n_tokens} tokens, expected vocab_size {model.facts.vocab_size}"
    for value in model.gguf_metadata():
        found = header.metadata.get(value.key)
        same = found == value.value or (
            isinstance(value.value, float)
            and isinstance(found, float)
            and np.float32(found) == np.float32(value.value)
        )
        if not same:
            yield f"{where}: {value.key} is {found}, expected {value.value}"
    tensors = model.gguf_tensors(checkpoint.tensors)
    yield from check_tensors(header, checkpoint, tensors, n_threads, progress)


def check_tensors(
    header: GgufHeader,
    checkpoint: Checkpoint,
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
    yield from _compare_all(header, checkpoint, fitting, n_threads, progress)


def check_values(header: GgufHeader, n_threads: int, progress: Progress) -> Iterator[str]:
    """Where there are no safetensors to compare with: NaN, infinity, and all-zero matrices."""
    ggml = load_ggml()

    def check(info: GgufTensorInfo) -> str | None:
        raw = header.read(info.name)
        step = len(raw) // info.shape[0] if len(info.shape) == 3 else len(raw)
        for first in range(0, len(raw), step):
            values = ggml.dequantize(raw[first : first + step], info.kind)
            if problem := _degenerate(values):
                return f"{header.path.name}: {info.name}{_expert(info, first // step)} {problem}"
        return None

    yield from _each(list(header.tensors.values()), check, header, n_threads, progress)


def _compare_all(
    header: GgufHeader,
    checkpoint: Checkpoint,
    tensors: Sequence[GgufTensor],
    n_threads: int,
    progress: Progress,
) -> Iterator[str]:
    ggml = load_ggml()
    by_name = {tensor.name: tensor for tensor in tensors}

    def check(info: GgufTensorInfo) -> str | None:
        try:
            return _compare(header, ggml, checkpoint, by_name[info.name], info)
        except Reap2ggufError as error:
            return f"{header.path.name}: {info.name}: {error}"

    infos = [header.tensors[tensor.name] for tensor in tensors]
    yield from _each(infos, check, header, n_threads, progress)


def _compare(
    header: GgufHeader, ggml: Ggml, checkpoint: Checkpoint, tensor: GgufTensor, info: GgufTensorInfo
) -> str | None:
    """The first violation in a tensor: each matrix must be its slab, within the type's error."""
    raw = header.read(info.name)
    where = f"{header.path.name}: {info.name}"
    bound = ERROR_BOUNDS[info.kind.name]
    step = len(raw) // len(tensor.slabs)
    for index, slab in enumerate(tensor.slabs):
        values = ggml.dequantize(raw[index * step : (index + 1) * step], info.kind)
        which = _expert(info, index)
        stored = stored_matrix(checkpoint, tensor, slab)
        if (problem := _degenerate(values)) and not (not stored.any() and not values.any()):
            return f"{where}{which} {problem}"
        error = _relative_error(values, stored)
        if error > bound and not _errs_as_it_must(ggml, stored, info.kind, error):
            likely = _likely_slab(checkpoint, tensor, values, bound)
            hint = "" if likely is None else f"; it holds the weights of expert {likely}"
            return (
                f"{where}{which} differs from {slab.stored} by {error:.1%}, expected at most "
                f"{bound:.1%} for {info.kind.name}{hint}"
            )
    return None


def stored_matrix(checkpoint: Checkpoint, tensor: GgufTensor, slab: Slab) -> Floats:
    """The float32 values (R, C) that one matrix of a GGUF tensor stands for."""
    first, last = slab.rows or (0, None)
    values = checkpoint.read_float32(slab.stored, first, last, slab.index)
    if tensor.transform is not None:
        values = tensor.transform(values)
    return values.reshape(-1, tensor.n_columns)


def _errs_as_it_must(ggml: Ggml, stored: Floats, kind: GGMLQuantizationType, error: float) -> bool:
    """Whether a matrix is sparse, such as an identity, and its type does this to it."""
    if np.count_nonzero(stored) > _SPARSE * stored.size:
        return False
    even = np.ones(stored.shape[-1], dtype=np.float32)
    anew = ggml.dequantize(ggml.quantize(stored, kind, even), kind)
    return error <= _SLACK * _relative_error(anew, stored)


def _likely_slab(
    checkpoint: Checkpoint, tensor: GgufTensor, values: Floats, bound: float
) -> int | None:
    """Which expert's weights a matrix holds, when they are not those of its place."""
    if len(tensor.slabs) < 2:
        return None
    for index, slab in enumerate(tensor.slabs):
        if _relative_error(values, stored_matrix(checkpoint, tensor, slab)) <= bound:
            return index
    return None


def _relative_error(values: Floats, stored: Floats) -> float:
    scale = float(np.linalg.norm(stored))
    distance = float(np.linalg.norm(values - stored))
    return distance / scale if scale else distance


def _degenerate(values: Floats) -> str | None:
    if not np.isfinite(values).all():
        return "holds NaN or infinite values"
    if len(values) > 1 and not values.any():  # a vector may be zero, as biases often are
        return "holds nothing but zeros"
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
