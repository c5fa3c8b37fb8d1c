"""What `--calibration` says, read: REAP's composite syntax, with files and folders among it.

    name[subset](split):n, name:n, ...

`n` rows of each, the split `train` where none is named. The syntax is that of REAP's dataset_name
(https://github.com/CerebrasResearch/reap): a text that it takes, this takes, and as the same.
Beyond it, a name may be that of a file or folder here, `default` (the embedded mix), and
`owner/name@revision`, which pins a dataset on the Hub.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from reap2gguf.errors import CalibrationError
from reap2gguf.messages import shown

DEFAULT_MIX = "default"
DEFAULT_SPLIT = "train"
SAMPLE_SUFFIXES = (".jsonl", ".parquet", ".txt")
MOST_ROWS = 2**31 - 1  # of a component, and of all
_MOST_COMPONENTS = 256
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
    count: int | None = None  # rows at most; None: as many as the whole calibration may have
    subset: str | None = None
    split: str = DEFAULT_SPLIT

    @property
    def path(self) -> Path:
        return Path(os.path.expanduser(self.name))

    @property
    def is_local(self) -> bool:
        """Whether it is the embedded mix, or a file or folder that is here."""
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
        """The name as it may be published: of a path, only the last part."""
        if self.name != DEFAULT_MIX and self.is_local:
            return Path(os.path.abspath(self.path)).name
        return self.dataset


def exists(name: str) -> bool:
    """Whether there is such a file or folder; False too for names that none can have."""
    return os.path.exists(os.path.expanduser(name))


def parse(spec: str) -> tuple[Component, ...] | None:
    """The components of a composite; None for a text that is none, such as one plain name.

    Raises CalibrationError for several components of which one is not of the form.
    """
    if ":" not in spec:
        return None
    parts = [part.strip() for part in spec.split(",")]
    if len(parts) > _MOST_COMPONENTS:
        raise CalibrationError(
            f"calibration: {len(parts):,} components, expected at most {_MOST_COMPONENTS}"
        )
    found = []
    for number, part in enumerate(parts, start=1):
        match = _COUNTED.fullmatch(part)
        if match is None and len(parts) == 1:
            return None
        if match is None:
            raise CalibrationError(
                f"calibration component {number} of {len(parts)}: {shown(part)}, expected {_FORM}"
            )
        found.append(_component(match, number))
    return tuple(found)


def _component(match: re.Match[str], number: int) -> Component:
    name, subset, split, digits = match.groups()
    # int() refuses thousands of digits
    count = int(digits) if len(digits) <= 20 else MOST_ROWS + 1
    if not 1 <= count <= MOST_ROWS:
        raise CalibrationError(
            f"calibration component {number}: {shown(digits)} rows of {shown(name)}, expected "
            f"from 1 to {MOST_ROWS:,}"
        )
    return Component(name.strip(), count, subset, split or DEFAULT_SPLIT)


def parse_plain(spec: str) -> Component | None:
    """One dataset on the Hub, without a count; None if the text can be the name of none."""
    match = _UNCOUNTED.fullmatch(spec.strip())
    if match is None:
        return None
    name, subset, split = match.groups()
    found = Component(name.strip(), None, subset, split or DEFAULT_SPLIT)
    return found if "/" in found.name and is_hub_name(found.name) else None


def is_hub_name(name: str) -> bool:
    """Whether the Hub could have a dataset of this name, and a file of it is not more likely."""
    return _HUB_NAME.fullmatch(name) is not None and not name.endswith(SAMPLE_SUFFIXES)


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


def check(component: Component, number: int, total: int) -> None:
    """Refuse what is neither here nor can be on the Hub. Raises CalibrationError."""
    where = f"calibration component {number} of {total}"
    if not component.is_local and not is_hub_name(component.name):
        raise CalibrationError(
            f"{where}: {component.name}: no such file or folder, and no name of a dataset on the "
            "Hub (owner/name)"
        )
    if component.is_local and (component.subset or component.split != DEFAULT_SPLIT):
        raise CalibrationError(
            f"{where}: {component.name} is here and not on the Hub, and has no subsets or splits; "
            f"write {shown(f'{component.name}:{component.count}')}"
        )
