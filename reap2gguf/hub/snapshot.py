"""Finds a repository on the Hub and fetches its small files into the Hub's cache.

The files that a plan reads come first, the others that travel with a model when a build begins;
weights come one by one, when they are needed (`shards.py`). Pickled weights and code are never
fetched. Where the Hub cannot be reached, a copy that the cache holds whole serves as well.
"""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, cast

from reap2gguf.checkpoint.config import MAX_TOKENIZER_BYTES
from reap2gguf.errors import Reap2ggufError, SourceError
from reap2gguf.hub.errors import asked_wait, is_offline, refusal, trouble
from reap2gguf.hub.network_threads import drop_unfinished, side_by_side
from reap2gguf.messages import shown

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoSibling

TRIES = 5
_AT_ONCE = 8
# What a plan reads. A vocab.json is what tokenizer.json holds once more.
_PLANNED = (
    "config.json", "generation_config.json", "model.safetensors.index.json", "tokenizer*.json",
    "special_tokens_map.json", "added_tokens.json", "*processor_config.json", "chat_template.*",
    "additional_chat_templates/*.jinja",
)  # fmt: skip
_LATER = ("vocab.json", "*.txt", "*.model", "README.md", "LICENSE*", "NOTICE*")
_WEIGHTS = "*.safetensors"
_COMMIT = re.compile("[0-9a-f]{40}")
_FIRST_WAIT = 1.0  # seconds; doubled at each try
_JITTER = random.Random()

Note = Callable[[str], None]
Sleep = Callable[[float], None]
T = TypeVar("T")


def say_nothing(text: str) -> None:
    """A Note that nobody reads."""


@dataclass(frozen=True)
class HubFile:
    """A file of a repository as the Hub describes it."""

    name: str
    n_bytes: int
    blob: str  # its name in the cache: SHA-256 of a large file, git's hash of a small one
    sha256: str | None  # of large files only


@dataclass(frozen=True)
class Snapshot:
    """One commit of a repository, and the folder of the cache in which its files come to lie.

    `files` is empty where the Hub was not asked, since the cache holds everything.
    """

    name: str
    commit: str
    folder: Path
    files: Mapping[str, HubFile] = field(default_factory=dict)

    @property
    def weights(self) -> dict[str, HubFile]:
        """The safetensors at the top of the repository, by name."""
        return {name: file for name, file in self.files.items() if _matches(name, (_WEIGHTS,))}

    def later_files(self) -> list[HubFile]:
        """Small files that a plan does not read, and which are not in the cache yet."""
        wanted = (file for name, file in self.files.items() if _matches(name, _LATER))
        return [file for file in wanted if not (self.folder / file.name).is_file()]

    def complete(self, note: Note = say_nothing, sleep: Sleep = time.sleep) -> None:
        """Fetch the small files that a plan does not read.

        Raises SourceError if the Hub refuses or cannot be reached, OutputError if the cache cannot
        be written.
        """
        if missing := self.later_files():
            _fetch(self.name, self.commit, missing, note, sleep)


def find(
    name: str, revision: str | None, note: Note = say_nothing, sleep: Sleep = time.sleep
) -> Snapshot:
    """A repository at `revision`, with the files that a plan reads in the cache.

    Raises SourceError if there is no such repository or revision, it may not be read, or the Hub
    cannot be reached in five tries; OutputError if the cache cannot be written.
    """

    def ask() -> tuple[str, dict[str, HubFile]] | Path:
        try:
            return _listed(name, revision)
        except possible_errors() as error:
            # a copy that is whole needs no Hub, unless that says there is no such revision
            if not _is_final(error) and (folder := _cached(name, revision)):
                if not is_offline(error):
                    note(
                        f"{name}: the Hub cannot be asked ({trouble(error)}); the cache's copy is "
                        f"used, commit {folder.name[:12]}"
                    )
                return folder
            raise

    found = persist(name, revision, ask, note, sleep)
    if isinstance(found, Path):
        return Snapshot(name, found.name, found)
    commit, files = found
    if "config.json" not in files:
        raise SourceError(f"{name}: no config.json; this is no repository of a model's safetensors")
    folder = _fetch(name, revision or "main", [files["config.json"]], note, sleep)
    if folder.name != commit:
        raise SourceError(f"{name}: changes while it is read; run it again")
    wanted = [file for file in files.values() if _matches(file.name, _PLANNED)]
    _fetch(name, commit, wanted, note, sleep)
    return Snapshot(name, commit, folder, files)


def persist(
    name: str,
    revision: str | None,
    action: Callable[[], T],
    note: Note = say_nothing,
    sleep: Sleep = time.sleep,
    tries: int = TRIES,
    advice: str = "",
    refuse: Callable[[BaseException], Reap2ggufError | None] | None = None,
    kind: type[Reap2ggufError] = SourceError,
) -> T:
    """The result of an action on the Hub, tried again while its errors may pass.

    `refuse` says what an error means that will not pass. Raises what it says, SourceError or
    OutputError by default; `kind` where the Hub cannot be reached.
    """
    wait = _FIRST_WAIT
    for attempt in range(1, tries + 1):
        try:
            return action()
        except possible_errors() as error:
            refused = refuse(error) if refuse else refusal(error, name, revision)
            if refused:
                raise refused from error
            reason = trouble(error)
            if attempt == tries:
                raise kind(_unreachable(name, tries, reason, advice)) from error
            seconds = max(wait * _JITTER.uniform(1, 1.25), asked_wait(error))
            note(
                f"{name}: the Hub cannot be reached ({reason}); try {attempt + 1} of {tries} in "
                f"{seconds:.0f} s"
            )
            sleep(seconds)
            wait *= 2
    raise AssertionError("the last try returns or raises")


def possible_errors() -> tuple[type[Exception], ...]:
    """What huggingface_hub raises when something is wrong."""
    from huggingface_hub.errors import HfHubHTTPError

    # whatever HTTP client this version of huggingface_hub is built on, its errors are of this class
    transport_error = cast("type[Exception]", HfHubHTTPError.__mro__[1])
    return (OSError, ValueError, RuntimeError, LookupError, transport_error)


def _unreachable(name: str, tries: int, reason: str, advice: str) -> str:
    advice = advice or (
        "check the name (there is no such folder here) and the network, or fetch it where there is "
        f"one (`hf download {name}`) and pass the folder, or copy the cache and set "
        "HF_HUB_OFFLINE=1"
    )
    return f"{name}: the Hub cannot be reached in {tries} tries ({reason}); {advice}"


def _listed(name: str, revision: str | None) -> tuple[str, dict[str, HubFile]]:
    """The commit of a revision and its files, as the Hub lists them."""
    from huggingface_hub import HfApi, constants

    files: dict[str, HubFile] = {}
    try:
        # without a limit it would wait for ever for a server that accepts and says nothing
        limit = constants.HF_HUB_DOWNLOAD_TIMEOUT
        info = HfApi().model_info(name, revision=revision, timeout=limit, files_metadata=True)
        for entry in info.siblings or ():
            file = _described(entry)
            if file is not None:
                files[file.name] = file
    except (TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"no description of a model: {error}") from error
    if not isinstance(info.sha, str) or not _COMMIT.fullmatch(info.sha):
        raise ValueError("it tells no commit")
    return info.sha, files


def _described(entry: RepoSibling) -> HubFile | None:
    """A file as the Hub lists it; None where a fact is missing."""
    lfs = entry.lfs
    sha256 = lfs.sha256 if lfs else None
    name, blob, size = entry.rfilename, sha256 or entry.blob_id, lfs.size if lfs else entry.size
    if not (isinstance(name, str) and isinstance(blob, str) and isinstance(size, int)):
        return None
    return HubFile(name, size, blob, sha256) if size >= 0 else None


def _is_final(error: Exception) -> bool:
    from huggingface_hub.errors import HFValidationError, RevisionNotFoundError

    return isinstance(error, RevisionNotFoundError | HFValidationError)


def _cached(name: str, revision: str | None) -> Path | None:
    """The folder of a revision whose weights the cache holds whole."""
    from huggingface_hub import try_to_load_from_cache

    from reap2gguf.checkpoint.index import find_shards

    try:
        config = try_to_load_from_cache(name, "config.json", revision=revision)
        if not isinstance(config, str):
            return None
        find_shards(Path(config).parent)
    except (Reap2ggufError, OSError, ValueError):
        return None  # why, says the error that made us look
    return Path(config).parent


def _matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether a file is at the top of the repository, or a template, and fits a pattern."""
    return any(
        name.count("/") == pattern.count("/") and fnmatchcase(name, pattern) for pattern in patterns
    )


def _fetch(
    name: str, revision: str, files: Sequence[HubFile], note: Note, sleep: Sleep
) -> Path:  # fmt: skip
    """The folder of the cache, with these small files in it."""
    for file in files:
        if file.n_bytes > MAX_TOKENIZER_BYTES:
            raise SourceError(
                f"{name}: {shown(file.name)} has {file.n_bytes:,} bytes, expected at most "
                f"{MAX_TOKENIZER_BYTES:,}; this is no file of a model"
            )

    def bring(file: HubFile) -> Path:
        from huggingface_hub import hf_hub_download

        def download() -> str:
            return hf_hub_download(name, file.name, revision=revision)

        path = Path(persist(name, revision, download, note, sleep))
        return path.parents[file.name.count("/")]

    try:
        return side_by_side([partial(bring, file) for file in files], _AT_ONCE)[0]
    except BaseException:
        drop_unfinished(blobs_of(name))
        raise


def blobs_of(name: str) -> Path:
    """Where the cache keeps the contents of a repository's files."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    folder = repo_folder_name(repo_id=name, repo_type="model")
    return Path(constants.HF_HUB_CACHE) / folder / "blobs"
