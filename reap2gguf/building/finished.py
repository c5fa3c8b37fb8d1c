"""What a finished bundle was made from, so that a later build knows what of it can stay."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from reap2gguf.building.seals import Stamp, changed


@dataclass(frozen=True)
class Inputs:
    """The keys of everything that went into a bundle.

    `base` stands for all but the recipes. Files with the same base belong together: they have the
    same experts, importance matrix and names in their headers.
    """

    base: str
    recipes: Mapping[str, str] = field(default_factory=dict)  # GGUF file -> key of its recipe


@dataclass(frozen=True)
class Finished:
    """The record that a build leaves of its final files."""

    inputs: Inputs
    stamps: Mapping[str, Stamp]  # by path below the output folder
    sums_sha256: str = ""  # of SHA256SUMS; "": the record is older than this field

    def changed(self, output: Path, names: Iterable[str]) -> list[str]:
        """Those of some files that are not as they were left, or are not in the record."""
        wanted = list(names)
        kept = {name: self.stamps[name] for name in wanted if name in self.stamps}
        return [name for name in wanted if name not in kept] + changed(output, kept)


def read_finished(values: Mapping[str, Any]) -> Finished:
    """The record from JSON. Raises TypeError or ValueError if it is malformed."""
    sizes, times = dict(values.get("files", {})), dict(values.get("changed_ns", {}))
    recipes = {str(name): str(key) for name, key in dict(values.get("recipes", {})).items()}
    base = values.get("base")
    if not isinstance(base, str):
        raise TypeError(f"base is {base!r}, expected a key")
    stamps = {
        str(name): (int(n_bytes), int(times.get(name, -1))) for name, n_bytes in sizes.items()
    }
    return Finished(Inputs(base, recipes), stamps, str(values.get("sums_sha256", "")))
