"""The report of a verification as text, and as JSON."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from reap2gguf.verifying.report import VerifyReport

_LEVELS = {
    "exact": "exact, every byte made or read again",
    "values": "values, each within its type's error",
    "hashes": "hashes only",
    "nothing": "read, but compared with nothing",
}
_MOST_FILES = 12  # that a line names


def report_lines(report: VerifyReport) -> Iterable[str]:
    """How strictly files were compared, a line per level, and what could not be checked."""
    by_level: dict[str, list[str]] = {}
    for file, level in sorted(report.levels.items(), key=lambda one: -one[1]):
        by_level.setdefault(str(level), []).append(file)
    for name, files in by_level.items():
        yield f"  {_LEVELS[name]}: {_some(files)}"
    for what in report.not_checked:
        yield f"  {what}"


def _some(files: Sequence[str]) -> str:
    """File names, the first ones of many."""
    more = f" and {len(files) - _MOST_FILES} more" if len(files) > _MOST_FILES else ""
    return ", ".join(files[:_MOST_FILES]) + more


def report_as_json(report: VerifyReport, missing: Sequence[str]) -> dict[str, Any]:
    """A report for programs; `missing` is what --require asked for and was not reached."""
    return {
        "checked": report.checked,
        "violations": report.violations,
        "levels": {file: str(level) for file, level in report.levels.items()},
        "not_checked": report.not_checked,
        "below_required": missing,
    }


def too_weak(report: VerifyReport, required: str | None) -> list[str]:
    """The files that were compared less strictly than --require asks."""
    from reap2gguf.verifying.report import Level

    if required is None:
        return []
    return [
        f"{file}: compared by {report.levels[file]}, --require asks for {required}"
        for file in report.below(Level[required.upper()])
    ]
