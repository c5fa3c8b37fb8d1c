"""Checks a GGUF file: layout, keys and types against plan and config, values against weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from gguf import GGMLQuantizationType

from reap2gguf.errors import ArtifactError, DependencyError, Reap2ggufError
from reap2gguf.files import is_plain
from reap2gguf.gguf_files.split import SplitHeader, read_whole_header
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
from reap2gguf.verifying.gguf_values import (
    FileValues,
    check_values,
    compare_files,
    compare_values,
    unreadable,
)
from reap2gguf.verifying.report import as_violation

if TYPE_CHECKING:
    from reap2gguf.bundle.manifest import GgufRecord
    from reap2gguf.checkpoint.weights import Weights
    from reap2gguf.gguf_files.reader import GgufHeader
    from reap2gguf.models.contract import MoeModel
    from reap2gguf.progress import Progress

__all__ = [
    "ExpectedGguf",
    "GgufCheck",
    "check_experts",
    "check_gguf",
    "check_gguf_header",
    "check_ggufs",
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


@dataclass
class GgufCheck:
    """A model's GGUF file, which is being checked.

    `header` is read from `path`, of all parts if it is the first of several, unless it is given.
    """

    path: Path
    expected: ExpectedGguf
    exactness: Exactness = field(default_factory=Exactness)
    header: GgufHeader | None = None
    is_exact: bool = field(default=False, init=False)  # all bytes are those that are made again
    differing: list[str] = field(default_factory=list, init=False)  # as in `Compared`
    _fitting: list[GgufTensor] | None = field(default=None, init=False)

    @property
    def files(self) -> list[Path]:
        """The file, or all of its parts."""
        parts = self.header.parts if isinstance(self.header, SplitHeader) else ()
        return [part.path for part in parts] or [self.path]

    @property
    def unreadable(self) -> str:
        """Why values of some types cannot be read here; "" if all can."""
        return "" if self.header is None else unreadable(self.header)

    def header_violations(self, opened: tuple[Weights, MoeModel] | None) -> Iterator[str]:
        """Violations of the header, against `expected` and the model that the file was made from.

        Values can be compared when all of them were drawn.
        """
        if self.header is None:
            self.header, problems = open_gguf(self.path)
            yield from problems
        if self.header is None:
            return
        found = list(check_header(self.header, self.expected))
        if opened is None:
            yield from found
            return
        weights, model = opened
        imatrix = self.exactness.imatrix
        found += check_model_keys(self.header, self.expected, weights, model, imatrix)
        yield from dict.fromkeys(found)
        described = model.gguf_tensors(weights.tensors)
        yield from check_shapes(self.header, described)
        self._fitting = fitting(self.header, described)

    @staticmethod
    def value_violations(
        checks: Sequence[GgufCheck],
        opened: tuple[Weights, MoeModel] | None,
        n_threads: int,
        progress: Progress,
        device: str = "auto",
    ) -> list[list[str]]:
        """Violations in the values of each file, in one pass over the weights.

        Without weights, values are only checked for NaN and infinity. `device` is that of
        `compare_files`.
        """
        found: list[list[str]] = [[] for _ in checks]
        if opened is None:
            for check, violations in zip(checks, found, strict=True):
                if check.header is not None:
                    violations += check_values(check.header, n_threads, progress)
            return found
        numbers, files = [], []
        for number, check in enumerate(checks):
            if check.header is not None and check._fitting is not None:
                numbers.append(number)
                files.append(FileValues(check.header, check._fitting, check.exactness))
        compared = compare_files(files, opened[0], n_threads, progress, device)
        for number, one in zip(numbers, compared, strict=True):
            found[number] = one.violations
            checks[number].is_exact, checks[number].differing = one.is_exact, one.differing
        return found


def check_ggufs(
    checks: Sequence[GgufCheck],
    opened: tuple[Weights, MoeModel] | None,
    n_threads: int,
    progress: Progress,
    device: str = "auto",
) -> list[str]:
    """Violations of GGUF files of one model: headers against what is expected, then every value.

    `opened` is the model that they were made from; its weights are read once for all files. If it
    is None, values are only checked for NaN and infinity. `device` is that of `compare_files`.
    """
    headers = [list(check.header_violations(opened)) for check in checks]
    values = GgufCheck.value_violations(checks, opened, n_threads, progress, device)
    pairs = zip(headers, values, strict=True)
    return [violation for header, value in pairs for violation in (*header, *value)]


def values_or_error(
    checks: Sequence[GgufCheck],
    opened: tuple[Weights, MoeModel] | None,
    n_threads: int,
    progress: Progress,
    device: str = "auto",
) -> list[list[str]]:
    """`GgufCheck.value_violations`; an error that ends the pass is a violation of each file.

    Raises DependencyError, which is no file's.
    """
    try:
        return GgufCheck.value_violations(checks, opened, n_threads, progress, device)
    except DependencyError:
        raise
    except (Reap2ggufError, OSError) as error:
        return [[as_violation(error, check.path.name)] for check in checks]


def check_gguf(
    path: Path,
    expected: ExpectedGguf,
    opened: tuple[Weights, MoeModel] | None,
    n_threads: int,
    progress: Progress,
    exactness: Exactness = WITHIN_BOUNDS,
) -> list[str]:
    """`check_ggufs` of one file."""
    return check_ggufs([GgufCheck(path, expected, exactness)], opened, n_threads, progress)


def check_side_file(
    path: Path,
    expected: ExpectedGguf,
    source: tuple[Weights, MoeModel, Sequence[SideFile]] | None,
    n_threads: int,
    progress: Progress,
    exactness: Exactness = WITHIN_BOUNDS,
    header: GgufHeader | None = None,
) -> Iterator[str]:
    """Violations of a GGUF file beside the models, such as a vision projector.

    `source` is the weights, the model and its side files, of which `path` must be one; None as in
    `check_gguf`. `header` is read from `path`, unless it is given.
    """
    if header is None:
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
    yield from check_shapes(header, side.tensors)
    tensors = fitting(header, side.tensors)
    yield from compare_values(header, weights, tensors, exactness, n_threads, progress).violations


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


def check_shapes(header: GgufHeader, described: Sequence[GgufTensor]) -> Iterator[str]:
    """Names and shapes of a file's tensors, and those that llama.cpp keeps in F32."""
    where = header.path.name
    tensors = {tensor.name: tensor for tensor in described}
    for name in sorted(tensors.keys() ^ header.tensors.keys()):
        problem = "is missing" if name in tensors else "is not one of the model's"
        yield f"{where}: tensor {name} {problem}"
    for tensor in described:
        info = header.tensors.get(tensor.name)
        if info is None:
            continue
        if info.shape != tensor.shape:
            yield (
                f"{where}: {tensor.name} has shape {list(info.shape)}, expected "
                f"{list(tensor.shape)}"
            )
        elif tensor.always_f32 and info.tensor_type is not GGMLQuantizationType.F32:
            found = info.tensor_type.name
            yield f"{where}: {tensor.name} is {found}, expected F32, which llama.cpp keeps it in"


def fitting(header: GgufHeader, described: Sequence[GgufTensor]) -> list[GgufTensor]:
    """The tensors that a file has in their shapes."""
    shapes = {name: info.shape for name, info in header.tensors.items()}
    return [tensor for tensor in described if shapes.get(tensor.name) == tensor.shape]
