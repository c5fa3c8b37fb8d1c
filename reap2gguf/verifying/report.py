"""The result of a verification: what is wrong, how strictly each file was compared, what was not.

A file that is as it was made may still have been made wrongly. So a report says of each file what
it was compared with, and does not call a hash a comparison of values.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path

from reap2gguf.bundle.layout import CALIBRATION_FILE, IMATRIX_FILE, OBSERVATIONS_FILE, PICTURES
from reap2gguf.errors import DependencyError, Reap2ggufError

# Inputs of the build: there is nothing to compare them with but the hash that was recorded. The
# bytes of pictures depend on the version of matplotlib.
_INPUTS = (CALIBRATION_FILE, IMATRIX_FILE, OBSERVATIONS_FILE, *PICTURES)


class Level(IntEnum):
    """How strictly a file was compared; a higher level includes the lower ones."""

    NOTHING = 0  # read, but there was nothing to compare it with
    HASHES = 1  # with the hash that the build recorded
    VALUES = 2  # every value with the weights that it was made from, within its type's error
    EXACT = 3  # every byte with the source, or with what the program makes again

    def __str__(self) -> str:
        return self.name.lower()


@dataclass(frozen=True)
class VerifyReport:
    """The result of a verification.

    `levels` maps FOLDER/FILE to how strictly the file was compared; the records themselves, such as
    SHA256SUMS, are not in it. `not_checked` says what could not be checked, and why.
    """

    checked: tuple[str, ...]  # names of folders and files
    violations: tuple[str, ...]
    levels: Mapping[str, Level] = field(default_factory=dict)
    not_checked: tuple[str, ...] = ()

    def below(self, required: Level) -> tuple[str, ...]:
        """Files that were compared less strictly than `required`.

        The importance matrix and the calibration text are inputs of the build, so a hash is enough
        for them.
        """
        found = []
        for file, level in self.levels.items():
            is_input = file.rpartition("/")[2] in _INPUTS
            if level < (min(required, Level.HASHES) if is_input else required):
                found.append(file)
        return tuple(found)


@dataclass
class Findings:
    """What a running verification has found so far."""

    checked: list[str] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)
    levels: dict[str, Level] = field(default_factory=dict)
    not_checked: list[str] = field(default_factory=list)

    def reach(self, level: Level, files: Iterable[Path]) -> None:
        """Note that files were compared at a level, if they were not so at a higher one."""
        for file in files:
            # a file of the working folder has no parent's name
            key = f"{file.parent.name}/{file.name}".removeprefix("/")
            self.levels[key] = max(level, self.levels.get(key, Level.NOTHING))

    def take(self, violations: Iterator[str], where: str) -> None:
        """Keep violations; an error that ends a check early becomes the last one, of `where`."""
        self.violations += ended_by_errors(violations, where)

    def add(self, other: VerifyReport) -> None:
        """Take over another verification's findings."""
        self.checked += other.checked
        self.violations += other.violations
        self.not_checked += other.not_checked
        for key, level in other.levels.items():
            self.levels[key] = max(level, self.levels.get(key, Level.NOTHING))

    def report(self) -> VerifyReport:
        """All of it; what was found twice is there once."""
        return VerifyReport(
            tuple(dict.fromkeys(self.checked)),
            tuple(dict.fromkeys(self.violations)),
            dict(sorted(self.levels.items())),
            tuple(dict.fromkeys(self.not_checked)),
        )


def ended_by_errors(violations: Iterator[str], where: str) -> Iterator[str]:
    """Violations; an error that ends a check early becomes the last one."""
    try:
        yield from violations
    except DependencyError:
        raise
    except (Reap2ggufError, OSError) as error:
        yield as_violation(error, where)


def as_violation(error: Reap2ggufError | OSError, where: str) -> str:
    """An error that ends a check, as a violation."""
    if isinstance(error, OSError):
        return f"{where}: cannot be read ({error.strerror or error})"
    return f"{where}: {error}"


def passed_folder(n_tensors: int, n_changed: int = 0, what: str = "repair") -> str:
    """What a build has verified of the safetensors, as its manifest records it."""
    if n_changed:
        return (
            f"safetensors: {n_tensors - n_changed} tensors equal the source's, and {n_changed} "
            f"what the {what} gave, byte for byte"
        )
    return f"safetensors: {n_tensors} tensors equal the source's, byte for byte"


def passed_file(name: str, n_tensors: int, level: Level) -> str:
    """What a build has verified of a GGUF file, as its manifest records it."""
    how = "byte for byte" if level is Level.EXACT else "values within bounds"
    return f"{name}: {n_tensors} tensors by name, shape and type, {how}"


def passed_summary(passed: Sequence[str]) -> str:
    """All that a build has verified in a few words, for the card."""
    return f"{len(passed)} {'check' if len(passed) == 1 else 'checks'} passed"
