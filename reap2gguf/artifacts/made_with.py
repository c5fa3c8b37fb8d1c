"""Which versions of which libraries made a file, kept beside it.

Results are reused whatever versions made them: what decides whether they are still right is a
format number (`building/keys.py`). So the versions are recorded and reported.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from functools import cache
from importlib import metadata
from importlib.metadata import PackageNotFoundError

from reap2gguf import __version__
from reap2gguf.messages import shown

OWN = "reap2gguf"
TOKENIZING = ("transformers", "tokenizers", "jinja2")
COMPUTING = ("torch", "transformers", "flash-linear-attention")
MADE_WITH = "made_with"  # key in the metadata of a file
_MOST_ENTRIES = 32
_MOST_LETTERS = 128

version = cache(metadata.version)  # a build asks many times, and each time reads a file


def versions(libraries: Iterable[str]) -> dict[str, str]:
    """The versions of libraries that are installed, and of this program."""
    found = {OWN: __version__}
    for library in libraries:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            continue  # flash-linear-attention may be missing: transformers has its own code
    return found


def computing(made_with: Mapping[str, str]) -> dict[str, str]:
    """The versions of libraries without that of this program.

    A sweep resumes after an upgrade of this program: a format number says whether it may.
    """
    return {name: number for name, number in made_with.items() if name != OWN}


def encode(made_with: Mapping[str, str]) -> str:
    """Versions as one text, for the metadata of a file."""
    return json.dumps(made_with, sort_keys=True)


def decode(text: str) -> dict[str, str]:
    """The reverse of `encode`. Raises ValueError if the text does not hold versions."""
    try:
        return check_versions(json.loads(text))
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def check_versions(values: object) -> dict[str, str]:
    """Versions by library, from JSON. Raises ValueError if they are something else."""
    if not isinstance(values, dict) or len(values) > _MOST_ENTRIES:
        raise ValueError(f"{shown(values)} is not versions of libraries")
    for name, number in values.items():
        if not isinstance(number, str) or max(len(name), len(number)) > _MOST_LETTERS:
            raise ValueError(f"{shown(name)}: {shown(number)} is not the version of a library")
    return values


def other_versions(made_with: Mapping[str, str], now: Mapping[str, str]) -> str:
    """What differs, such as `made with torch 2.13, now 2.14`; empty if nothing does.

    Only libraries of `now` count, and those that are no longer there.
    """
    if not made_with:
        return ""  # not recorded
    names = [name for name in {**now, **made_with} if made_with.get(name) != now.get(name)]
    if len(names) == 1 and names[0] in made_with and names[0] in now:
        (name,) = names
        return f"made with {name} {made_with[name]}, now {now[name]}"
    if not names:
        return ""
    return f"made with {_listed(names, made_with)}, now {_listed(names, now)}"


def _listed(names: Iterable[str], numbers: Mapping[str, str]) -> str:
    found = [f"{name} {numbers[name]}" if name in numbers else f"no {name}" for name in names]
    *first, last = found
    return f"{', '.join(first)} and {last}" if first else last
