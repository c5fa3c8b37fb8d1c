"""GGUF files without anything to compare them with: what they can show by themselves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from reap2gguf.gguf_files.split import first_parts
from reap2gguf.verifying.gguf_file import check_gguf
from reap2gguf.verifying.gguf_header import ExpectedGguf
from reap2gguf.verifying.report import Findings, Level, VerifyReport

if TYPE_CHECKING:
    from reap2gguf.progress import Progress

_NOT_COMPARED = (
    "values not compared: pass --source MODEL.gguf, the file that it was made from, or the "
    "safetensors folder that it was made from as another path"
)


def verify_alone(paths: Sequence[Path], n_threads: int, progress: Progress) -> VerifyReport:
    """Check headers, layouts and that every value is finite; of parts, the first is enough."""
    found = Findings([path.name for path in paths], not_checked=[_NOT_COMPARED])
    for path in first_parts(paths):
        found.violations += check_gguf(path, ExpectedGguf(), None, n_threads, progress)
        found.reach(Level.NOTHING, [path])
    return found.report()
