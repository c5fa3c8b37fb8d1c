"""`reap2gguf.json`: what a bundle was built from, and what its files must hold."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from reap2gguf.atomic import write_whole
from reap2gguf.bundle.bounds import (
    at_most,
    check_bounds,
    check_sizes,
    expert_groups,
    expert_shares,
    kept_layers,
    layer_number,
    layer_tokens,
)
from reap2gguf.bundle.budget import BudgetRecord, budget_of_json
from reap2gguf.bundle.choice import ChoiceRecord, choice_of
from reap2gguf.bundle.evaluation import Evaluation, evaluation_of
from reap2gguf.bundle.layout import MANIFEST_FILE, PICTURES
from reap2gguf.bundle.options_record import InputRecord, OptionsRecord
from reap2gguf.bundle.records import (
    CalibrationRecord,
    ComponentRecord,
    CoverageRecord,
    EarlierPruning,
    FileRecord,
    FolderRecord,
    GgufOrigin,
    GgufRecord,
    ImportanceRecord,
    MergedLayerRecord,
    MergeRecord,
    MtpRecord,
    PruningRecord,
    RepairedLayerRecord,
    RepairRecord,
    SideRecord,
    SourceRecord,
)
from reap2gguf.checkpoint.config import read_json
from reap2gguf.errors import ArtifactError, Reap2ggufError
from reap2gguf.files import Advance, file_sha256, is_plain_name, plain_size
from reap2gguf.gguf_files.tensor_types import is_type_name
from reap2gguf.messages import shown
from reap2gguf.models.description import MAX_LAYERS
from reap2gguf.pruning.methods import NO_METHOD

__all__ = [
    "FORMAT",
    "NO_METHOD",
    "CalibrationRecord",
    "ComponentRecord",
    "CoverageRecord",
    "EarlierPruning",
    "FileRecord",
    "FolderRecord",
    "GgufOrigin",
    "GgufRecord",
    "ImportanceRecord",
    "Manifest",
    "MtpRecord",
    "PruningRecord",
    "SideRecord",
    "SourceRecord",
    "component_records",
    "hash_file",
]
FORMAT = 1
_MAX_BYTES = 2**24  # a hundred layers of 512 experts in ten files take some 2 MiB
_MAX_NUMBER = 2**63
_MAY_BE_NEGATIVE = ("seed",)
_MOST_METHODS = 64
_MOST_VERSIONS = 16  # of the programs that made a file
_LONGEST_VERSION = 200  # characters
_JSON_TYPES = {
    "int": (int,),
    "float": (float, int),
    "str": (str,),
    "bool": (bool,),
    "str | None": (str, type(None)),
    "int | None": (int, type(None)),
    "bool | None": (bool, type(None)),
    "float | None": (float, int, type(None)),
}  # annotation of a field -> types that its JSON value may have
_Record = TypeVar("_Record")


@dataclass(frozen=True)
class Manifest:
    """The whole record of one build.

    It does not hold times or memory: the same inputs make the same bundle, byte for byte.
    """

    name: str
    program: Mapping[str, str]  # versions
    source: SourceRecord
    pruning: PruningRecord
    calibration: CalibrationRecord
    hf: FolderRecord | None  # None: nothing was pruned, or the source is a GGUF file
    gguf: Sequence[GgufRecord]
    side_files: Sequence[SideRecord] = field(default_factory=tuple)
    verification: Mapping[str, Any] = field(default_factory=dict)
    caveats: Sequence[str] = ()  # what a user should know, one sentence each
    made_with: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    # of a stage whose result may be older than the rest: the versions that computed it
    written_by: str = ""  # the reap2gguf that wrote the cards, if not `program`'s
    options: OptionsRecord | None = None  # None: written before options were recorded
    evaluation: Evaluation | None = None  # None: quality was not measured
    has_observations: bool = False  # whether the GGUF folder has those of `pruning`
    choice: ChoiceRecord | None = None  # None: the method was named, or nothing was pruned
    budget: BudgetRecord | None = None  # None: the number of experts was named
    pictures: Sequence[str] = ()  # in the GGUF folder, some of them also beside the safetensors

    @property
    def card_version(self) -> str:
        """The version of reap2gguf that wrote the cards and the Modelfile."""
        return self.written_by or self.program.get("reap2gguf", "")

    def versions_of(self, record: GgufRecord) -> Mapping[str, str]:
        """The versions that wrote a GGUF file."""
        return {**self.program, **record.made_by}

    @property
    def n_parameters(self) -> int:
        """Parameters of the model in the bundle; with all experts, those of the source."""
        if self.source.gguf is not None:
            return self.source.gguf.n_parameters
        return self.source.n_parameters if self.hf is None else self.hf.n_parameters

    @property
    def main_gguf(self) -> GgufRecord:
        """The file that instructions name: the first that llama.cpp loads, if there is one."""
        return next((one for one in self.gguf if not one.is_ik), self.gguf[0])

    @property
    def has_imatrix(self) -> bool:
        """Whether the bundle has an importance matrix."""
        return self.calibration.imatrix_chunks is not None

    @property
    def has_text(self) -> bool:
        """Whether the text of the importance matrix is in the bundle."""
        return self.calibration.imatrix_sha256 is not None

    def text(self) -> str:
        """What `reap2gguf.json` holds."""
        text = json.dumps({"format": FORMAT, **asdict(self)}, indent=1, ensure_ascii=False)
        # lists of expert ids are easier to read on one line
        return re.sub(r"\[\n[ \n\d,]+\]", lambda ids: " ".join(ids[0].split()), text) + "\n"

    def save(self, folder: Path) -> None:
        """Write `reap2gguf.json`, whole or not at all."""
        write_whole(folder / MANIFEST_FILE, self.text())

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """Read the manifest of a bundle. Raises ArtifactError if it is missing or malformed."""
        return cls.read(folder / MANIFEST_FILE)

    @classmethod
    def read(cls, path: Path) -> Manifest:
        """Read a manifest by its own path. Raises ArtifactError as `load` does."""
        try:
            values = read_json(path, _MAX_BYTES)
        except Reap2ggufError as error:
            raise ArtifactError(str(error)) from error
        if values.pop("format", None) != FORMAT:
            raise ArtifactError(f"{path}: not a manifest of format {FORMAT}")
        try:
            check_sizes(values)
            manifest = _decode(values)
            check_bounds(manifest)
            _check_names(manifest)
        except (KeyError, TypeError, ValueError, ArithmeticError, AttributeError) as error:
            raise ArtifactError(f"{path}: not a complete manifest ({shown(error)})") from error
        return manifest


def _check_names(manifest: Manifest) -> None:
    """Raises ValueError for a file name that is a path, or an unknown tensor type."""
    names = [] if manifest.hf is None else [manifest.hf.folder, *manifest.hf.files]
    records: list[GgufRecord | SideRecord] = [*manifest.gguf, *manifest.side_files]
    for record in records:
        names += [record.file, *getattr(record, "parts", ())]
        for tensor_type in record.tensors.values():
            if not is_type_name(tensor_type):
                raise ValueError(f"unknown tensor type {shown(tensor_type)}")
    for name in names:
        if not isinstance(name, str) or not is_plain_name(name):
            raise ValueError(f"{shown(name)} is not a plain file name")


def _decode(values: dict[str, Any]) -> Manifest:
    pruning = dict(values["pruning"])
    pruning["kept"] = kept_layers(pruning["kept"])
    for name in ("protected", "super_experts"):
        pruning[name] = kept_layers(pruning.get(name, {}), name)
    pruning["mtp"] = _record(MtpRecord, pruning["mtp"])
    if pruning.get("coverage") is not None:
        pruning["coverage"] = _record(CoverageRecord, pruning["coverage"])
    for name, decode in (("repair", repair_record), ("merge", merge_record)):
        if pruning.get(name) is not None:
            pruning[name] = decode(pruning[name])
    source = dict(values["source"])
    if source.get("earlier") is not None:
        source["earlier"] = earlier_pruning(source["earlier"])
    if source.get("gguf") is not None:
        source["gguf"] = _record(GgufOrigin, source["gguf"])
    calibration = dict(values["calibration"])
    calibration["components"] = component_records(calibration["components"])
    if (covered := calibration.get("imatrix_coverage")) is not None:
        covered = {**covered, "tokens": layer_tokens(covered["tokens"])}
        calibration["imatrix_coverage"] = _record(ImportanceRecord, covered)
    if not isinstance(values["name"], str):
        raise TypeError("name is not a string")
    return Manifest(
        name=values["name"],
        program=dict(values["program"]),
        source=_record(SourceRecord, source),
        pruning=_record(PruningRecord, pruning),
        calibration=_record(CalibrationRecord, calibration),
        hf=None if values["hf"] is None else _folder_record(values["hf"]),
        gguf=tuple(map(_gguf_record, values["gguf"])),
        side_files=tuple(_record(SideRecord, record) for record in values["side_files"]),
        verification=dict(values["verification"]),
        caveats=tuple(map(str, values.get("caveats", ()))),
        options=_options_record(values.get("options")),
        evaluation=_evaluation(values.get("evaluation")),
        has_observations=_flag("has_observations", values.get("has_observations", False)),
        choice=_choice(values.get("choice")),
        budget=_budget(values.get("budget")),
        pictures=_pictures(values.get("pictures", [])),
        made_with=_made_with(values.get("made_with", {})),
        written_by=_version(values.get("written_by", "")),
    )


def repair_record(values: Mapping[str, Any]) -> RepairRecord:
    """The record of a repair from JSON. Raises KeyError, TypeError or ValueError."""
    layers = _changed_layers("repair", values["layers"])
    found = {layer: _record(RepairedLayerRecord, one) for layer, one in layers.items()}
    return _record(RepairRecord, {**values, "layers": found})


def merge_record(values: Mapping[str, Any]) -> MergeRecord:
    """The record of a merge from JSON. Raises KeyError, TypeError or ValueError."""
    found = {}
    for layer, one in _changed_layers("merge", values["layers"]).items():
        groups, shares = expert_groups(one["groups"]), expert_shares(one["shares"])
        found[layer] = _record(MergedLayerRecord, {**one, "groups": groups, "shares": shares})
    return _record(MergeRecord, {**values, "layers": found})


def _changed_layers(what: str, layers: Any) -> dict[int, dict[str, Any]]:
    if not isinstance(layers, dict):
        raise TypeError(f"layers of {what} is {shown(layers)}, expected records by layer")
    at_most(f"layers of {what}", layers, MAX_LAYERS)
    return {layer_number(key): one for key, one in layers.items()}


def _options_record(values: Any) -> OptionsRecord | None:
    if values is None:
        return None
    if not isinstance(values, dict) or not isinstance(values["inputs"], list):
        raise TypeError(f"options is {shown(values)}, expected a record with a list of inputs")
    inputs = tuple(_record(InputRecord, value) for value in values["inputs"])
    return _record(OptionsRecord, {**values, "inputs": inputs})


def _evaluation(values: Any) -> Evaluation | None:
    if values is None:
        return None
    if not isinstance(values, dict):
        raise TypeError(f"evaluation is {shown(values)}, expected a record")
    _made_with({"evaluation": values["made_with"]})
    return evaluation_of(values)


def _choice(values: Any) -> ChoiceRecord | None:
    if values is None:
        return None
    if not isinstance(values, dict):
        raise TypeError(f"choice is {shown(values)}, expected a record")
    return choice_of(values)


def _budget(values: Any) -> BudgetRecord | None:
    if values is None:
        return None
    if not isinstance(values, dict):
        raise TypeError(f"budget is {shown(values)}, expected a record")
    return budget_of_json(values)


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name} is {shown(value)}, expected true or false")
    return value


def _pictures(values: Any) -> tuple[str, ...]:
    if not isinstance(values, list) or not all(name in PICTURES for name in values):
        raise ValueError(f"pictures is {shown(values)}, expected some of {', '.join(PICTURES)}")
    if len(set(values)) < len(values):
        raise ValueError("pictures names a picture twice")
    return tuple(values)


def _made_with(values: Any) -> dict[str, Mapping[str, str]]:
    if not isinstance(values, dict):
        raise TypeError(f"made_with is {shown(values)}, expected versions by stage")
    at_most("made_with", values, _MOST_VERSIONS)
    for versions in values.values():
        if not isinstance(versions, dict):
            raise TypeError(f"made_with holds {shown(versions)}, expected versions by library")
        at_most("made_with", versions, _MOST_VERSIONS)
        for version in versions.values():
            _version(version)
    return values


def earlier_pruning(values: Mapping[str, Any]) -> EarlierPruning:
    """The record of an original from JSON. Raises KeyError, TypeError or ValueError."""
    methods = values["methods"]
    if not isinstance(methods, list) or not all(isinstance(name, str) for name in methods):
        raise TypeError(f"methods is {shown(methods)}, expected a list of names")
    at_most("methods", methods, _MOST_METHODS)
    kept = kept_layers(values["kept"], "kept of the original")
    return _record(EarlierPruning, {**values, "methods": tuple(methods), "kept": kept})


def _folder_record(values: Mapping[str, Any]) -> FolderRecord:
    files = {name: _record(FileRecord, file) for name, file in values["files"].items()}
    return _record(FolderRecord, {**values, "files": files})


def _gguf_record(values: Mapping[str, Any]) -> GgufRecord:
    parts = values.get("parts", [])
    if not isinstance(parts, list):
        raise TypeError(f"parts is {shown(parts)}, expected a list")
    made_by = values.get("made_by", {})
    if not isinstance(made_by, dict) or len(made_by) > _MOST_VERSIONS:
        raise TypeError(f"made_by is {shown(made_by)}, expected a few versions")
    made_by = {str(name): _version(version) for name, version in made_by.items()}
    return _record(GgufRecord, {**values, "parts": tuple(parts), "made_by": made_by})


def _version(value: Any) -> str:
    if not isinstance(value, str) or len(value) > _LONGEST_VERSION:
        raise TypeError(f"{shown(value)} is not a version")
    return value


def component_records(values: Any) -> tuple[ComponentRecord, ...]:
    """Component records from JSON. Raises TypeError or ValueError if they are malformed."""
    if not isinstance(values, list):
        raise TypeError(f"components is {shown(values)}, expected a list")
    return tuple(_record(ComponentRecord, value) for value in values)


def _record(record_class: type[_Record], values: Mapping[str, Any]) -> _Record:
    """A record from JSON. Raises TypeError for a value of the wrong type, ValueError above 2^63."""
    record = record_class(**values)
    for entry in fields(record):  # type: ignore[arg-type]
        value = getattr(record, entry.name)
        allowed = _JSON_TYPES.get(str(entry.type), (type(value),))  # others are not checked here
        if type(value) not in allowed:
            raise TypeError(f"{entry.name} is {shown(value)}, expected {entry.type}")
        if isinstance(value, int | float) and not abs(value) < _MAX_NUMBER:
            raise ValueError(f"{entry.name} is {shown(value)}, expected a smaller number")
        if isinstance(value, int) and value < 0 and entry.name not in _MAY_BE_NEGATIVE:
            raise ValueError(f"{entry.name} is {shown(value)}, expected 0 or more")
    return record


def hash_file(path: Path, advance: Advance | None = None) -> FileRecord:
    """Size and SHA-256 of a file; `advance` is called with the bytes of each piece read.

    Raises OSError if it cannot be read, is not a plain file, or is a link outside the Hub's cache.
    """
    sha256 = file_sha256(path, advance, follow_links=False)
    return FileRecord(plain_size(path), sha256)
