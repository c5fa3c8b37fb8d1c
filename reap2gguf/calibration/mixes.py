"""Which rows a calibration has: a file, a dataset, a composite or a mix by name, decided at once.

Nothing but the names of files is looked at, so that a plan can be made without a network.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from reap2gguf.calibration.spec import (
    DEFAULT_MIX,
    MOST_ROWS,
    Component,
    check,
    exists,
    parse,
    parse_plain,
    write,
)
from reap2gguf.errors import CalibrationError
from reap2gguf.messages import shown
from reap2gguf.options import CalibrationOptions
from reap2gguf.resources import shipped_folder

MIXES_FILE = "mixes.toml"
DEFAULT_SAMPLES = 1024
DEFAULT_LENGTH = 2048


@dataclass(frozen=True)
class Mix:
    """A composite with a name, and the length of its rows."""

    title: str
    spec: str
    max_length: int  # tokens a row, at most
    source: str  # where it was published
    pack: bool = False  # whether its samples are put one after another


@dataclass(frozen=True)
class Calibration:
    """What is to be read: components, rows at most in all, and tokens a row at most.

    A composite's counts bound its rows; `samples` does only where the user gave it.
    """

    label: str  # as it may be published
    components: tuple[Component, ...]
    samples: int
    max_length: int
    seed: int
    is_composite: bool
    pack: bool = False  # samples one after another until a row is full; else a row is one sample

    @property
    def spec(self) -> str:
        """All components, paths in full."""
        return write(self.components)

    def rows_of(self, component: Component) -> int:
        """Rows of one component, at most."""
        return self.samples if component.count is None else component.count


def decide(options: CalibrationOptions) -> Calibration:
    """What a calibration spec comes to: a file or folder that is here, else a mix, else datasets.

    Raises CalibrationError if it is none of these, or a component of it is not.
    """
    spec, length, pack = options.spec, DEFAULT_LENGTH, False
    if spec == DEFAULT_MIX or exists(spec):
        return _one(Component(spec), options)
    label = None
    if (mix := shipped_mixes().get(spec)) is not None:
        label, spec, length, pack = spec, mix.spec, mix.max_length, mix.pack
    components = parse(spec)
    if components is None:
        plain = parse_plain(spec)
        if plain is None:
            raise CalibrationError(
                f"{spec}: no such file; pass a .txt, .jsonl or .parquet file, a folder of them, "
                f"the embedded mix {DEFAULT_MIX!r}, a mix ({', '.join(shipped_mixes())}), or "
                "datasets on the Hub as owner/name[subset](split):n,..."
            )
        return _one(plain, options)
    for number, component in enumerate(components, start=1):
        check(component, number, len(components))
    total = sum(component.count or 0 for component in components)
    return Calibration(
        label or write([_published(component) for component in components]),
        components,
        min(total, MOST_ROWS) if options.samples is None else options.samples,
        length if options.max_length is None else options.max_length,
        options.seed,
        is_composite=True,
        pack=pack if options.pack is None else options.pack,
    )


def _one(component: Component, options: CalibrationOptions) -> Calibration:
    return Calibration(
        write([_published(component)]),
        (component,),
        DEFAULT_SAMPLES if options.samples is None else options.samples,
        DEFAULT_LENGTH if options.max_length is None else options.max_length,
        options.seed,
        is_composite=False,
        pack=bool(options.pack),
    )


def _published(component: Component) -> Component:
    name = component.public if component.is_local else component.name
    return Component(name, component.count, component.subset, component.split)


def shipped_mixes() -> dict[str, Mix]:
    """The mixes that travel with the program, by name."""
    path = shipped_folder("calibration") / MIXES_FILE
    return parse_mixes(path.read_text(encoding="utf-8"), path)


def parse_mixes(text: str, where: Path) -> dict[str, Mix]:
    """Mixes of a TOML file: a table each, of nothing but Mix's fields; `pack` may be left out.

    Raises CalibrationError.
    """
    try:
        tables = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise CalibrationError(f"{where}: not valid TOML ({error})") from error
    return {name: _mix(table, f"{where}: mix {shown(name)}") for name, table in tables.items()}


def _mix(table: Any, where: str) -> Mix:
    kinds: Mapping[str, type] = {
        "title": str, "spec": str, "max_length": int, "source": str, "pack": bool,
    }  # fmt: skip
    assert kinds.keys() == {entry.name for entry in fields(Mix)}
    if not isinstance(table, dict) or {"pack", *table} != kinds.keys():
        raise CalibrationError(f"{where}: expected a table of {', '.join(kinds)}")
    table = {"pack": False, **table}
    for key, kind in kinds.items():
        if type(table[key]) is not kind:
            raise CalibrationError(f"{where}: {key} is {shown(table[key])}, expected {kind}")
    mix = Mix(**table)
    if parse(mix.spec) is None or not 2 <= mix.max_length <= MOST_ROWS:
        raise CalibrationError(f"{where}: no composite, or no length that a row can have")
    return mix
