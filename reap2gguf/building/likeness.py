"""`--like reap2gguf.json`: the options of an earlier bundle, as its manifest records them.

To take over one more option, add a field of its name to `OptionsRecord`, and fill it in
`building/record.py`. If it names a file of the user, add it to `_FILES` here and to `Plan.inputs`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reap2gguf.bundle.layout import MANIFEST_FILE
from reap2gguf.bundle.manifest import Manifest
from reap2gguf.bundle.options_record import (
    CALIBRATION_OPTION,
    CHOOSE_TEXT_OPTION,
    IMATRIX_OPTION,
    IMATRIX_TEXT_OPTION,
    KEPT_OPTION,
    OBSERVATIONS_OPTION,
    OptionsRecord,
)
from reap2gguf.calibration.spec import (
    DEFAULT_MIX,
    Component,
    exists,
    is_hub_name,
    parse,
    parse_plain,
)
from reap2gguf.errors import ArtifactError, CalibrationError, UsageError
from reap2gguf.files import is_plain_name
from reap2gguf.messages import shown
from reap2gguf.options import BuildOptions, CalibrationOptions, ComputeOptions
from reap2gguf.quantizing.named import DEFAULT_RECIPES, RecipeText
from reap2gguf.resources import EXAMPLE_NAME

if TYPE_CHECKING:
    from reap2gguf.building.plan import Plan

# fields that name a file of the user -> the option to ask for it with
_FILES = {
    "kept": KEPT_OPTION,
    "observations": OBSERVATIONS_OPTION,
    "imatrix": IMATRIX_OPTION,
    "imatrix_text": IMATRIX_TEXT_OPTION,
    "choose_text": CHOOSE_TEXT_OPTION,
}
_COMPARED = ("device", "inputs")  # not taken over: compared with the new build's


@dataclass(frozen=True)
class Likeness:
    """An earlier bundle whose options a new build takes over."""

    path: Path  # of the manifest
    manifest: Manifest
    options: OptionsRecord

    def values(self) -> dict[str, Any]:
        """Options by name, and the model; what is not set, and files that are not here, are not
        among them."""
        found = {field.name: getattr(self.options, field.name) for field in fields(self.options)}
        found["model"] = self._model
        for name in _FILES:
            if found[name] is not None and not exists(found[name]):
                del found[name]
        return {k: v for k, v in found.items() if v is not None and k not in _COMPARED}

    @property
    def _model(self) -> str | None:
        """The source on the Hub, at its commit; None for a local folder."""
        source = self.manifest.source
        if "/" in source.label:
            return source.at_commit
        return None

    @property
    def recipes(self) -> tuple[str | RecipeText, ...]:
        """The recipe of every GGUF file, with its label; where it was sliced, none is named."""
        if self.manifest.source.gguf is not None and self.manifest.gguf[0].adopted:
            return DEFAULT_RECIPES
        return tuple(
            RecipeText(record.recipe, record.recipe_source, record.label)
            for record in self.manifest.gguf
            if not record.adopted
        )

    @property
    def revisions(self) -> dict[str, str]:
        """The commits of the datasets on the Hub that the calibration read."""
        components = self.manifest.calibration.components
        return {one.name: one.revision for one in components if one.revision is not None}

    def check(self, given: Mapping[str, Any], takes_calibration: bool) -> None:
        """Raise UsageError if a model or file of the earlier build is not here and not given.

        `given` are options by name; `takes_calibration` says whether the manifest's SPEC is used.
        """
        label = self.manifest.source.label
        if given.get("model") is None and self._model is None and label != EXAMPLE_NAME:
            raise UsageError(
                f"{self.path}: its source was the local folder {label!r}; pass that folder as MODEL"
            )
        missing = [*(self._missing_texts() if takes_calibration else ())]
        for name, option in _FILES.items():
            wanted = getattr(self.options, name)
            if wanted is not None and given.get(name) is None:
                missing.append((wanted, option))
        if missing:
            name = missing[0][0]
            options = dict.fromkeys(option for wanted, option in missing if wanted == name)
            raise UsageError(
                f"{self.path}: its build read the local file {name!r}, which is not in this "
                f"folder; pass it with {' and '.join(f'{option} FILE' for option in options)}"
            )

    def check_recipes(self) -> None:
        """Raise UsageError if no file of the earlier bundle has a recipe to take over."""
        if not self.recipes:
            raise UsageError(
                f"{self.path}: its GGUF files were made by other programs, so it records no "
                "recipes; pass one with --recipe, such as --recipe Q4_K_M"
            )

    def _missing_texts(self) -> Iterator[tuple[str, str]]:
        for one in self.manifest.calibration.components:
            is_local = one.revision is None and one.name != DEFAULT_MIX
            if is_local and not exists(one.name):
                yield one.name, CALIBRATION_OPTION

    def build_options(self, **changes: Any) -> BuildOptions:
        """The options of the same build; `changes` are fields of BuildOptions to set otherwise.

        Raises UsageError if an input is neither here nor among the changes.
        """
        values = self.values()
        if "recipes" not in changes:
            self.check_recipes()
        self.check({**values, **changes}, "calibration" not in changes)
        if not {"keep_experts", "compression"}.isdisjoint(changes):
            values = {k: v for k, v in values.items() if k not in ("keep_experts", "compression")}
        grouped = {
            "recipes": self.recipes,
            "calibration": CalibrationOptions(
                **_of(CalibrationOptions, values), revisions=self.revisions
            ),
            "compute": ComputeOptions(**_of(ComputeOptions, values)),
            **_of(BuildOptions, values),
        }
        return BuildOptions(**grouped | changes)

    def differences(self, plan: Plan) -> list[str]:
        """What will make a result other than the earlier one, one sentence each."""
        try:
            return [f"unlike {self.path}: {line}" for line in self._differences(plan)]
        finally:
            plan.checkpoint.close()  # a plan holds no open files; a later read opens them again

    def _differences(self, plan: Plan) -> Iterator[str]:
        source = self.manifest.source
        if plan.checkpoint.fingerprint() != source.fingerprint:
            yield f"{plan.source.label} is not the checkpoint that it was built from"
        elif plan.source.label != source.label:
            yield f"the source is called {plan.source.label} here, and {source.label} there"
        now = {(one.option, one.sha256): one.name for one in plan.inputs}
        for one in self.options.inputs:
            if (one.option, one.sha256) not in now:
                yield f"{one.option} reads no file with the SHA-256 of {one.name} ({one.sha256})"
        before = {(one.option, one.sha256) for one in self.options.inputs}
        for key in now.keys() - before:
            yield f"{key[0]} reads {now[key]}, which it did not (SHA-256 {key[1]})"
        compute = plan.options.compute
        if compute.likely_device != self.options.device:
            yield (
                f"computed on {self.options.device}, here on {compute.likely_device}: the last "
                "bits of sums may differ, and with them the result"
            )


def _of(kind: type, values: Mapping[str, Any]) -> dict[str, Any]:
    names = {field.name for field in fields(kind)}
    return {name: value for name, value in values.items() if name in names}


def read_likeness(path: Path) -> Likeness:
    """The options of an earlier bundle: its manifest, or a folder of it.

    Raises ArtifactError if it is not a manifest, one without options, or one that names a path of
    this machine: a manifest may be a stranger's.
    """
    path = Path(os.path.expanduser(path))
    if path.is_dir():
        path /= MANIFEST_FILE
    manifest = Manifest.read(path)
    if manifest.options is None:
        is_built = manifest.calibration.max_length is not None
        why = "an earlier version of reap2gguf wrote it" if is_built else "`bundle` made it"
        raise ArtifactError(
            f"{path}: records no options, as {why}; pass the options of its build instead of --like"
        )
    likeness = Likeness(path, manifest, manifest.options)
    _refuse_paths(likeness)
    return likeness


def _refuse_paths(likeness: Likeness) -> None:
    """Raise ArtifactError if a stranger's manifest would make a build read any file of this user.

    Manifests record the last parts of paths alone.
    """
    wrong = [
        (name, value)
        for name in _FILES
        if (value := getattr(likeness.options, name)) is not None and not _is_file_name(value)
    ]
    if not _is_safe_spec(likeness.options.spec):
        wrong.append(("spec", likeness.options.spec))
    if (model := likeness.values().get("model")) is not None and not _is_safe_name(model):
        wrong.append(("model", model))
    for name, value in wrong:
        raise ArtifactError(
            f"{likeness.path}: {name} is {shown(value)}, expected the plain name of a file or a "
            "name on the Hub, because a manifest may not choose paths of this machine; pass the "
            "options of its build instead of --like"
        )


def _is_safe_spec(spec: str) -> bool:
    """Whether neither a SPEC nor one of its components leads out of the current folder."""
    if not _is_file_name(spec) and exists(spec):
        return False
    try:
        components = parse(spec) or (parse_plain(spec) or Component(spec),)
    except CalibrationError:  # what is said of a malformed SPEC is said where it is used
        return _is_file_name(spec)
    return all(_is_safe_name(component.name) for component in components)


def _is_safe_name(name: str) -> bool:
    """Whether this is the plain name of a file, or a name on the Hub that is not a path here."""
    if "/" not in name:
        return _is_file_name(name)
    return is_hub_name(name) and ".." not in name.split("/") and not exists(name)


def _is_file_name(name: str) -> bool:
    return is_plain_name(name) and not name.startswith("~")
