"""Compares a GGUF header with the one that the export would write, by type and value.

The expected header is made by the export's own functions from the weights' folder, so that there is
one place that decides what a header says.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from gguf import GGMLQuantizationType, GGUFValueType, Keys

from reap2gguf import __version__
from reap2gguf.errors import ArtifactError, Reap2ggufError
from reap2gguf.exporting.header import lay_out
from reap2gguf.exporting.header_facts import (
    FileTypes,
    HeaderNames,
    model_facts,
    recipe_value,
    side_facts,
)
from reap2gguf.files import open_plain
from reap2gguf.gguf_files.reader import parse_gguf_header
from reap2gguf.gguf_files.split import SplitHeader
from reap2gguf.gguf_files.tensor_types import file_type_of_number, type_of_name
from reap2gguf.gguf_files.writer import HeaderWriter
from reap2gguf.messages import shown
from reap2gguf.quantizing.file_types import IK_MIXTURES, MIXTURES

if TYPE_CHECKING:
    from reap2gguf.bundle.manifest import GgufRecord, Manifest, SideRecord
    from reap2gguf.checkpoint.weights import Weights
    from reap2gguf.exporting.header_facts import HeaderFacts
    from reap2gguf.gguf_files.imatrix import Imatrix
    from reap2gguf.gguf_files.reader import GgufHeader, Kind
    from reap2gguf.models.contract import MoeModel
    from reap2gguf.models.description import GgufTensor, SideFile

_OWN = "reap2gguf."
_IMATRIX = "quantize.imatrix."
# keys whose value the weights do not tell, with their types
_STRING, _UINT32 = (GGUFValueType.STRING,), (GGUFValueType.UINT32,)
_FREE: Mapping[str, Kind] = {
    Keys.General.FILE_TYPE: _UINT32,
    "reap2gguf.version": _STRING,
    "reap2gguf.source": _STRING,
    "reap2gguf.method": _STRING,
    "reap2gguf.recipe": _STRING,
    "reap2gguf.source_expert_count": _UINT32,
    "reap2gguf.kept_experts": (GGUFValueType.ARRAY, GGUFValueType.INT32),
    # of a source that was pruned before
    "reap2gguf.original.source": _STRING,
    "reap2gguf.original.expert_count": _UINT32,
    "reap2gguf.original.kept_experts": (GGUFValueType.ARRAY, GGUFValueType.INT32),
    "quantize.imatrix.file": _STRING,
    "quantize.imatrix.dataset": _STRING,
    "quantize.imatrix.entries_count": _UINT32,
    "quantize.imatrix.chunks_count": _UINT32,
}

# keys of this prefix that are of the file; the others say where the model comes from
_GENERAL_OF_FILE = frozenset(
    (
        Keys.General.ARCHITECTURE,
        Keys.General.TYPE,
        Keys.General.FILE_TYPE,
        Keys.General.QUANTIZATION_VERSION,
        Keys.General.ALIGNMENT,
    )
)
_UNNAMED = HeaderNames("")


@dataclass(frozen=True)
class ExpectedGguf:
    """What a GGUF file must hold besides the weights; None: not known, and not checked."""

    tensor_types: Mapping[str, GGMLQuantizationType] | None = None
    n_experts: int | None = None
    file_type: int | None = None  # general.file_type
    names: HeaderNames | None = None
    recipe: str | None = None  # the name of its recipe
    version: str = __version__  # of the reap2gguf that wrote it

    @property
    def is_whole(self) -> bool:
        """Whether all that a model's header says can be made again."""
        return None not in (self.tensor_types, self.file_type, self.names, self.recipe)


def expected_gguf(manifest: Manifest, record: GgufRecord) -> ExpectedGguf:
    """What a GGUF file must hold by the manifest of its bundle."""
    types, n_kept = types_by_tensor(record.tensors), manifest.pruning.n_kept
    if record.adopted:
        return ExpectedGguf(types, n_kept)
    mixture = (MIXTURES | IK_MIXTURES).get(record.file_type)
    version = manifest.versions_of(record).get("reap2gguf", "")
    return ExpectedGguf(
        types,
        n_kept,
        None if mixture is None else mixture.file_type.value,
        HeaderNames.of(manifest, version),
        record.recipe,
        version,
    )


def expected_side(manifest: Manifest, record: SideRecord) -> ExpectedGguf:
    """What a side file must hold by the manifest of its bundle."""
    return ExpectedGguf(
        types_by_tensor(record.tensors),
        names=HeaderNames.of(manifest),
        version=manifest.program.get("reap2gguf", ""),
    )


def types_by_tensor(names: Mapping[str, str]) -> dict[str, GGMLQuantizationType]:
    """The types of tensors, which a manifest records by name."""
    return {tensor: type_of_name(name) for tensor, name in names.items()}


def check_known_keys(
    header: GgufHeader, expected: ExpectedGguf, arch: str, general_type: str = "model"
) -> Iterator[str]:
    """Violations in the keys that can be known without weights."""
    writer = HeaderWriter(arch)
    writer.add_type(general_type)
    names = expected.names
    if names is not None:
        writer.add_name(names.name)
    if expected.file_type is not None:
        writer.add_file_type(expected.file_type)
    recipe = () if expected.recipe is None else (recipe_value(expected.recipe),)
    for value in (*(() if names is None else names.own), *recipe):
        writer.add_key_value(value.key, value.value, value.value_type)
    raw = writer.header()
    wanted = parse_gguf_header(header.path, raw, len(raw))
    for key in wanted.metadata:
        yield from _compare_key(header, wanted, key)
    known = names is not None and expected.recipe is not None
    for key in header.metadata:
        if known and key.startswith(_OWN) and key not in wanted.metadata:
            yield _unexpected(header, key)


def check_model_keys(
    header: GgufHeader,
    expected: ExpectedGguf,
    weights: Weights,
    model: MoeModel,
    imatrix: Imatrix | None,
) -> Iterator[str]:
    """Violations in a model's keys, against those that the export would write.

    A file of another program may have other keys than ours outside the architecture's and the
    tokenizer's.
    """
    tensors = model.gguf_tensors(weights.tensors)
    file_type, in_file = file_type_of_number(expected.file_type or 0), _types_for(header, tensors)
    types = FileTypes(expected.recipe or "", file_type, in_file)
    facts = model_facts(weights, model, expected.names or _UNNAMED, types, imatrix)
    strict = expected.is_whole or any(key.startswith(_OWN) for key in header.metadata)
    if not expected.is_whole:
        version = header.metadata.get("reap2gguf.version")
        expected = replace(expected, version=version if isinstance(version, str) else "")
    yield from _check_keys(header, weights, tensors, facts, expected, strict, imatrix is not None)


def check_side_keys(
    header: GgufHeader, expected: ExpectedGguf, weights: Weights, model: MoeModel, side: SideFile
) -> Iterator[str]:
    """Violations in a side file's keys, against those that the export would write."""
    facts = side_facts(weights, model, expected.names or _UNNAMED, side)
    expected = replace(expected, file_type=facts.file_type.value, recipe="")
    strict = expected.names is not None
    yield from _check_keys(header, weights, side.tensors, facts, expected, strict, True)


def _check_keys(
    header: GgufHeader,
    weights: Weights,
    tensors: Sequence[GgufTensor],
    facts: HeaderFacts,
    expected: ExpectedGguf,
    strict: bool,
    knows_imatrix: bool,
) -> Iterator[str]:
    where = header.path.name
    try:
        layout = lay_out(weights.folder, tensors, facts)
    except Reap2ggufError as error:
        yield f"{weights.folder.name}: {error}"
        return
    wanted = parse_gguf_header(header.path, layout.header, layout.n_bytes)
    is_whole = expected.is_whole and knows_imatrix
    found = list(_compare_keys(header, wanted, _free(expected, knows_imatrix), strict, expected))
    names, order = list(header.tensors), list(wanted.tensors)
    if strict and names != order and sorted(names) == sorted(order):
        found.append(f"{where}: its tensors are not in the order of the model's")
    if not found and is_whole and expected.version == __version__:
        found += _compare_bytes(header, layout.header)
    yield from found


def _free(expected: ExpectedGguf, knows_imatrix: bool) -> set[str]:
    """Keys whose value is not known, those of where the model comes from apart."""
    free = set()
    if expected.file_type is None:
        free.add(Keys.General.FILE_TYPE)
    if expected.recipe is None or expected.names is None:
        free |= {key for key in _FREE if key.startswith(_OWN)}
    if not (expected.is_whole and knows_imatrix):
        free |= {key for key in _FREE if key.startswith(_IMATRIX)}
    return free


def _types_for(
    header: GgufHeader, tensors: Sequence[GgufTensor]
) -> dict[str, GGMLQuantizationType]:
    """The types that the tensors have in a file; F32 for those that do not fit."""
    found = {}
    for tensor in tensors:
        info = header.tensors.get(tensor.name)
        fits = info is not None and info.shape == tensor.shape
        found[tensor.name] = info.tensor_type if info and fits else GGMLQuantizationType.F32
    return found


def _compare_keys(
    header: GgufHeader, wanted: GgufHeader, free: set[str], strict: bool, expected: ExpectedGguf
) -> Iterator[str]:
    where = header.path.name
    arch = wanted.metadata[Keys.General.ARCHITECTURE]
    # what changes how a model computes; the rest describes it
    prefixes = (f"{arch}.", "tokenizer.", "clip.")
    exact = {Keys.General.ARCHITECTURE, Keys.General.TYPE}
    of_names = expected.names is None
    for key in wanted.metadata:
        if key in free:
            continue
        if of_names and _is_of_names(key):
            if header.kinds.get(key, wanted.kinds[key]) != wanted.kinds[key]:
                yield f"{where}: {_of_type(header, key)}, expected {_type_name(wanted.kinds[key])}"
        elif strict or key.startswith(prefixes) or key in exact:
            # another version may describe a model by other keys
            if key in header.metadata or key.startswith(prefixes) or _is_current(expected):
                yield from _compare_key(header, wanted, key)
        elif key in header.kinds and header.kinds[key] != wanted.kinds[key]:
            yield f"{where}: {_of_type(header, key)}, expected {_type_name(wanted.kinds[key])}"
    for key in header.metadata:
        if key in free:
            if header.kinds[key] != _FREE[key]:
                yield f"{where}: {_of_type(header, key)}, expected {_type_name(_FREE[key])}"
        elif of_names and _is_of_names(key):
            if key.endswith(".count") and header.kinds[key] != _UINT32:
                yield f"{where}: {_of_type(header, key)}, expected {_type_name(_UINT32)}"
        elif key not in wanted.metadata and (strict or key.startswith(prefixes)):
            yield _unexpected(header, key)


def _is_of_names(key: str) -> bool:
    """Whether a key says where a model comes from, which a header alone does not tell."""
    return key.startswith("general.") and key not in _GENERAL_OF_FILE


def _is_current(expected: ExpectedGguf) -> bool:
    return expected.version == __version__


def _compare_key(header: GgufHeader, wanted: GgufHeader, key: str) -> Iterator[str]:
    """One violation at most: a key that is missing, or has another type or value."""
    where, value = header.path.name, wanted.metadata[key]
    if key in header.metadata and header.kinds[key] != wanted.kinds[key]:
        yield f"{where}: {_of_type(header, key)}, expected {_type_name(wanted.kinds[key])}"
    elif key not in header.metadata or header.metadata[key] != value:
        if key.startswith("tokenizer."):
            yield f"{where}: {key} differs from the tokenizer files"
        else:
            found = shown(header.metadata.get(key)) if key in header.metadata else "missing"
            yield f"{where}: {key} is {found}, expected {shown(value)}"


def _of_type(header: GgufHeader, key: str) -> str:
    return f"{key} is of type {_type_name(header.kinds[key])}"


def _type_name(kind: Kind) -> str:
    return " of ".join(one.name for one in kind)


def _unexpected(header: GgufHeader, key: str) -> str:
    value = shown(header.metadata[key])
    return f"{header.path.name}: {shown(key)} is {value}, expected no such key"


def _compare_bytes(header: GgufHeader, wanted: bytes) -> Iterator[str]:
    """A violation if the keys are right and their bytes or their order are not."""
    if isinstance(header, SplitHeader):
        return  # its parts are cut from the file that was compared
    try:
        with open_plain(header.path) as file:
            found = file.read(len(wanted))
    except OSError as error:
        reason = error.strerror or error
        raise ArtifactError(f"{header.path}: cannot be read ({reason})") from error
    if found != wanted:
        at = next((i for i, (a, b) in enumerate(zip(found, wanted, strict=False)) if a != b), 0)
        yield f"{header.path.name}: its header differs at byte {at:,} from what the export writes"
