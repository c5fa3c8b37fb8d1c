"""The hidden folder in which new weights wait beside the folder that `prune` writes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from reap2gguf.artifacts.made_with import COMPUTING, versions
from reap2gguf.atomic import make_folder, remove
from reap2gguf.options import ComputeOptions, Resume


@contextmanager
def work_beside(
    folder: Path, kind: str, key: str, compute: ComputeOptions
) -> Iterator[tuple[Path, ComputeOptions]]:
    """Where the layers of a repair or a merge go, and how it is computed so that it can resume.

    An interrupted call resumes from the folder, whose name ends in `kind`, if its `key` is the
    same. The folder is removed when the context ends without an error.
    """
    made = folder.with_name(f".{folder.name}.{kind}")
    make_folder(made)
    resume = Resume(made / "state", key, versions(COMPUTING))
    yield made / "layers", replace(compute, scratch=made, resume=resume)
    remove(made)
