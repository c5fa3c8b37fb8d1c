"""Finds a repository on the Hub and fetches its small files into the Hub's cache.

The files that a plan reads are fetched first; the other small files of a model when a build
starts; weights one by one, when they are needed (`shards.py`). Pickled weights and code are never
fetched. Where the Hub cannot be reached, a complete copy in the cache is used instead.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from reap2gguf.checkpoint.companions import Purpose, serves
from reap2gguf.checkpoint.config import MAX_TOKENIZER_BYTES
from reap2gguf.errors import Reap2ggufError, SourceError
from reap2gguf.hub.download import cached_blobs, remove_partial_files, run_in_threads
from reap2gguf.hub.errors import Problem, is_offline, problem_of, reason_of, request_errors
from reap2gguf.hub.retry import Note, Sleep, ignore_note, model_retry
from reap2gguf.messages import shown

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoSibling

_MAX_DOWNLOADS = 8  # at once
_WEIGHTS = "*.safetensors"
_COMMIT = re.compile("[0-9a-f]{40}")


@dataclass(frozen=True)
class HubFile:
    """A file of a repository as the Hub describes it."""

    name: str
    n_bytes: int
    blob: str  # its name in the cache: SHA-256 of a large file, git's hash of a small one
    sha256: str | None  # of large files only


@dataclass(frozen=True)
class Snapshot:
    """One commit of a repository, and the folder of the cache for its files.

    `files` is empty where the Hub was not asked, since the cache holds everything.
    """

    name: str
    commit: str
    folder: Path
    files: Mapping[str, HubFile] = field(default_factory=dict)

    @property
    def weights(self) -> dict[str, HubFile]:
        """The safetensors at the top of the repository, by name."""
        return {name: file for name, file in self.files.items() if _is_weights(name)}

    def later_files(self) -> list[HubFile]:
        """Small files that a plan does not read, and which are not in the cache yet."""
        wanted = (file for name, file in self.files.items() if serves(name, Purpose.BUILD))
        return [file for file in wanted if not (self.folder / file.name).is_file()]

    def complete(self, note: Note = ignore_note, sleep: Sleep = time.sleep) -> None:
        """Fetch the small files that a plan does not read.

        Raises SourceError if the Hub refuses or cannot be reached, OutputError if the cache cannot
        be written.
        """
        if missing := self.later_files():
            _fetch(self.name, self.commit, missing, note, sleep)


def find(
    name: str, revision: str | None, note: Note = ignore_note, sleep: Sleep = time.sleep
) -> Snapshot:
    """A repository at `revision`, with the files that a plan reads in the cache.

    Raises SourceError if there is no such repository or revision, it may not be read, or the Hub
    cannot be reached in five tries; OutputError if the cache cannot be written.
    """

    def ask() -> tuple[str, dict[str, HubFile]] | Path:
        try:
            return list_files(name, revision)
        except request_errors() as error:
            # a complete copy needs no Hub, unless the Hub says that there is no such revision
            is_final = problem_of(error) in (Problem.NO_REVISION, Problem.INVALID_NAME)
            if not is_final and (folder := _cached(name, revision)):
                if not is_offline(error):
                    note(
                        f"{name}: the Hub cannot be reached ({reason_of(error)}); using the cached "
                        f"copy, commit {folder.name[:12]}"
                    )
                return folder
            raise

    found = model_retry(name, revision, note, sleep).call(ask)
    if isinstance(found, Path):
        return Snapshot(name, found.name, found)
    commit, files = found
    if "config.json" not in files:
        raise SourceError(
            f"{name}: no config.json; this is not a model repository with safetensors"
        )
    folder = _fetch(name, revision or "main", [files["config.json"]], note, sleep)
    if folder.name != commit:
        raise SourceError(f"{name}: changed while it was read; run the same command again")
    wanted = [file for file in files.values() if serves(file.name, Purpose.PLAN)]
    _fetch(name, commit, wanted, note, sleep)
    return Snapshot(name, commit, folder, files)


def list_files(name: str, revision: str | None) -> tuple[str, dict[str, HubFile]]:
    """The commit of a revision and its files, as the Hub lists them.

    Raises what huggingface_hub raises, and ValueError for an answer that is not the Hub's.
    """
    from huggingface_hub import HfApi, constants

    files: dict[str, HubFile] = {}
    try:
        # without a limit it would wait for ever for a server that accepts and does not answer
        limit = constants.HF_HUB_DOWNLOAD_TIMEOUT
        info = HfApi().model_info(name, revision=revision, timeout=limit, files_metadata=True)
        for entry in info.siblings or ():
            file = _hub_file(entry)
            if file is not None:
                files[file.name] = file
    except (TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"no description of a model: {error}") from error
    if not isinstance(info.sha, str) or not _COMMIT.fullmatch(info.sha):
        raise ValueError("it names no commit")
    return info.sha, files


def _hub_file(entry: RepoSibling) -> HubFile | None:
    """A file as the Hub lists it; None where a fact is missing."""
    lfs = entry.lfs
    sha256 = lfs.sha256 if lfs else None
    name, blob, size = entry.rfilename, sha256 or entry.blob_id, lfs.size if lfs else entry.size
    if not (isinstance(name, str) and isinstance(blob, str) and isinstance(size, int)):
        return None
    return HubFile(name, size, blob, sha256) if size >= 0 else None


def _cached(name: str, revision: str | None) -> Path | None:
    """The folder of a revision whose weights are all in the cache; None if some are missing."""
    from huggingface_hub import try_to_load_from_cache

    from reap2gguf.checkpoint.index import find_shards

    try:
        config = try_to_load_from_cache(name, "config.json", revision=revision)
        if not isinstance(config, str):
            return None
        find_shards(Path(config).parent)
    except (Reap2ggufError, OSError, ValueError):
        return None  # the Hub's error, which is raised, says why
    return Path(config).parent


def _is_weights(name: str) -> bool:
    return "/" not in name and fnmatchcase(name, _WEIGHTS)


def _fetch(name: str, revision: str, files: Sequence[HubFile], note: Note, sleep: Sleep) -> Path:
    """The folder of the cache, with these small files in it."""
    for file in files:
        if file.n_bytes > MAX_TOKENIZER_BYTES:
            raise SourceError(
                f"{name}: {shown(file.name)} has {file.n_bytes:,} bytes, expected at most "
                f"{MAX_TOKENIZER_BYTES:,}; this is not a file of a model"
            )
    retry = model_retry(name, revision, note, sleep)

    def fetch_one(file: HubFile) -> Path:
        from huggingface_hub import hf_hub_download

        def download() -> str:
            return hf_hub_download(name, file.name, revision=revision)

        return Path(retry.call(download)).parents[file.name.count("/")]

    try:
        return run_in_threads([partial(fetch_one, file) for file in files], _MAX_DOWNLOADS)[0]
    except BaseException:
        remove_partial_files(cached_blobs(name))
        raise
