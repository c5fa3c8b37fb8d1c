"""A GGUF file on the Hub: its header, and its tensors by ranges, never the whole file.

It is named `owner/name:FILE.gguf`, `owner/name@REVISION:FILE.gguf`, or `owner/name:Q4_K_M` where
one file has that quant type in its name, as llama.cpp's -hf does. The commit is asked for once.
Files that the Hub's cache holds are read from there.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from io import BufferedReader
from pathlib import Path

import numpy as np
import numpy.typing as npt

from reap2gguf.bundle.layout import may_be_model
from reap2gguf.errors import SourceError
from reap2gguf.gguf_files.part_names import parse_part_name, part_name
from reap2gguf.gguf_files.reader import GgufHeader, read_header_from
from reap2gguf.gguf_files.split import join_parts, read_whole_header
from reap2gguf.hub.errors import is_offline, request_errors
from reap2gguf.hub.ranges import HubBlocks, HubRanges, HubStream
from reap2gguf.hub.retry import Note, Sleep, ignore_note, model_retry
from reap2gguf.hub.snapshot import HubFile, list_files
from reap2gguf.messages import shown

_NAME = re.compile(r"([\w-][\w.-]*/[\w.-]+)(?:@([\w./-]+))?:([^:]+)")
_PAGE = re.compile(
    r"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/([\w-][\w.-]*/[\w.-]+)"
    r"/(?:blob|resolve)/([^/?#]+)/([^?#]+\.gguf)(?:\?download=true)?"
)
_SUFFIX = ".gguf"
_HEADER_BYTES = 2**20  # read at a time
_MOST_NAMED = 12  # files in a message


@dataclass(frozen=True)
class HubGgufHeader(GgufHeader):
    """The header of a file that is still on the Hub; tensors are fetched when they are read."""

    blocks: HubBlocks | None = None

    def read(self, name: str, first: int = 0, last: int | None = None) -> npt.NDArray[np.uint8]:
        """Rows of a tensor, as GgufHeader.read. Raises SourceError if they cannot be fetched."""
        info = self.tensors[name]
        end = info.offset + info.n_bytes
        until = end if last is None else info.offset + last * info.row_bytes
        assert self.blocks is not None
        raw = self.blocks.read(info.offset + first * info.row_bytes, until, soon=end)
        return np.frombuffer(raw, np.uint8).reshape(-1, info.row_bytes)


def hub_gguf_name(text: str) -> tuple[str, str | None, str] | None:
    """Repository, revision and file of `owner/name[@REVISION]:FILE`, or of the file's page.

    >>> hub_gguf_name("owner/name:Q4_K_M")
    ('owner/name', None, 'Q4_K_M')
    """
    found = _PAGE.fullmatch(text) or _NAME.fullmatch(text)
    if found is None or "//" in found[3]:
        return None
    return found[1], found[2], found[3]


def open_hub_gguf(
    repository: str,
    revision: str | None,
    wanted: str,
    note: Note = ignore_note,
    sleep: Sleep = time.sleep,
) -> GgufHeader:
    """The header of a GGUF file on the Hub, of all its parts together.

    Raises SourceError if there is no such file or the Hub cannot be reached, ArtifactError if the
    file is broken.
    """

    def ask() -> tuple[str, dict[str, HubFile]] | Path:
        try:
            return list_files(repository, revision)
        except request_errors() as error:
            if is_offline(error) and (path := _cached(repository, revision, wanted)):
                return path
            raise

    found = model_retry(repository, revision, note, sleep).call(ask)
    if isinstance(found, Path):
        return read_whole_header(found)
    commit, files = found
    first = _choose(repository, files, wanted)
    part = parse_part_name(Path(first).name)
    names = [first]
    if part is not None:
        folder = first.removesuffix(Path(first).name)
        names = [folder + part_name(part.stem, n, part.count) for n in range(part.count)]
    here = [_cached(repository, commit, name) for name in names]
    if here[0] is not None and all(here):
        return read_whole_header(here[0])
    ranges = HubRanges(repository, commit, note, sleep)
    read = partial(_read_part, ranges, files)
    return join_parts(read(Path(f"{repository}:{first}")), read)


def _read_part(ranges: HubRanges, files: Mapping[str, HubFile], path: Path) -> GgufHeader:
    """The header of one file; `path` is what messages call it: `owner/name:FILE`."""
    name = str(path).removeprefix(f"{ranges.repository}:")
    if name not in files:
        raise SourceError(f"{ranges.repository}: no file {shown(name)}, a part of the model")
    blocks = HubBlocks(ranges, files[name])
    with BufferedReader(HubStream(blocks), _HEADER_BYTES) as stream:
        found = read_header_from(path, stream, blocks.file.n_bytes)
    return HubGgufHeader(
        found.path,
        found.metadata,
        found.tensors,
        found.keys_end,
        found.kinds,
        found.infos_end,
        found.alignment,
        found.n_bytes,
        blocks,
    )


def _choose(repository: str, files: Mapping[str, HubFile], wanted: str) -> str:
    """The file, or the first part, that `wanted` names."""
    models = [name for name in files if _is_model(name)]
    if wanted in files and wanted.lower().endswith(_SUFFIX):
        part = parse_part_name(Path(wanted).name)
        if part is not None and part.number:
            first = part_name(part.stem, 0, part.count)
            raise SourceError(f"{repository}: {wanted} is a later part; pass the first, {first}")
        return wanted
    tag = re.compile(rf"(?:^|[-_./]){re.escape(wanted)}(?=[-.])", re.IGNORECASE)
    fitting = [name for name in models if tag.search(name)]
    if len(fitting) == 1:
        return fitting[0]
    shown_names = ", ".join(sorted(fitting or models)[:_MOST_NAMED]) or "none"
    which = f"{len(fitting)} files fit {shown(wanted)}" if fitting else f"no file {shown(wanted)}"
    raise SourceError(
        f"{repository}: {which}; pass {repository}:FILE, where FILE is one of {shown_names}"
    )


def _is_model(name: str) -> bool:
    """Whether a file's name is that of a model's GGUF file, whole or the first part."""
    part = parse_part_name(Path(name).name)
    is_first = part is None or part.number == 0
    return name.lower().endswith(_SUFFIX) and is_first and may_be_model(Path(name).name)


def _cached(repository: str, revision: str | None, name: str) -> Path | None:
    """A file in the Hub's cache; None if it is not there."""
    from huggingface_hub import try_to_load_from_cache

    if not name.lower().endswith(_SUFFIX):
        return None
    found = try_to_load_from_cache(repository, name, revision=revision)
    return Path(found) if isinstance(found, str) else None
