"""The calibration mixes that have names: the embedded one, and published ones on the Hub."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass

from reap2gguf.calibration.sources import MANIFEST_NAME
from reap2gguf.calibration.spec import DEFAULT_LENGTH, DEFAULT_MIX, parse, shipped_mixes, write
from reap2gguf.errors import CalibrationError
from reap2gguf.messages import shown
from reap2gguf.resources import shipped_folder

_DEFAULT_TITLE = "texts of many kinds in the program itself: small, to try things out"


@dataclass(frozen=True)
class MixPart:
    """One dataset on the Hub, or one embedded file."""

    name: str
    what: str = ""
    n_rows: int | None = None  # of a dataset
    n_bytes: int | None = None  # of a file


@dataclass(frozen=True)
class KnownMix:
    """A mix as people choose one."""

    name: str
    title: str
    is_local: bool  # part of the program; else datasets on the Hub
    spec: str
    max_length: int  # tokens per row
    pack: bool  # whether rows are filled with several samples
    source: str
    parts: Sequence[MixPart]

    @property
    def n_rows(self) -> int | None:
        """Rows, where the mix says how many; the embedded texts give what the tokenizer makes."""
        counts = [part.n_rows for part in self.parts if part.n_rows is not None]
        return sum(counts) if counts else None

    @property
    def n_tokens(self) -> int | None:
        """Tokens of full rows; a dataset that is too small for its count has fewer."""
        return None if self.n_rows is None or not self.pack else self.n_rows * self.max_length

    @property
    def n_bytes(self) -> int | None:
        """Bytes of embedded text."""
        sizes = [part.n_bytes for part in self.parts if part.n_bytes is not None]
        return sum(sizes) if sizes else None


def known_mixes() -> list[KnownMix]:
    """All mixes, the embedded one first."""
    return [_embedded(), *(_published(name) for name in shipped_mixes())]


def known_mix(name: str) -> KnownMix:
    """A mix by its name, in any case. Raises CalibrationError with the nearest name."""
    known = {mix.name: mix for mix in known_mixes()}
    if name.lower() in known:
        return known[name.lower()]
    near = difflib.get_close_matches(name.lower()[:100], known, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise CalibrationError(f"no mix {shown(name)}{hint}; expected one of {', '.join(known)}")


def _embedded() -> KnownMix:
    text = (shipped_folder("calibration") / MANIFEST_NAME).read_text(encoding="utf-8")
    parts = [
        MixPart(entry["name"], entry["what"], n_bytes=entry["bytes"])
        for entry in tomllib.loads(text)["files"]
    ]
    return KnownMix(
        name=DEFAULT_MIX,
        title=_DEFAULT_TITLE,
        is_local=True,
        spec=DEFAULT_MIX,
        max_length=DEFAULT_LENGTH,
        pack=False,
        source="written for this program, CC0-1.0",
        parts=parts,
    )


def _published(name: str) -> KnownMix:
    mix = shipped_mixes()[name]
    components = parse(mix.spec) or ()
    return KnownMix(
        name=name,
        title=mix.title,
        is_local=False,
        spec=write(components),
        max_length=mix.max_length,
        pack=mix.pack,
        source=mix.source,
        parts=[
            MixPart(_title(one.name, one.subset, one.split), "", one.count) for one in components
        ],
    )


def _title(name: str, subset: str | None, split: str) -> str:
    title = name if subset is None else f"{name}[{subset}]"
    return title if split == "train" else f"{title}({split})"
