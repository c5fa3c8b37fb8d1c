"""Which files the two folders of a bundle hold: one list for `build`, `verify` and `push`.

Everything else in a folder is a stray. A stray may be harmless, but a reader of the folder, or of
the repository that it becomes, cannot know: weights that no check has read, or Python code that
`trust_remote_code` would run. Links are strays too: what they lead to is not part of the bundle.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from reap2gguf.bundle.layout import (
    CALIBRATION_FILE,
    CARD_FILE,
    HF_PICTURES,
    HUB_FILES,
    IMATRIX_DAT_FILE,
    IMATRIX_FILE,
    MANIFEST_FILE,
    MODELFILE,
    OBSERVATIONS_FILE,
    SUMS_FILE,
)
from reap2gguf.checkpoint.companions import Purpose, serves
from reap2gguf.checkpoint.index import INDEX_NAME, SINGLE_NAME
from reap2gguf.files import is_own_file, what_it_is
from reap2gguf.messages import shown

if TYPE_CHECKING:
    from reap2gguf.bundle.manifest import Manifest

# folders that `hf download --local-dir` and `git clone` make; they are neither read nor published
_OF_DOWNLOADS = frozenset((".cache", ".git"))
_SHARD = re.compile(r"model-[0-9]{5}-of-[0-9]{5}\.safetensors")
# no build writes one, whatever a pattern of companion files would allow
_NEVER = (".py", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".gguf")


def gguf_members(manifest: Manifest) -> set[str]:
    """The names of the files in the GGUF folder."""
    models = {name for record in manifest.gguf for name in record.files}
    sides = {side.file for side in manifest.side_files}
    own = {CARD_FILE, MANIFEST_FILE, MODELFILE, SUMS_FILE, *manifest.pictures}
    if manifest.has_observations:
        own.add(OBSERVATIONS_FILE)
    if manifest.has_imatrix:
        own |= {IMATRIX_DAT_FILE, IMATRIX_FILE}
    own |= {record.toml_file for record in manifest.gguf if record.has_toml}
    return models | sides | own | ({CALIBRATION_FILE} if manifest.has_text else set())


def hf_members(manifest: Manifest) -> set[str]:
    """The names of the files in the safetensors folder; none if the bundle does not have one."""
    if manifest.hf is None:
        return set()
    return {name for name in manifest.hf.files if _may_be_in_hf(name)} | {MANIFEST_FILE}


def _may_be_in_hf(name: str) -> bool:
    """Whether a build can write a file of that name beside the safetensors."""
    own = (CARD_FILE, INDEX_NAME, SINGLE_NAME, "config.json", *HF_PICTURES)
    if name in own or _SHARD.fullmatch(name):
        return True
    return serves(name, Purpose.BUNDLE) and not name.lower().endswith(_NEVER)


def check_members(folder: Path, members: Collection[str]) -> Iterator[str]:
    """Violations in a bundle's folder: strays, links, and what is not a plain file.

    `members` are the names that it may have; a name without a file is not reported here.
    """
    for entry in sorted(folder.iterdir()):
        name = entry.name
        if name in _OF_DOWNLOADS and entry.is_dir() and not entry.is_symlink():
            continue
        if name not in members and name not in HUB_FILES:
            yield f"{folder.name}: {shown_name(name)} is not part of the bundle; {_advice(name)}"
        elif not is_own_file(entry):
            yield f"{folder.name}: {name} is {_kind(entry)}, expected a file of the folder itself"


def shown_name(name: str) -> str:
    """A file name as it is, or quoted if it has letters that a terminal would not print."""
    return name if name.isprintable() else shown(name)


def _advice(name: str) -> str:
    if name.endswith(".gguf"):
        return "move it away, or take it over with `reap2gguf add BUNDLE FILE.gguf`"
    return "move it away"


def _kind(entry: Path) -> str:
    if entry.is_symlink():
        return "a link"
    return what_it_is(entry) or "not readable"
