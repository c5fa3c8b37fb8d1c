"""One HTML page about a finished bundle."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from reap2gguf.errors import UsageError
from reap2gguf.options import check_path

if TYPE_CHECKING:
    from reap2gguf.api.opening import PathLike

_ENDING = "-report.html"


def report(bundle: PathLike, output: PathLike | None = None, *, overwrite: bool = False) -> Path:
    """Write one self-contained HTML page about a finished bundle, and return its path.

    `bundle` is either of its folders; what lies in the other, and the observations if they are
    still there, are used too. `output` is NAME-report.html in the current folder by default. The
    page loads nothing, and the same bundle makes the same bytes. Memory: the importance matrix
    and the observations. Raises UsageError if it is not a bundle or the output is one of its
    files, ArtifactError if a file of it is broken, OutputError if the page cannot be written, or
    exists and is not to be overwritten.
    """
    from reap2gguf.api.inspecting import observations_of
    from reap2gguf.atomic import write_whole
    from reap2gguf.bundle.layout import GGUF_SUFFIX, MANIFEST_FILE
    from reap2gguf.bundle.manifest import Manifest
    from reap2gguf.files import is_plain
    from reap2gguf.outputs import claimed, output_file
    from reap2gguf.reporting.facts import read_facts
    from reap2gguf.reporting.page import page

    folder = Path(os.path.realpath(check_path("bundle", bundle)))  # the user named it
    if not is_plain(folder / MANIFEST_FILE):
        raise UsageError(
            f"{folder}: not a bundle: it holds no {MANIFEST_FILE}; pass a folder that `build` "
            f"made, NAME or NAME{GGUF_SUFFIX}"
        )
    manifest = Manifest.load(folder)
    target = output_file(_file_name(manifest.name) if output is None else output)
    if is_plain(target.parent / MANIFEST_FILE):
        raise UsageError(
            f"output {target}: is in a folder of a bundle, whose files are all verified; pass "
            "another output"
        )
    with claimed([target], overwrite):
        observations = observations_of(manifest, folder)
        write_whole(target, page(read_facts(manifest, folder, observations)))
    return target


def _file_name(name: str) -> str:
    """NAME-report.html, if the manifest's name can be that of a file."""
    from reap2gguf.files import is_plain_name

    return f"{name}{_ENDING}" if is_plain_name(f"{name}{_ENDING}") else _ENDING[1:]
