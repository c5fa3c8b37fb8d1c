"""Reads the SPEC of `--calibration`: a file, a folder, datasets on the Hub, or a mix by name.

    name[subset](split):n, name:n, ...

are `n` rows of each component, from the split `train` where none is named. The syntax is that of
REAP's dataset_name (https://github.com/CerebrasResearch/reap); a text that REAP accepts means the
same here. In addition, a name may be a file or a folder, `default` (the embedded mix), or
`owner/name@revision`, which pins a dataset on the Hub. `mixes.toml` names the published composites.

Only the names of files are looked at, so that a plan can be made without a network.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reap2gguf.errors import CalibrationError
from reap2gguf.messages import shown
from reap2gguf.resources import shipped_folder

if TYPE_CHECKING:
    from reap2gguf.options import CalibrationOptions

MIXES_FILE = "mixes.toml"
DEFAULT_SAMPLES = 1024
DEFAULT_LENGTH = 2048
DEFAULT_MIX = "default"
DEFAULT_SPLIT = "train"
SAMPLE_SUFFIXES = (".json", ".jsonl", ".ndjson", ".parquet", ".txt")  # in any case of letters
MAX_ROWS = 2**31 - 1  # of a component, and in total
_MAX_COMPONENTS = 256
_FORM = "name[subset](split):n, such as owner/dataset[code](train):250"

_BARE = r"([^][():,]+)(?:\[([^]]+)\])?(?:\(([^)]+)\))?"
_COUNTED = re.compile(_BARE + r":(\d+)")
_UNCOUNTED = re.compile(_BARE)
_PART = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,95}"
_HUB_NAME = re.compile(rf"(?:{_PART}/)?{_PART}(?:@[^@\s]{{1,255}})?")


@dataclass(frozen=True)
class Component:
    """Rows of one dataset, file or folder."""

    name: str
    count: int | None = None  # maximum of rows; None: that of the whole calibration
    subset: str | None = None
    split: str = DEFAULT_SPLIT

    @property
    def path(self) -> Path:
        return Path(os.path.expanduser(self.name))

    @property
    def is_local(self) -> bool:
        """Whether it is the embedded mix, or a file or folder on this machine."""
        return self.name == DEFAULT_MIX or exists(self.name)

    @property
    def dataset(self) -> str:
        """The name on the Hub."""
        return self.name.partition("@")[0]

    @property
    def revision(self) -> str | None:
        """The revision that the name pins."""
        return self.name.partition("@")[2] or None

    @property
    def public(self) -> str:
        """The name as it may be published: the last part of a path."""
        if self.name != DEFAULT_MIX and self.is_local:
            return Path(os.path.abspath(self.path)).name
        return self.dataset


def exists(name: str) -> bool:
    """Whether there is such a file or folder; False for names that no file can have."""
    return "\0" not in name and os.path.exists(os.path.expanduser(name))


def parse(spec: str) -> tuple[Component, ...] | None:
    """The components of a composite; None for any other text, such as one plain name.

    Raises CalibrationError if one of several components does not have the form.
    """
    if ":" not in spec:
        return None
    parts = [part.strip() for part in spec.split(",")]
    if len(parts) > _MAX_COMPONENTS:
        raise CalibrationError(
            f"calibration: {len(parts):,} components, expected at most {_MAX_COMPONENTS}"
        )
    components = []
    for number, part in enumerate(parts, start=1):
        match = _COUNTED.fullmatch(part)
        if match is None and len(parts) == 1:
            return None
        if match is None:
            raise CalibrationError(
                f"calibration component {number} of {len(parts)}: {shown(part)}, expected {_FORM}"
            )
        components.append(_component(match, number))
    return tuple(components)


def _component(match: re.Match[str], number: int) -> Component:
    name, subset, split, digits = match.groups()
    # int() refuses thousands of digits
    count = int(digits) if len(digits) <= 20 else MAX_ROWS + 1
    if not 1 <= count <= MAX_ROWS:
        raise CalibrationError(
            f"calibration component {number}: {shown(digits)} rows of {shown(name)}, expected "
            f"from 1 to {MAX_ROWS:,}"
        )
    return Component(name.strip(), count, subset, split or DEFAULT_SPLIT)


def parse_plain(spec: str) -> Component | None:
    """One dataset on the Hub, without a count; None if the text cannot be the name of one."""
    match = _UNCOUNTED.fullmatch(spec.strip())
    if match is None:
        return None
    name, subset, split = match.groups()
    component = Component(name.strip(), None, subset, split or DEFAULT_SPLIT)
    return component if "/" in component.name and is_hub_name(component.name) else None


def is_hub_name(name: str) -> bool:
    """Whether this can be the name of a dataset on the Hub, and is not that of a missing file."""
    return _HUB_NAME.fullmatch(name) is not None and not name.lower().endswith(SAMPLE_SUFFIXES)


def write(components: Sequence[Component]) -> str:
    """Components in the syntax that `parse` reads.

    >>> write([Component("owner/name", 250, "code")])
    'owner/name[code]:250'
    """
    return ",".join(_written(component) for component in components)


def _written(component: Component) -> str:
    subset = f"[{component.subset}]" if component.subset is not None else ""
    split = f"({component.split})" if component.split != DEFAULT_SPLIT else ""
    count = f":{component.count}" if component.count is not None else ""
    return f"{component.name}{subset}{split}{count}"


def check_component(component: Component, number: int, total: int) -> None:
    """Raise CalibrationError for a name that no local file and no dataset can have."""
    where = f"calibration component {number} of {total}"
    if not component.is_local and not is_hub_name(component.name):
        raise CalibrationError(
            f"{where}: {component.name}: no such file or folder, and not the name of a dataset on "
            "the Hub (owner/name)"
        )
    if component.is_local and (component.subset or component.split != DEFAULT_SPLIT):
        raise CalibrationError(
            f"{where}: {component.name} is not on the Hub, so it has no subsets or splits; "
            f"write {shown(f'{component.name}:{component.count}')}"
        )


@dataclass(frozen=True)
class Mix:
    """A composite with a name, and the length of its rows."""

    title: str
    spec: str
    max_length: int  # maximum of tokens per row
    source: str  # where it was published
    pack: bool = False  # whether several samples are packed into each row


@dataclass(frozen=True)
class Calibration:
    """What will be read: components, the maximum of rows, and the maximum of tokens per row.

    The counts of a composite limit its rows; `samples` does so only where the user gave it.
    """

    label: str  # as it may be published
    components: tuple[Component, ...]
    samples: int
    max_length: int
    seed: int
    is_composite: bool
    pack: bool = False  # several samples per row, until it is full; else one sample per row

    @property
    def spec(self) -> str:
        """All components, with full paths."""
        return write(self.components)

    def rows_of(self, component: Component) -> int:
        """The maximum of rows of one component."""
        return self.samples if component.count is None else component.count


def decide(options: CalibrationOptions) -> Calibration:
    """What a SPEC means: a file or folder on this machine, else a mix, else datasets.

    Raises CalibrationError if it is none of these, or one of its components is not.
    """
    found = _decide(options)
    return replace(found, components=_pinned(found.components, options.revisions))


def _pinned(components: Sequence[Component], revisions: Mapping[str, str]) -> tuple[Component, ...]:
    """Components on the Hub at these commits, where their names have none; labels stay."""
    return tuple(
        replace(one, name=f"{one.name}@{revisions[one.name]}")
        if one.name in revisions and not one.is_local
        else one
        for one in components
    )


def _decide(options: CalibrationOptions) -> Calibration:
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
                f"{spec}: no such file; pass a .txt, .jsonl, .json or .parquet file, a folder of "
                f"them, the embedded mix {DEFAULT_MIX!r}, a mix ({', '.join(shipped_mixes())}), or "
                "datasets on the Hub as owner/name[subset](split):n,..."
            )
        return _one(plain, options)
    for number, component in enumerate(components, start=1):
        check_component(component, number, len(components))
    total = sum(component.count or 0 for component in components)
    return Calibration(
        label or write([_published(component) for component in components]),
        components,
        min(total, MAX_ROWS) if options.samples is None else options.samples,
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
    """The mixes that ship with the program, by name."""
    path = shipped_folder("calibration") / MIXES_FILE
    return parse_mixes(path.read_text(encoding="utf-8"), path)


def parse_mixes(text: str, where: Path) -> dict[str, Mix]:
    """The mixes of a TOML file: one table per mix, with the fields of `Mix`; `pack` is optional.

    Raises CalibrationError if the text is not TOML or a table has other keys or values.
    """
    try:
        tables = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise CalibrationError(f"{where}: not valid TOML ({error})") from error
    return {name: _mix(table, f"{where}: mix {shown(name)}") for name, table in tables.items()}


def _mix(table: Any, where: str) -> Mix:
    types: Mapping[str, type] = {
        "title": str,
        "spec": str,
        "max_length": int,
        "source": str,
        "pack": bool,
    }
    assert types.keys() == {entry.name for entry in fields(Mix)}
    if not isinstance(table, dict) or {"pack", *table} != types.keys():
        raise CalibrationError(f"{where}: expected a table of {', '.join(types)}")
    table = {"pack": False, **table}
    for key, expected in types.items():
        if type(table[key]) is not expected:
            raise CalibrationError(f"{where}: {key} is {shown(table[key])}, expected {expected}")
    mix = Mix(**table)
    if parse(mix.spec) is None or not 2 <= mix.max_length <= MAX_ROWS:
        raise CalibrationError(
            f"{where}: its spec is not a composite, or its max_length is out of range"
        )
    return mix
